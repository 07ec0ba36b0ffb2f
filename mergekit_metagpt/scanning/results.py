"""What a scan found, frozen: squared norms and Gram matrices, pooled on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_metagpt.checkpoints.stored import layer_key
from mergekit_metagpt.scanning.pools import is_excluded, pool_key


@dataclass(frozen=True, eq=False)
class PairNorms:
    """Squared norms of one task vector, model minus base, tensor by tensor.

    Attributes:
        sq_norms: ||tau||^2 of each counted tensor by output name, in name order.
        counted_as: for every output name that the pair shares, the name under which
            it counts: its own, except for a tied head.
        layers: for the layers of renamed tensors, the layer under which they count.
    """

    sq_norms: Mapping[str, float]
    counted_as: Mapping[str, str]
    layers: Mapping[str, str]

    def layer_of(self, name: str) -> str:
        """Return the pool of an output name under `granularity: layer`."""
        if name in self.counted_as:
            return layer_key(self.counted_as[name])
        return self.layers.get(layer_key(name), layer_key(name))


@dataclass(frozen=True, eq=False)
class Details:
    """What else a detailed scan of K models finds, by output name of counted tensors.

    Attributes:
        count: K.
        gram: <tau_s, tau_t>, shape `(K, K)`, float64; 0 where a model does not share
            the tensor.
        base_sq_norms: ||theta_0||^2 of what each model shares of it, shape `(K,)`.
        rounding: squared norm of what rounding to the coarser of the two stored
            precisions takes from base and model, shape `(K,)`, float64; 0 where the
            precisions agree.
    """

    count: int
    gram: dict[str, torch.Tensor]
    base_sq_norms: dict[str, torch.Tensor]
    rounding: dict[str, torch.Tensor]

    @classmethod
    def empty(cls, count: int) -> Details:
        """Return details of nothing, to be filled by the scan."""
        return cls(count, {}, {}, {})


@dataclass(frozen=True)
class Pooled:
    """Squared norms (and Gram matrices) of pools of tensors.

    Attributes:
        keys: name of each pool, `G` of them.
        sq_norms: shape `(K,)` under `model`, else `(G, K)`, float64.
        gram: shape `(K, K)` under `model`, else `(G, K, K)`, float64, or None.
        base_sq_norms: ||theta_0||^2 of what each model shares, shape of `sq_norms`, or
            None.
        rounding: shape of `sq_norms`, or None.
    """

    keys: tuple[str, ...]
    sq_norms: torch.Tensor
    gram: torch.Tensor | None = None
    base_sq_norms: torch.Tensor | None = None
    rounding: torch.Tensor | None = None


@dataclass(frozen=True)
class ScanResult:
    """What one scan of a base and its fine-tunes found, per tensor group.

    Attributes:
        base: the base, as given.
        models: the K fine-tunes, as given.
        names: output names of the N counted tensors, sorted.
        sq_norms: ||tau_t||^2 per tensor, shape `(N, K)`, float64; 0 where a model
            does not share the tensor.
        gram: <tau_s, tau_t> per tensor, shape `(N, K, K)`, float64, or None.
        base_sq_norms: ||theta_0||^2 of what each model shares, shape `(N, K)`, float64,
            or None.
        rounding: squared norm of what rounding to the coarser of two stored precisions
            takes away, shape `(N, K)`, float64, or None.
    """

    base: str
    models: tuple[str, ...]
    names: tuple[str, ...]
    sq_norms: torch.Tensor
    gram: torch.Tensor | None = None
    base_sq_norms: torch.Tensor | None = None
    rounding: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        base: str,
        models: Sequence[str],
        pairs: Sequence[PairNorms],
        details: Details | None = None,
    ) -> ScanResult:
        """Arrange what was found for each pair in tensors.

        Args:
            base: the base, as given.
            models: the K fine-tunes, as given.
            pairs: the squared norms of each.
            details: of the same scan.

        Returns:
            the result.
        """
        names = sorted({name for norms in pairs for name in norms.sq_norms})
        rows = [[norms.sq_norms.get(name, 0.0) for norms in pairs] for name in names]

        def stacked(values: Mapping[str, Any] | None) -> torch.Tensor | None:
            if values is None:
                return None
            found = [torch.as_tensor(values[name], device="cpu") for name in names]
            return torch.stack(found).double()

        return cls(
            base=base,
            models=tuple(models),
            names=tuple(names),
            sq_norms=torch.tensor(rows, dtype=torch.float64, device="cpu"),
            gram=stacked(details.gram if details else None),
            base_sq_norms=stacked(details.base_sq_norms if details else None),
            rounding=stacked(details.rounding if details else None),
        )

    def pool(self, granularity: str = "model", exclude: Sequence[str] = ()) -> Pooled:
        """Sum over the tensors of each pool, in name order.

        Args:
            granularity: `model`, `layer` or `tensor`.
            exclude: substrings; tensors whose name contains one do not count.

        Returns:
            the sums, see `Pooled`.

        Raises:
            ValueError: unknown granularity.
        """
        pools: dict[str, list[int]] = {}
        if granularity == "model":
            pools["model"] = []
        for row, name in enumerate(self.names):
            if not is_excluded(name, exclude):
                pools.setdefault(pool_key(name, granularity), []).append(row)

        def summed(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            sums = values.new_zeros(len(pools), *values.shape[1:])
            for at, rows in enumerate(pools.values()):
                for row in rows:
                    sums[at] += values[row]
            return sums[0] if granularity == "model" else sums

        sq_norms = summed(self.sq_norms)
        assert sq_norms is not None
        return Pooled(
            keys=tuple(pools),
            sq_norms=sq_norms,
            gram=summed(self.gram),
            base_sq_norms=summed(self.base_sq_norms),
            rounding=summed(self.rounding),
        )
