"""The result of a scan: squared norms and inner products, pooled on request."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mergekit_metagpt.arithmetic import standard_errors
from mergekit_metagpt.arithmetic.closed_form import cosines
from mergekit_metagpt.arithmetic.standard_errors import Covariances
from mergekit_metagpt.checkpoints.stored import layer_key
from mergekit_metagpt.scanning.pools import is_excluded, pool_key


@dataclass(frozen=True)
class Pooled:
    """Squared norms (and Gram matrices) of G pools of tensors.

    Attributes:
        keys: names of the pools.
        sq_norms: shape `(K,)` under `model`, else `(G, K)`, float64.
        gram: shape `(K, K)` under `model`, else `(G, K, K)`, float64, or None.
        base_sq_norms: ||theta_0||^2 over what each model shares, shape of `sq_norms`.
        embeddings: the part of `sq_norms` from embeddings and heads, same shape.
        members: names of the tensors of each pool, sorted.
        granularity: `model`, `layer` or `tensor`.
        covariances: of the sums, if they are estimated from a sample.
    """

    keys: tuple[str, ...]
    sq_norms: torch.Tensor
    gram: torch.Tensor | None
    base_sq_norms: torch.Tensor
    embeddings: torch.Tensor
    members: Mapping[str, tuple[str, ...]]
    granularity: str
    covariances: Covariances | None = None

    @functools.cached_property
    def rows(self) -> Mapping[str, int]:
        """The row of each pool."""
        return {key: row for row, key in enumerate(self.keys)}

    def key_of(self, name: str) -> str:
        """Return the pool of a tensor, by the name under which it counts."""
        return pool_key(name, self.granularity)

    def of_models(self, keys: Sequence[str], models: Sequence[int]) -> torch.Tensor:
        """Return ||tau_t||^2 in one pool, shape `(k,)`; arguments as for `products`."""
        by_pool = self.sq_norms.reshape(-1, self.sq_norms.shape[-1])
        zero = by_pool.new_zeros(())
        return torch.stack(
            [
                by_pool[self.rows[key], column] if self.members.get(key) else zero
                for key, column in zip(keys, models, strict=True)
            ]
        )

    def products(self, keys: Sequence[str], models: Sequence[int]) -> torch.Tensor:
        """Return inner products in one pool, whose name may differ between models.

        Args:
            keys: the pool's name in each of `k` models.
            models: their rows and columns in `gram`, which must not be None.

        Returns:
            shape `(k, k)`, float64; 0 where two names differ or nothing counts.
        """
        assert self.gram is not None
        by_pool = self.gram.reshape(-1, *self.gram.shape[-2:])
        products = self.gram.new_zeros(len(keys), len(keys))
        for i, (key, row) in enumerate(zip(keys, models, strict=True)):
            for j, (other, column) in enumerate(zip(keys, models, strict=True)):
                if key == other and self.members.get(key):
                    products[i, j] = by_pool[self.rows[key], row, column]
        return products

    @property
    def cosines(self) -> torch.Tensor | None:
        """Cosines between task vectors, shape of `gram`, or None; see `closed_form`."""
        return None if self.gram is None else cosines(self.gram)

    @property
    def norm_errors(self) -> torch.Tensor | None:
        """Standard errors of ||tau_t||, shape of `sq_norms`; None if exact."""
        if self.covariances is None:
            return None
        return standard_errors.of_norms(self.sq_norms, self.covariances)

    @property
    def sq_norm_errors(self) -> torch.Tensor | None:
        """Standard errors of `sq_norms`, same shape; None if exact."""
        if self.covariances is None:
            return None
        return standard_errors.of_sq_norms(self.covariances)

    @property
    def relative_norm_errors(self) -> torch.Tensor | None:
        """Standard errors of ||tau_t|| / ||theta_0||, same shape; None if exact."""
        if self.covariances is None:
            return None
        return standard_errors.of_relative_norms(
            self.sq_norms, self.base_sq_norms, self.covariances
        )

    @property
    def cosine_errors(self) -> torch.Tensor | None:
        """Standard errors of the cosines of a whole model; None if exact."""
        if self.covariances is None or self.gram is None:
            return None
        return standard_errors.of_cosines(self.gram, self.covariances)


@dataclass(frozen=True)
class Sampled:
    """The sample from which norms were estimated.

    Attributes:
        share: share of each large tensor that was read.
        seed: of the random positions.
        bytes_read: bytes read, of base and models.
        bytes_stored: bytes that an exact scan would read.
        covariances: of the estimates, by tensor.
    """

    share: float
    seed: int
    bytes_read: int
    bytes_stored: int
    covariances: Covariances


@dataclass(frozen=True, eq=False)
class ScanResult:
    """What a scan of a base and its fine-tunes measured, by tensor group.

    Attributes:
        base: the base, as given.
        models: the K fine-tunes, as given.
        names: output names of the N counted tensors, sorted.
        sq_norms: ||tau_t||^2 by tensor, shape `(N, K)`, float64; 0 where a model
            does not share the tensor.
        base_sq_norms: ||theta_0||^2 of what each model shares, shape `(N, K)`, float64.
        counted_as: for each model, the name under which each tensor counts that it
            shares with the base: the tensor's own name, or a tied head's embedding.
        layers: for each model, the layer under which a layer of another name counts,
            where tensors were renamed.
        gram: <tau_s, tau_t> by tensor, shape `(N, K, K)`, float64, or None.
        vocabulary: names of the base's tensors with an entry for each token.
        sampled: the sample, if the norms are estimates.
    """

    base: str
    models: tuple[str, ...]
    names: tuple[str, ...]
    sq_norms: torch.Tensor
    base_sq_norms: torch.Tensor
    counted_as: tuple[Mapping[str, str], ...]
    layers: tuple[Mapping[str, str], ...]
    gram: torch.Tensor | None = None
    vocabulary: frozenset[str] = frozenset()
    sampled: Sampled | None = None
    _pools: dict[tuple[str, tuple[str, ...]], Pooled] = field(
        default_factory=dict, init=False, repr=False
    )

    def select(self, rows: Sequence[int]) -> ScanResult:
        """Return the result for some of the models.

        Args:
            rows: indices of these models, in any order.

        Returns:
            a result of `len(rows)` models, over the tensors that any of them shares.
        """
        own = [set(self.counted_as[k].values()) for k in rows]
        kept = [n for n, name in enumerate(self.names) if any(name in o for o in own)]
        models = torch.tensor(rows, dtype=torch.long, device="cpu")
        tensors = torch.tensor(kept, dtype=torch.long, device="cpu")
        gram, sampled = self.gram, self.sampled
        if sampled is not None:
            covariances = sampled.covariances.each(
                lambda of_models: of_models[tensors][:, models],
                lambda of_pairs: of_pairs[tensors][:, models][:, :, models],
            )
            sampled = replace(sampled, covariances=covariances)
        return replace(
            self,
            models=tuple(self.models[k] for k in rows),
            names=tuple(self.names[n] for n in kept),
            sq_norms=self.sq_norms[tensors][:, models],
            base_sq_norms=self.base_sq_norms[tensors][:, models],
            counted_as=tuple(self.counted_as[k] for k in rows),
            layers=tuple(self.layers[k] for k in rows),
            gram=None if gram is None else gram[tensors][:, models][:, :, models],
            sampled=sampled,
        )

    @staticmethod
    def joined(results: Sequence[ScanResult]) -> ScanResult:
        """Join results with the same base; Gram matrices are dropped.

        Args:
            results: at least one.

        Returns:
            a result of all their models, in order.
        """
        names = sorted({name for result in results for name in result.names})
        row = {name: at for at, name in enumerate(names)}
        count = sum(len(result.models) for result in results)
        sums = torch.zeros(2, len(names), count, dtype=torch.float64, device="cpu")
        first = 0
        for result in results:
            rows = [row[name] for name in result.names]
            columns = slice(first, first + len(result.models))
            sums[0, rows, columns] = result.sq_norms
            sums[1, rows, columns] = result.base_sq_norms
            first += len(result.models)
        return ScanResult(
            base=results[0].base,
            models=tuple(model for result in results for model in result.models),
            names=tuple(names),
            sq_norms=sums[0],
            base_sq_norms=sums[1],
            counted_as=tuple(c for result in results for c in result.counted_as),
            layers=tuple(layers for result in results for layers in result.layers),
        )

    def layer_of(self, name: str, model: int) -> str:
        """Return the pool of one model's tensor under `granularity: layer`."""
        if name in self.counted_as[model]:
            return layer_key(self.counted_as[model][name])
        return self.layers[model].get(layer_key(name), layer_key(name))

    def pool(self, granularity: str = "model", exclude: Sequence[str] = ()) -> Pooled:
        """Sum over the tensors of each pool, in name order.

        Args:
            granularity: `model`, `layer` or `tensor`.
            exclude: substrings; tensors whose name contains one do not count.

        Returns:
            the sums, see `Pooled`; kept for the next call, so do not change them.

        Raises:
            ValueError: unknown granularity.
        """
        request = granularity, tuple(exclude)
        if request not in self._pools:
            self._pools[request] = self._pooled(*request)
        return self._pools[request]

    def _pooled(self, granularity: str, exclude: tuple[str, ...]) -> Pooled:
        pools: dict[str, list[int]] = {}
        if granularity == "model":
            pools["model"] = []
        for row, name in enumerate(self.names):
            key = pool_key(name, granularity)
            if not is_excluded(name, exclude):
                pools.setdefault(key, []).append(row)
        heads = torch.tensor([n in self.vocabulary for n in self.names], device="cpu")

        def summed(values: torch.Tensor) -> torch.Tensor:
            sums = values.new_zeros(len(pools), *values.shape[1:])
            for at, rows in enumerate(pools.values()):
                for row in rows:
                    sums[at] += values[row]
            return sums[0] if granularity == "model" else sums

        return Pooled(
            keys=tuple(pools),
            sq_norms=summed(self.sq_norms),
            gram=None if self.gram is None else summed(self.gram),
            base_sq_norms=summed(self.base_sq_norms),
            embeddings=summed(self.sq_norms * heads[:, None]),
            granularity=granularity,
            covariances=None
            if self.sampled is None
            else self.sampled.covariances.each(summed, summed),
            members={
                key: tuple(self.names[row] for row in rows)
                for key, rows in pools.items()
            },
        )
