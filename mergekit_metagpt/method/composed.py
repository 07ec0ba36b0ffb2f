"""Composed methods: a method of mergekit merges, with MetaGPT's coefficients."""

from __future__ import annotations

from typing import Any

import torch
from mergekit.merge_methods.base import (
    GroupMergeMethod,
    MergeMethodSpec,
    PerInputValues,
    TensorGroup,
)

from mergekit_metagpt.arithmetic import scaled_sums
from mergekit_metagpt.method.metagpt import REFERENCE_URL, MetaGPTMerge
from mergekit_metagpt.method.parameters import named, own_parameters

# mergekit's task-arithmetic family, each registered again as metagpt_NAME.
COMPOSED = (
    "ties",
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "della",
    "della_linear",
)
# These drop elements at random, one tensor after the other.
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


class ComposedMerge(MetaGPTMerge):
    """A method of mergekit whose `weight` is MetaGPT's lambda_t, summing to 1.

    n_t is measured on the unsparsified task vectors (MetaGPT, table 4). All parameters
    of the inner method but `weight` keep their names and defaults. `lambda: keep`
    restores the length of the plain sum, even if the inner method changes the sum.
    """

    def __init__(self, inner: GroupMergeMethod) -> None:
        self.inner = inner
        super().__init__()

    def _spec(self) -> MergeMethodSpec:
        replaced = "weight", "lambda"
        theirs = [
            named(p) for p in self.inner.spec.parameters if p.name not in replaced
        ]
        taken = {parameter.name for parameter in theirs}
        ours = own_parameters(self.watch.saw_value)
        inner = self.inner.spec
        return MergeMethodSpec(
            name=f"metagpt_{inner.name}",
            pretty_name=f"MetaGPT + {inner.pretty_name}",
            reference_url=REFERENCE_URL,
            parameters=(*(p for p in ours if p.name not in taken), *theirs),
            contract=inner.contract,
            optional_tensor_policy=inner.optional_tensor_policy,
            uses_accelerator=inner.uses_accelerator,
        )

    def _merged(
        self, group: TensorGroup, parameters: dict[str, Any]
    ) -> tuple[torch.Tensor, bool]:
        """Call the inner method with the coefficients as its weights."""
        lambdas = parameters["coefficients"].tolist()
        ids = [entry.id for entry in group.non_base]
        passed = {
            parameter.name: parameters[parameter.name]
            for parameter in self.inner.spec.parameters
            if parameter.name != "weight"
        }
        passed["lambda"] = float(parameters["lambda"])
        passed["weight"] = PerInputValues(list(zip(ids, lambdas, strict=True)))
        merged = self.inner.merge_group(group, **passed)
        return merged, scaled_sums.is_finite(merged)
