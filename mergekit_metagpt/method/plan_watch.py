"""Remembers, from the calls of mergekit's planner, what a single tensor cannot tell."""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mergekit_metagpt.method.announcing import Announcer
from mergekit_metagpt.method.parameters import only_base, require_one_sample


@dataclass
class Plan:
    """What is known of one merge from files.

    Attributes:
        slices: names of the slices seen so far.
        has_models: whether any slice has a model beside its base.
        reading_slices: whether tensors are still to come.
        largest_weight: of all models on all tensors.
        names: of all output tensors, until somebody takes them.
        unwritten: names of stored tensors of the base that are not written.
        values: of the parameters of the tensor to come.
        of_tensors: the different sets of values that tensors have.
        announcer: says each kind of message once for this merge.
    """

    slices: set[str | None] = field(default_factory=set)
    has_models: bool = False
    reading_slices: bool = True
    largest_weight: float = 0.0
    names: set[str] | None = field(default_factory=set)
    unwritten: Collection[str] = ()
    values: list[tuple[str, Any]] = field(default_factory=list)
    of_tensors: set[tuple[tuple[str, Any], ...]] = field(default_factory=set)
    announcer: Announcer = field(default_factory=Announcer)

    def take_names(self) -> set[str]:
        """Return the names of all output tensors, once; none if layers may be moved."""
        names, self.names = self.names, None
        moved = any(not str(name).endswith("[0]") for name in self.slices)
        return set() if names is None or moved else names


class PlanWatch:
    """Watches one method's validation calls, which mergekit makes in a known order.

    A plan is made on one thread: every slice is validated, then for every tensor its
    parameters are resolved and its inputs validated. Only then does anything execute,
    possibly on other threads. So by the first execution it is known whether any model
    beside the base is configured, and whether any weight is positive.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._by_base: dict[Hashable, Plan] = {}

    @contextmanager
    def already_warned(self) -> Iterator[None]:
        """Log no warning in the merges that this thread plans meanwhile.

        For callers that have logged all warnings of a merge before they start it.

        Yields:
            while the merge is planned and runs.
        """
        self._here.warned = True
        try:
            yield
        finally:
            self._here.warned = False

    def of(self, base: Hashable) -> Plan | None:
        """Return the latest plan with this base."""
        return self._by_base.get(base)

    def saw_slice(
        self, name: str | None, models: Sequence[Hashable], base: Hashable
    ) -> None:
        """Note a slice. A name seen before, or none, starts a plan: the last failed."""
        plan = getattr(self._here, "plan", None)
        if plan is None or not plan.reading_slices or {name, None} & plan.slices:
            warned = getattr(self._here, "warned", False)
            plan = self._here.plan = Plan(announcer=Announcer(warned=warned))
        plan.slices.add(name)
        plan.has_models |= any(model != base for model in models)
        self._by_base[base] = plan

    def saw_value(self, name: str, value: Any) -> None:
        """Note a parameter's value from the configuration, for the tensor to come."""
        plan = getattr(self._here, "plan", None)
        if plan is None:
            return
        plan.values.append((name, value))
        if name == "weight":
            plan.largest_weight = max(plan.largest_weight, value)

    def saw_tensor(self, name: str, base: Hashable) -> None:
        """Note that a tensor's task is built, its parameters being resolved.

        Args:
            name: of the tensor in the output.
            base: of the tensor's inputs.

        Raises:
            ValueError: no slice has a model beside its base; `sample` differs from
                that of other tensors, or this one is not sampled.
        """
        plan = getattr(self._here, "plan", None)
        if plan is not None and plan.names is not None:
            plan.names.add(name)
            if plan.values:  # none where the same tensor is validated again
                plan.of_tensors.add(tuple(plan.values))
                require_one_sample(
                    (v for of in plan.of_tensors for n, v in of if n == "sample"),
                    [value for name, value in plan.values if name == "granularity"],
                )
                plan.values.clear()
        if plan is not None and plan.reading_slices:
            plan.reading_slices = False
            if not plan.has_models:
                raise ValueError(only_base(base))

    def parameters_vary(self, base: Hashable) -> bool:
        """Whether the plan with this base has parameters that differ by tensor."""
        plan = self.of(base)
        if plan is None:
            return False
        # Slices may have different numbers of models.
        counts = {len(values) for values in plan.of_tensors}
        sets = {frozenset(values) for values in plan.of_tensors}
        return len(sets) > 1 or len(counts) < len(plan.of_tensors)

    def every_weight_is_zero(self, base: Hashable) -> bool:
        """Whether all weights of the plan with this base are 0."""
        plan = self.of(base)
        return plan is not None and plan.largest_weight == 0
