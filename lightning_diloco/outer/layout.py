"""Planning a layout from a module: what is synchronized, what is static, how tensors are merged, which fragment each is in.

Fragments are balanced: tensors by size, largest first, each into the smallest fragment so far. The largest fragment is then at
most 4/3 - 1/(3P) of the best possible (Graham's bound for this greedy rule), and with it the peak bandwidth. The vocabulary itself
(`Layout` and its parts) is in `lightning_diloco.outer.spec` and offered here too.

A tensor is merged by the plain mean, also under ``rda``, where averaging directions would be wrong or where the paper says so:
embeddings and what is tied to one, output heads by name, and tensors of fewer than two dimensions (gains and biases).

References:
    Decoupled DiLoCo, arXiv 2604.21428: balanced fragments; embeddings and output head averaged plainly. Dimensions below two and
    the list of head names are our choice.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer._dtypes import PARAMETER_DTYPES, STATIC_DTYPES, dtype_name
from lightning_diloco.outer.spec import Fragment, FragmentKind, Layout, MergeRule, TensorSlice, TensorSpec

__all__ = ["Fragment", "FragmentKind", "Layout", "MergeRule", "TensorSlice", "TensorSpec", "balanced_fragments", "plan_layout"]

RUNNING_STATISTICS = frozenset(("running_mean", "running_var"))
"""Persistent buffers of these names change in training and belong to the parameters: BatchNorm's, InstanceNorm's, and alike."""


def balanced_fragments(sizes: Sequence[int], num_fragments: int) -> list[list[int]]:
    """Assign tensors to fragments: largest first, each into the smallest fragment so far.

    Ties: of equal sizes the lower index goes first; of equally full fragments the one with fewer tensors, then the lower number.

    Args:
        sizes: elements of each tensor, in module order.
        num_fragments: fragments wanted, at least 1.

    Returns:
        min(num_fragments, len(sizes)) non-empty lists of indices into `sizes`, each ascending; together every index once.

    Raises:
        ConfigurationError: `num_fragments` is below 1 or a size is negative.
    """
    if num_fragments < 1 or any(size < 0 for size in sizes):
        raise ConfigurationError(f"num_fragments={num_fragments}, sizes={list(sizes)!r}: need at least one fragment, no negative size.")
    fragments: list[list[int]] = [[] for _ in range(min(num_fragments, len(sizes)))]
    heap = [(0, 0, i) for i in range(len(fragments))]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, count, i = heapq.heappop(heap)
        fragments[i].append(index)
        heapq.heappush(heap, (load + sizes[index], count + 1, i))
    return [sorted(indices) for indices in fragments]


def plan_layout(
    module: nn.Module, *, num_fragments: int, merge: MergeRule, mean_patterns: Sequence[str], include_frozen: bool = False
) -> Layout:
    """Plan the layout of a module's present parameters.

    Trainable parameters are cut into fragments; frozen parameters and persistent buffers are static state. A parameter without
    elements has nothing to synchronize and is static too. With `include_frozen`, floating-point frozen parameters are cut as well.
    Running statistics (`RUNNING_STATISTICS`) are the last fragment, of kind ``buffers``: they describe the parameters that they were
    measured with, so whoever takes the merged parameters needs the merged statistics.

    Args:
        module: the module, with every parameter materialized. Only metadata is read.
        num_fragments: fragments wanted; the plan has at most as many as there are tensors.
        merge: ``mean`` merges every tensor by the mean.
        mean_patterns: dotted parts of names that are merged by the mean under ``rda``.
        include_frozen: cut frozen parameters too.

    Raises:
        ConfigurationError: no parameter to synchronize; a lazy tensor; a trainable one that is complex, of an 8-bit float or not
            strided; two parameters that share memory without being the same parameter.
    """
    found = list(_collect(module))
    synchronized, static = _separate(found, include_frozen=include_frozen)
    if not synchronized:
        raise ConfigurationError(
            f"{type(module).__name__} has no trainable parameters: there is nothing to synchronize. Unfreeze some, or set include_frozen."
        )
    embeddings = _embedding_ids(module)
    slices = [
        _slice_of(entry, "mean" if merge == "mean" or _is_averaged(entry, embeddings, mean_patterns) else "rda") for entry in synchronized
    ]
    parts = balanced_fragments([part.length for part in slices], num_fragments)
    fragments = [Fragment(fragment_id=i, kind="parameters", slices=tuple(slices[j] for j in indices)) for i, indices in enumerate(parts)]
    statistics = [entry for entry in static if _is_running_statistic(entry)]
    if statistics:
        buffers = tuple(_slice_of(entry, "mean") for entry in statistics)
        fragments.append(Fragment(fragment_id=len(fragments), kind="buffers", slices=buffers))
        static = [entry for entry in static if not _is_running_statistic(entry)]
    return Layout(
        fragments=tuple(fragments),
        static=tuple(
            TensorSpec(
                name=entry.names[0],
                dtype=dtype_name(entry.tensor.dtype),
                shape=tuple(entry.tensor.shape),
                kind="parameter" if entry.is_parameter else "buffer",
            )
            for entry in static
        ),
    )


@dataclass(slots=True)
class _Found:
    """A distinct tensor of the module and all its names, in module order."""

    tensor: Tensor
    is_parameter: bool
    names: list[str] = field(default_factory=list)


def _collect(module: nn.Module) -> Iterator[_Found]:
    found: dict[int, _Found] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), _Found(parameter, True)).names.append(name)
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, buffer in owner.named_buffers(recurse=False):
            if leaf not in owner._non_persistent_buffers_set:
                name = f"{prefix}.{leaf}" if prefix else leaf
                found.setdefault(id(buffer), _Found(buffer, False)).names.append(name)
    for entry in found.values():
        _check_tensor(entry.tensor, entry.names[0])
        yield entry


def _slice_of(entry: _Found, merge: MergeRule) -> TensorSlice:
    return TensorSlice(
        name=entry.names[0],
        dtype=dtype_name(entry.tensor.dtype),
        global_shape=tuple(entry.tensor.shape),
        offset=0,
        length=entry.tensor.numel(),
        tied_names=tuple(entry.names[1:]),
        merge=merge,
    )


def _is_running_statistic(entry: _Found) -> bool:
    is_float = dtype_name(entry.tensor.dtype) in PARAMETER_DTYPES
    return not entry.is_parameter and is_float and entry.tensor.numel() > 0 and entry.names[0].rpartition(".")[2] in RUNNING_STATISTICS


def _check_tensor(tensor: Tensor, name: str) -> None:
    if is_lazy(tensor):
        raise ConfigurationError(f"{name!r} is lazy and has no shape yet: run one batch through the module before training it.")
    table, rule = (PARAMETER_DTYPES, "a trainable tensor") if tensor.requires_grad else (STATIC_DTYPES, "a static tensor")
    if tensor.layout is not torch.strided or dtype_name(tensor.dtype) not in table:
        raise ConfigurationError(
            f"{name!r} is {tensor.dtype} ({tensor.layout}): {rule} must be strided and one of {', '.join(table)}. Convert or freeze it."
        )


def _separate(found: Sequence[_Found], *, include_frozen: bool) -> tuple[list[_Found], list[_Found]]:
    synchronized: list[_Found] = []
    static: list[_Found] = []
    by_address: dict[int, str] = {}
    for entry in found:
        tensor = entry.tensor
        frozen_too = include_frozen and entry.is_parameter and dtype_name(tensor.dtype) in PARAMETER_DTYPES
        if not tensor.numel() or not (tensor.requires_grad or frozen_too):
            static.append(entry)
            continue
        # The meta device has no addresses: every tensor there is at 0.
        other = by_address.setdefault(tensor.data_ptr(), entry.names[0]) if tensor.data_ptr() else entry.names[0]
        if other != entry.names[0]:
            raise ConfigurationError(
                f"{other!r} and {entry.names[0]!r} share memory but are different parameters, so each merge would be added twice: "
                "tie them by assigning the same nn.Parameter to both names."
            )
        synchronized.append(entry)
    return synchronized, static


def _embedding_ids(module: nn.Module) -> frozenset[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return frozenset(id(m._parameters.get("weight")) for m in module.modules() if isinstance(m, kinds))


def _is_averaged(entry: _Found, embeddings: frozenset[int], mean_patterns: Sequence[str]) -> bool:
    if entry.tensor.dim() < 2 or id(entry.tensor) in embeddings:
        return True
    return any(f".{pattern}." in f".{name}." for pattern in mean_patterns for name in entry.names)
