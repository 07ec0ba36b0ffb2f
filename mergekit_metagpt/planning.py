"""Remembers, from the calls of mergekit's planner, what a single tensor cannot tell."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence

from mergekit_metagpt.parameters import only_base


class PlanWatch:
    """Watches one method's validation calls, which mergekit makes in a known order.

    A plan is made on one thread: every slice is validated, then for every tensor its
    parameters are resolved and its inputs validated. Only then does anything execute,
    possibly on other threads. So by the first execution it is known whether any model
    beside the base is configured, and whether any weight is positive.
    """

    def __init__(self) -> None:
        self._plan = threading.local()
        self._largest_weight: dict[Hashable, float] = {}

    def saw_slice(
        self, name: str | None, models: Sequence[Hashable], base: Hashable
    ) -> bool:
        """Note a slice; return whether it is the first with this base in its plan.

        A name seen before, or none, starts a plan: the last one may have failed.
        """
        plan = self._plan.__dict__
        slices = plan.setdefault("slices", set())
        if not plan.get("reading_slices") or name in slices or None in slices:
            slices.clear()
            plan.update(reading_slices=True, bases=set(), models=False, largest=0.0)
        slices.add(name)
        plan["models"] |= any(model != base for model in models)
        first = base not in plan["bases"]
        plan["bases"].add(base)
        if first:
            self._largest_weight.pop(base, None)
        return first

    def saw_weight(self, value: float) -> None:
        """Note a weight from the configuration, whichever tensor it is for."""
        plan = self._plan.__dict__
        plan["largest"] = max(plan.get("largest", 0.0), value)

    def saw_tensor(self, base: Hashable) -> None:
        """Note that a tensor's task is built, its parameters being resolved.

        Args:
            base: of the tensor's inputs.

        Raises:
            ValueError: no slice has a model beside its base.
        """
        plan = self._plan.__dict__
        if plan.get("reading_slices"):
            plan["reading_slices"] = False
            if not plan["models"]:
                raise ValueError(only_base(base))
        if base in plan.get("bases", ()):
            largest = max(self._largest_weight.get(base, 0.0), plan["largest"])
            self._largest_weight[base] = largest

    def every_weight_is_zero(self, base: Hashable) -> bool:
        """Whether all weights of the plan with this base are 0."""
        return self._largest_weight.get(base) == 0
