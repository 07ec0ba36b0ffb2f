"""Measures LoRA adapters from their factors, exactly, without a merged copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from mergekit_metagpt.arithmetic import low_rank, squared_norms
from mergekit_metagpt.checkpoints.adapters import is_transposed
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import sources, stored_as
from mergekit_metagpt.checkpoints.pairs import SharedTensor
from mergekit_metagpt.checkpoints.stored import (
    ConvertedTensor,
    Factors,
    StoredTensor,
    layer_key,
    not_finite,
)
from mergekit_metagpt.scanning.pieces import Files
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.threads import run

# See `Crossing.of`.
Products = Callable[[torch.Tensor, Sequence[torch.Tensor], slice], torch.Tensor]


@dataclass(frozen=True)
class Term:
    """What one adapter adds to one weight.

    Attributes:
        model: number of the adapter.
        owner: the adapter.
        name: of the weight, as the adapter has it.
        factors: of the product.
    """

    model: int
    owner: Checkpoint
    name: str
    factors: Factors

    @property
    def bytes(self) -> int:
        """Stored bytes of both factors."""
        pair = (self.factors.down, self.factors.up)
        return sum(factor.numel * factor.dtype.itemsize for factor in pair)

    def matrices(
        self, files: Files, *, transposed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the factors of s B A, or of its transpose, in float64.

        Shapes `(E, m, r)` and `(E, r, n)`; the first holds the scale. `transposed` is
        relative to `Factors.sides`.
        """
        factors = self.factors
        down, up = (self._read(files, side) for side in (factors.down, factors.up))
        count = factors.experts
        right = down.reshape(count, factors.rank, down.shape[1])
        left = up.reshape(up.shape[0], factors.rank, count).permute(2, 0, 1)
        left = left * factors.scale
        if factors.embedding != transposed:
            return right.mT, left.mT
        return left, right

    def _read(self, files: Files, stored: StoredTensor) -> torch.Tensor:
        alone = SharedTensor(stored.name, stored, stored, stored.shape)
        values = files.source(alone, stored).all(stored.numel).double()
        return values.reshape(stored.shape)


def terms_of(
    adapters: Sequence[Checkpoint], counted_as: Mapping[str, str] | None
) -> dict[str, list[Term]]:
    """Sort what adapters add by the weight that it is added to.

    `counted_as` has, for the names of their base, those under which they count; it is
    None without a base. To a tied weight, several terms are added. Raises a ValueError
    if two adapters mean one weight by names that only a base can match.
    """
    terms: dict[str, list[Term]] = {}
    for number, model in enumerate(adapters):
        assert model.adapter is not None
        for name, factors in model.adapter.factors.items():
            counted = name if counted_as is None else counted_as.get(name, name)
            term = Term(number, model, name, factors)
            terms.setdefault(counted, []).append(term)
    _check_experts(terms)
    if counted_as is None:
        _check_ties(terms)
        _check_prefixes(adapters)
    for name, found in terms.items():
        first = found[0]
        for other in found[1:]:
            if _shape(other) != _shape(first):
                raise ValueError(
                    f"{other.owner.label} adapts {name} as {_shape(other)}, "
                    f"{first.owner.label} as {_shape(first)}. Do they have one base?"
                )
    return terms


def _shape(term: Term) -> list[int]:
    count = term.factors.experts
    return [*([count] if count > 1 else []), *term.factors.sides]


def _check_experts(terms: Mapping[str, Sequence[Term]]) -> None:
    """Refuse experts that one adapter adapts as a stack, another one by one."""
    every = [term for found in terms.values() for term in found]
    stacks = {layer_key(term.name): term for term in every if _is_stack(term)}
    for name, (term, *_) in terms.items():
        stack = stacks.get(layer_key(term.name))
        if stack is not None and not _is_stack(term) and ".experts." in term.name:
            raise ValueError(
                f"{term.owner.label} adapts {name}, {stack.owner.label} the experts as "
                "one stack: how these overlap is not known. Give --lora-merge-cache "
                "FOLDER and merge them with mergekit, or leave one of them out"
            )


def _is_stack(term: Term) -> bool:
    return term.factors.experts > 1


def _check_ties(terms: Mapping[str, Sequence[Term]]) -> None:
    """Refuse embeddings and a head that may be one weight."""
    every = [term for found in terms.values() for term in found]
    embeddings = [term for term in every if term.factors.embedding]
    for term in every:
        if term.factors.embedding or layer_key(term.name) != term.name:
            continue
        for other in embeddings:
            if _shape(term) == _shape(other):
                raise ValueError(
                    f"{other.owner.label} adapts {other.name}, and {term.owner.label} "
                    f"adapts {term.name}: whether the two are one weight, only the "
                    "base tells. Give --base BASE"
                )


