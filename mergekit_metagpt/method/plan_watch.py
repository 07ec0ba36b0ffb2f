"""Learns from the calls of mergekit's planner what no single tensor shows."""

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
    """One merge from files, as far as it was planned.

    Attributes:
        slices: names of the slices seen so far.
        bases: their bases.
        has_models: whether any slice has a model beside its base.
        reading_slices: whether no tensor was seen yet.
        largest_weight: the largest weight of any model on any tensor.
        inputs: the models of each output tensor.
        is_planned: whether `take_names` was called: the merge has begun.
        unwritten: names of stored tensors of the base that are not written.
        values: parameters of the next tensor.
        of_tensors: the different sets of parameters that tensors have.
        announcer: logs each kind of message once for this merge.
    """

    slices: set[str | None] = field(default_factory=set)
    bases: set[Hashable] = field(default_factory=set)
    has_models: bool = False
    reading_slices: bool = True
    largest_weight: float = 0.0
    inputs: dict[str, tuple[Hashable, ...]] = field(default_factory=dict)
    is_planned: bool = False
    unwritten: Collection[str] = ()
    values: list[tuple[str, Any]] = field(default_factory=list)
    of_tensors: set[tuple[tuple[str, Any], ...]] = field(default_factory=set)
    announcer: Announcer = field(default_factory=Announcer)

    def take_names(self) -> Collection[str]:
        """Return the names of all output tensors once; none if layers may be moved."""
        done, self.is_planned = self.is_planned, True
        return () if done or self.moves_layers else self.inputs.keys()

    @property
    def moves_layers(self) -> bool:
        """Whether an output tensor may have another name than those it is made of."""
        return any(not str(name).endswith("[0]") for name in self.slices)

    @property
    def parameters_vary(self) -> bool:
        """Whether parameters differ by tensor."""
        # Slices may have different numbers of models.
        counts = {len(values) for values in self.of_tensors}
        sets = {frozenset(values) for values in self.of_tensors}
        return len(sets) > 1 or len(counts) < len(self.of_tensors)


class _Here(threading.local):
    """What the calls on one thread belong to."""

    plan: Plan | None = None
    warned = False


class PlanWatch:
    """Watches one method's validation calls, which mergekit makes in a fixed order.

    mergekit plans on one thread. It validates every slice, then for every tensor it
    resolves parameters and validates inputs. Only then does it execute, possibly on
    other threads. So the first execution already knows whether there is a model beside
    the base, and whether any weight is positive.
    """

    def __init__(self) -> None:
        self._here = _Here()
        self._by_base: dict[Hashable, Plan] = {}

    @contextmanager
    def already_warned(self) -> Iterator[None]:
        """Log no warnings in merges that this thread plans meanwhile: they were."""
        self._here.warned = True
        try:
            yield
        finally:
            self._here.warned = False

    def of(self, base: Hashable) -> Plan | None:
        """Return the latest plan with this base, of this thread if there is one."""
        own = self._here.plan
        return own if own and base in own.bases else self._by_base.get(base)

    def saw_slice(
        self, name: str | None, models: Sequence[Hashable], base: Hashable
    ) -> None:
        """Note a slice; a repeated or missing name begins a new plan."""
        plan = self._here.plan
        if plan is None or not plan.reading_slices or {name, None} & plan.slices:
            announcer = Announcer(warned=self._here.warned)
            plan = self._here.plan = Plan(announcer=announcer)
        plan.slices.add(name)
        plan.bases.add(base)
        plan.has_models |= any(model != base for model in models)
        self._by_base[base] = plan

    def saw_value(self, name: str, value: Any) -> None:
        """Note the value of a parameter for the next tensor."""
        plan = self._here.plan
        if plan is None:
            return
        plan.values.append((name, value))
        if name == "weight":
            plan.largest_weight = max(plan.largest_weight, value)

    def saw_tensor(
        self, name: str, ids: Sequence[Hashable], base: Hashable
    ) -> list[Hashable]:
        """Note a tensor and its inputs, after its parameters were resolved.

        Returns the inputs that it had when its task was built and has no more. Raises a
        ValueError if no slice has a model beside its base, or `sample` differs from
        other tensors' or has no effect.
        """
        plan = self._here.plan
        if plan is None:
            return []
        # There are no values if the same tensor is validated again.
        if plan.values and not plan.is_planned:
            plan.of_tensors.add(tuple(plan.values))
            require_one_sample(
                (v for of in plan.of_tensors for n, v in of if n == "sample"),
                [value for name, value in plan.values if name == "granularity"],
            )
            plan.values.clear()
        if plan.reading_slices:
            plan.reading_slices = False
            if not plan.has_models:
                raise ValueError(only_base(base))
        planned = plan.inputs.setdefault(name, tuple(ids))
        lost = [model for model in planned if model not in ids]
        return [] if plan.moves_layers else lost
