"""The mergekit method: find this merge's coefficients, then form the scaled sum."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from mergekit.merge_methods.base import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    TensorGroup,
)

from mergekit_metagpt.arithmetic import scaled_sums
from mergekit_metagpt.method import advice, group_norms, inputs
from mergekit_metagpt.method.announcing import Announcer
from mergekit_metagpt.method.parameters import (
    all_zero,
    no_base,
    own_parameters,
    weights_of,
)
from mergekit_metagpt.method.plan_watch import PlanWatch

if TYPE_CHECKING:
    from mergekit_metagpt.method.settings import Settings

REFERENCE_URL = "https://arxiv.org/abs/2406.11385"
# mergekit's planner validates slices under such a name, before any tensor.
_SLICE = re.compile(r".+\.slices\[\d+\]")


class MetaGPTMerge(GroupMergeMethod):
    """MetaGPT as a mergekit method: merges from files, driven by mergekit's graph.

    lambda_t = w_t n_t^(p/2) / sum_k w_k n_k^(p/2), with n_t measured on the stored
    checkpoints (granularity `model`, `layer`) or on the tensors at hand (`tensor`);
    theta = theta_0 + lambda sum_t lambda_t tau_t (MetaGPT, eq. 2 and 15). Called
    directly, it merges tensors in memory and pools over the groups of the call.
    """

    from_files = True

    def __init__(self) -> None:
        self.watch = PlanWatch()
        self.spec = self._spec()

    def _spec(self) -> MergeMethodSpec:
        return MergeMethodSpec(
            name="metagpt",
            pretty_name="MetaGPT",
            reference_url=REFERENCE_URL,
            parameters=own_parameters(self.watch.saw_value),
            contract=InputContract(base=BasePolicy.REQUIRED),
        )

    def __call__(
        self, groups: Sequence[TensorGroup], /, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        return InMemoryMerge(self)(groups, **options)

    def validate_inputs(
        self,
        input_ids: Sequence[Hashable],
        base_id: Hashable | None = None,
        *,
        group_name: str | None = None,
    ) -> None:
        """Check the inputs of a slice, or of a tensor that is planned or merged.

        Raises a ValueError if there is no base, it is not among the inputs, only the
        base is configured, or a model does not fit the base; an OSError if a file is
        missing, truncated or has changed.
        """
        if base_id is None:
            raise ValueError(no_base(self.spec.name, group_name))
        if base_id not in input_ids:
            if group_name is not None and not _SLICE.fullmatch(group_name):
                raise ValueError(
                    f"the base {base_id} has no {group_name}, which others have: there "
                    "is no task vector of it. Leave this tensor out of the models"
                )
            place = f" for {group_name}" if group_name else ""
            raise ValueError(
                f"the base {base_id} is not among the inputs{place}. Add it to the "
                "sources (or to the models): task vectors are measured against it"
            )
        super().validate_inputs(input_ids, base_id, group_name=group_name)
        if not self.from_files or not inputs.are_references(input_ids):
            return
        if group_name is not None and not _SLICE.fullmatch(group_name):
            missing = self.watch.saw_tensor(group_name, input_ids, base_id)
            inputs.require_absent(missing, group_name)
            return
        from mergekit_metagpt.scanning import once

        self.watch.saw_slice(group_name, input_ids, base_id)
        once.forget_failures()
        # Without a name this is mergekit-pytorch, which has nothing open yet, or a
        # merge in memory, where files do not matter.
        if group_name is not None:
            inputs.check_headers(input_ids, base_id)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        # Imported here, so that `import mergekit` does not load it.
        from mergekit_metagpt.method.settings import Settings

        settings = [Settings.of(bound) for bound in parameters]
        weights = [
            weights_of(group, bound)
            for group, bound in zip(groups, parameters, strict=True)
        ]
        self._require_weights(groups, weights)
        for group in groups if self.from_files else ():
            inputs.require_unchanged(group)
            self._warn_of_losses(inputs.base_of(group).id)
        measured = self._sq_norms(groups, settings)
        computed = []
        for group, setting, weight, norms in zip(
            groups, settings, weights, measured, strict=True
        ):
            weighed = group_norms.weigh(norms, setting, weight)
            self._announce(group, setting, weight, norms, weighed)
            computed.append({"coefficients": weighed.shares, "lambda": weighed.scale})
        return super()._execute(
            groups,
            [bound | own for bound, own in zip(parameters, computed, strict=True)],
            options,
            input_dtypes=input_dtypes,
            out_dtype=out_dtype,
        )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Return theta_0 + sum_t lambda_t tau_t for one tensor group."""
        base = inputs.base_of(group).tensor
        if not group.non_base:
            return base
        merged, finite = self._merged(group, parameters)
        if finite:
            return merged
        if inputs.is_unchanged(group):
            return base.clone()
        inputs.require_finite(group)
        raise ValueError(
            f"{group.metadata.name or 'a tensor'} overflows {merged.dtype} in "
            f"{self.spec.name}, though all inputs are finite. Write dtype: float32 in "
            "the YAML"
        )

    def _merged(
        self, group: TensorGroup, parameters: dict[str, Any]
    ) -> tuple[torch.Tensor, bool]:
        return scaled_sums.merged_and_finite(
            inputs.base_of(group).tensor,
            [entry.tensor for entry in group.non_base],
            parameters["coefficients"] * parameters["lambda"],
        )

    def _require_weights(
        self, groups: Sequence[TensorGroup], weights: Sequence[torch.Tensor]
    ) -> None:
        """Refuse a merge in which all weights are 0; for one tensor, that is legal."""
        for group, weight in zip(groups, weights, strict=True):
            plan = self.watch.of(inputs.base_of(group).id)
            if plan and plan.largest_weight == 0 and not bool(weight.any()):
                raise ValueError(all_zero())

    def _warn_of_losses(self, base: Hashable) -> None:
        """Warn once, at the beginning, of weights that mergekit will not write."""
        plan = self.watch.of(base)
        names = plan.take_names() if plan and not plan.announcer.warned else None
        if plan and names:
            plan.unwritten, messages = inputs.not_written(base, names)
            for text in messages:
                plan.announcer.warn(text, text)

    def _sq_norms(
        self, groups: Sequence[TensorGroup], settings: Sequence[Settings]
    ) -> list[group_norms.Measured | None]:
        """n_t of each group's pool; None if norms do not matter."""
        measured = []
        for group, setting in zip(groups, settings, strict=True):
            measured.append(group_norms.of_group(group, setting))
            if setting.granularity == "layer" and measured[-1] is not None:
                inputs.require_same_layer(group)
        return measured

    def _announce(
        self,
        group: TensorGroup,
        settings: Settings,
        weight: torch.Tensor,
        measured: group_norms.Measured | None,
        weighed: group_norms.Weighed,
    ) -> None:
        """Log the coefficients, and warn of what makes them doubtful."""
        models = [entry.id for entry in group.non_base]
        base, where = inputs.base_of(group).id, settings.pool(group.metadata.name)
        announcer, plan = self._announcer(base), self.watch.of(base)
        sq_norms = measured.sq_norms if measured else None
        norms = None if sq_norms is None else sq_norms.detach().tolist()
        each = weighed.shares.detach().tolist()
        if not models or not bool((weight > 0).any()):
            return
        if not any(share > 0 for share in each):
            announcer.warn("unmoved", advice.nothing_moved(base, where))
            return
        if sq_norms is not None and settings.power < 0:
            rows = ((weight > 0) & (sq_norms == 0)).nonzero().flatten().tolist()
            unmoved = [models[k] for k in rows]
            warning = advice.left_out(base, unmoved, settings.power, where)
            announcer.warn("left out", warning)
        if measured and measured.whole and announcer.first_of("whole", tuple(models)):
            left, whole = plan.unwritten if plan else (), measured.whole
            texts = advice.whole_model(base, models, whole, settings.exclude, left)
            for text in texts:
                announcer.warn(text, text)
        announcer.coefficients(
            base,
            models,
            each,
            norms,
            where,
            settings=settings,
            scale=weighed.scale.item(),
            errors=None if weighed.errors is None else weighed.errors.tolist(),
            weight=weight.tolist(),
            varying=bool(plan and plan.parameters_vary),
            visible=self.from_files,
        )
        warning = advice.degenerate(
            base,
            models,
            each,
            weight.tolist(),
            where,
            sq_norms=norms,
            power=settings.power,
            whole=measured.whole if measured else None,
            exclude=settings.exclude,
            by_pool=settings.granularity != "model",
        )
        announcer.warn("degenerate", warning)

    def _announcer(self, base: Hashable) -> Announcer:
        plan = self.watch.of(base)
        return plan.announcer if plan else Announcer()


class InMemoryMerge(MetaGPTMerge):
    """The same method on tensors in memory: the groups of one call are the model."""

    from_files = False

    def __init__(self, method: MetaGPTMerge) -> None:
        self.method = method
        self.spec = method.spec
        self.watch = method.watch
        self._said_in_this_call = Announcer()

    def __call__(
        self, groups: Sequence[TensorGroup], /, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        return GroupMergeMethod.__call__(self, groups, **options)

    def _announcer(self, base: Hashable) -> Announcer:
        return self._said_in_this_call

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """Merge as the method does from files."""
        return self.method.merge_group(group, **parameters)

    def _require_weights(
        self, groups: Sequence[TensorGroup], weights: Sequence[torch.Tensor]
    ) -> None:
        some = [weight for weight in weights if len(weight)]
        if some and not any(bool(weight.any()) for weight in some):
            raise ValueError(all_zero())

    def _sq_norms(
        self, groups: Sequence[TensorGroup], settings: Sequence[Settings]
    ) -> list[group_norms.Measured | None]:
        from mergekit_metagpt.method.in_memory import of_call

        return of_call(groups, settings)