def _check_prefixes(adapters: Sequence[Checkpoint]) -> None:
    """Refuse adapters that name the same layers differently."""
    names = [{*model.adapter.factors} for model in adapters if model.adapter]
    for at, (model, own) in enumerate(zip(adapters, names, strict=True)):
        for other, theirs in zip(adapters[:at], names[:at], strict=True):
            ends = {_after_number(name) for name in own}
            shared = ends.intersection(map(_after_number, theirs))
            if own.isdisjoint(theirs) and shared:
                raise ValueError(
                    f"{model.label} and {other.label} adapt layers of other names, "
                    f"such as {min(own)} and {min(theirs)}: whether they are the same, "
                    "only the base tells. Give --base BASE"
                )


def _after_number(name: str) -> str:
    parts = name.split(".")
    first = next((n for n, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[first:])


def scan_adapters(
    base: Checkpoint,
    adapters: Sequence[Checkpoint],
    own: ScanResult | None,
    *,
    workers: int | None = None,
) -> ScanResult:
    """Measure adapters from their factors: ||s B A||^2 and <s_1 B_1 A_1, s_2 B_2 A_2>.

    `own` is the base measured against itself, for its tensors and their norms; without
    it, the norms of the base are 0 in the result. Raises a ValueError if adapters do
    not fit each other or the base, or hold NaN; an OSError if a file cannot be read.
    """
    counted = None if own is None else own.counted_as[0]
    terms, count = terms_of(adapters, counted), len(adapters)
    names = sorted({*terms, *(own.names if own else ())})
    row = {name: at for at, name in enumerate(names)}
    gram = torch.zeros(len(names), count, count, dtype=torch.float64, device="cpu")
    with Files(adapters, workers) as files:
        if own is not None:
            _check_copies(base, terms, files)
        tasks = [
            (sum(t.bytes for t in found), functools.partial(_gram, found, files, count))
            for found in terms.values()
        ]
        for name, products in zip(terms, run(tasks, files.threads), strict=True):
            gram[row[name]] = products
    base_sq_norms = gram.new_zeros(len(names), count)
    if own is None:
        counted_as: tuple[Mapping[str, str], ...] = tuple(
            {n: n for n in model.adapter.factors} for model in adapters if model.adapter
        )
    else:
        base_sq_norms[[row[name] for name in own.names]] = own.base_sq_norms
        counted_as = (own.counted_as[0],) * count
    result = ScanResult(
        base=base.label,
        models=tuple(model.label for model in adapters),
        names=tuple(names),
        sq_norms=gram.diagonal(dim1=1, dim2=2).clone(),
        base_sq_norms=base_sq_norms,
        counted_as=counted_as,
        layers=(own.layers if own else ({},)) * count,
        gram=gram,
    )
    return result if own is None else _with_stacks(base, terms, result)


def _gram(terms: Sequence[Term], files: Files, count: int) -> torch.Tensor:
    """Gram matrix of all adapters on one weight."""
    lefts, rights = zip(*(term.matrices(files) for term in terms), strict=True)
    of_terms = low_rank.gram_of_products(lefts, rights)
    if not bool(torch.isfinite(of_terms).all()):
        _require_finite(terms, files)
        first = terms[0]
        raise ValueError(squared_norms.too_far(f"{first.name} of {first.owner.label}"))
    owners = torch.tensor([term.model for term in terms], device="cpu")
    gram = of_terms.new_zeros(count, count)
    return gram.index_put_(
        (owners[:, None], owners[None, :]), of_terms, accumulate=True
    )


def _require_finite(terms: Sequence[Term], files: Files) -> None:
    for term in terms:
        for stored in (term.factors.down, term.factors.up):
            if not bool(torch.isfinite(files.readers.read(stored)).all()):
                raise not_finite(term.owner.label, stored)


def _with_stacks(
    base: Checkpoint, terms: Mapping[str, Sequence[Term]], result: ScanResult
) -> ScanResult:
    """Let the experts that a base stores one by one count as the stack that is adapted.

    Their part of the base's norm moves to the stack.
    """
    row = {name: at for at, name in enumerate(result.names)}
    base_sq_norms = result.base_sq_norms.clone()
    counted_as = [dict(names) for names in result.counted_as]
    for name, found in terms.items():
        stored = stored_as(base, name)
        if not isinstance(stored, ConvertedTensor):
            continue
        own = {tensor: n for n, tensor in base.tensors.items()}
        single = {own[source] for source in sources(stored)}
        rows = [row[n] for n in sorted(single)]
        for model in {term.model for term in found}:
            base_sq_norms[row[name], model] = base_sq_norms[rows, model].sum()
            base_sq_norms[rows, model] = 0
            names = counted_as[model]
            names.update({n: name for n, at in names.items() if at in single})
            names[name] = name
    return replace(result, base_sq_norms=base_sq_norms, counted_as=tuple(counted_as))


def _check_copies(
    base: Checkpoint, terms: Mapping[str, Sequence[Term]], files: Files
) -> None:
    """Refuse an adapter whose copy of the base's weight is not the base's."""
    for found in terms.values():
        for term in found:
            stored, copy = stored_as(base, term.name), term.factors.copy
            if copy is None or stored is None:
                continue
            ours, theirs = files.readers.read(stored), files.readers.read(copy)
            if ours.shape != theirs.shape or squared_norms.sq_norms(ours, [theirs])[0]:
                raise ValueError(
                    f"{term.owner.label} stores its own {copy.name}, which is not that "
                    f"of {base.label}: its factors alone do not tell how far it moved. "
                    "Give --lora-merge-cache FOLDER to measure a merged copy"
                )


@dataclass
class Crossing:
    """Inner products of full fine-tunes and adapters, summed while the former are read.

    <tau, s B A> = sum_i tau[i] (s B A)[i], piece by piece: the product is formed for
    one piece at a time, in float64.

    Attributes:
        base: the base.
        adapters: A adapters of it.
        found: what was summed, by tensor and number of the fine-tune, shape `(A,)`.
    """

    base: Checkpoint
    adapters: Sequence[Checkpoint]
    found: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    _terms: dict[str, list[tuple[Term, bool]]] = field(default_factory=dict)

    def begin(self, counted_as: Mapping[str, str]) -> None:
        """Sort the adapters' terms by the names under which the base's tensors count.

        Raises a ValueError if nobody knows which way round a square weight is stored.
        """
        for name, found in terms_of(self.adapters, counted_as).items():
            self._terms[name] = [
                (term, is_transposed(self.base, term.name, term.factors))
                for term in found
            ]

    def of(self, name: str, columns: int, files: Files) -> Products | None:
        """Read the factors of a tensor whose flattened overlap has rows of `columns`.

        Returns a function of a piece of theta_0, of those of K fine-tunes, and of the
        elements that these are: <tau_t, s B A>, shape `(K, A)`, float64. None where no
        adapter adds anything.
        """
        if name not in self._terms:
            return None
        matrices = [
            (term.model, term.matrices(files, transposed=transposed))
            for term, transposed in self._terms[name]
        ]

        def products(
            base: torch.Tensor, tuned: Sequence[torch.Tensor], piece: slice
        ) -> torch.Tensor:
            shape = len(self.adapters), base.numel()
            added = torch.zeros(shape, dtype=torch.float64, device="cpu")
            for model, (left, right) in matrices:
                added[model] += low_rank.piece_of_product(left, right, columns, piece)
            return squared_norms.products_with(base, tuned, added)

        return products

    def add_stacks(self, models: Sequence[Checkpoint], files: Files) -> None:
        """Sum over the stacks of experts that base and fine-tunes store one by one."""
        for name in self._terms:
            stored = stored_as(self.base, name)
            if not isinstance(stored, ConvertedTensor):
                continue
            columns = stored.shape[-1]
            added = self.of(name, columns, files)
            assert added is not None
            base = files.readers.read(stored).reshape(-1)
            for member, model in enumerate(models):
                own = stored_as(model, name)
                if own is None or own.shape != stored.shape:
                    continue  # of a model that lacks these experts
                tuned = files.readers.read(own).reshape(-1)
                for start in range(0, base.numel(), columns << 8):
                    piece = slice(start, min(start + (columns << 8), base.numel()))
                    found = added(base[piece], [tuned[piece]], piece)
                    self.add(name, [member], found)

    def add(self, name: str, members: Sequence[int], sums: torch.Tensor) -> None:
        """Add sums over a part of a tensor for k fine-tunes, shape `(k, A)`."""
        for member, row in zip(members, sums, strict=True):
            known = self.found.get((name, member))
            self.found[name, member] = row if known is None else known + row


def joined(
    full: ScanResult | None,
    of_adapters: ScanResult,
    found: Mapping[tuple[str, int], torch.Tensor],
    order: Sequence[int],
    *,
    gram: bool,
) -> ScanResult:
    """Put fine-tunes, if any, and adapters of one base together.

    `found` are their inner products, from a `Crossing`. `order` is, for each model of
    the result, its place among first fine-tunes, then adapters. With `gram`, results
    and answer have inner products.
    """
    parts = [of_adapters] if full is None else [full, of_adapters]
    result = ScanResult.joined(parts)
    if gram:
        row = {name: at for at, name in enumerate(result.names)}
        count = len(result.models)
        products = result.sq_norms.new_zeros(len(row), count, count)
        first = 0
        for part in parts:
            assert part.gram is not None
            rows = torch.tensor([row[name] for name in part.names], device="cpu")
            last = first + len(part.models)
            products[rows, first:last, first:last] = part.gram
            first = last
        start = count - len(of_adapters.models)
        for (name, member), values in found.items():
            if member >= start:
                continue  # of the base, where it was measured against itself
            products[row[name], member, start:] = values
            products[row[name], start:, member] = values
        result = replace(result, gram=products)
    return result.select(order)
