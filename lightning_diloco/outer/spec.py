"""The vocabulary of the layout: which tensors are synchronized, in which order, in which fragment, and how each is merged.

A layout is data. It is planned once from a module (`lightning_diloco.outer.layout`), travels in the join handshake, and its
fingerprint decides whether two programs train the same model. Everything else in `outer` works on *flat fragments*: one float32
vector that holds the fragment's slices one after the other, each in row-major order.

Invariants, checked on construction: fragments are numbered from 0 and not empty; the slices of a fragment tile each of its tensors
completely, in ascending order, inside that fragment; every name occurs once. A slice carries (name, offset, length, global shape)
although one device always holds whole tensors: the fingerprint must not change when islands with sharded parameters come.

The bytes are canonical JSON: one layout has exactly one encoding, and other bytes that mean the same are refused, so that the
fingerprint of what was received is the fingerprint of what was sent.

References:
    Decoupled DiLoCo, arXiv 2604.21428: fragments. The granularity of the merge (per tensor) is our choice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer._dtypes import PARAMETER_DTYPES, STATIC_DTYPES
from lightning_diloco.shallow_json import read_shallow_json

__all__ = ["Fragment", "FragmentKind", "Layout", "MergeRule", "StaticKind", "TensorSlice", "TensorSpec"]

FragmentKind = Literal["parameters", "buffers"]
StaticKind = Literal["parameter", "buffer"]
MergeRule = Literal["rda", "mean"]

_SCHEMA = 1
_MAX_ELEMENTS = 1 << 40
"""Elements of one tensor: far above any model, low enough that sums of them stay exact integers everywhere."""
_MAX_DIMS = 64
_MAX_NAME_CHARS = 1024


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_CHARS or not name.isprintable():
        raise ConfigurationError(f"{what} {name!r}: must be a printable string of 1 to {_MAX_NAME_CHARS} characters.")


def _check_shape(shape: object, name: str) -> int:
    """Elements of a shape, after every check on it."""
    good = isinstance(shape, tuple) and len(shape) <= _MAX_DIMS and all(type(n) is int and 0 <= n <= _MAX_ELEMENTS for n in shape)
    numel = math.prod(cast("tuple[int, ...]", shape)) if good else -1
    if not 0 <= numel <= _MAX_ELEMENTS:
        raise ConfigurationError(f"Shape {shape!r} of {name!r}: must be at most {_MAX_DIMS} whole numbers with a product of at most 2^40.")
    return numel


def _check_choice(value: object, choices: tuple[str, ...], what: str) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigurationError(f"{what} {value!r}: must be one of {', '.join(choices)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """A run of a tensor's elements inside a flat fragment.

    Raises:
        ConfigurationError: a field breaks its rule; the sentence names value and rule.
    """

    name: str
    """The tensor's first name in module order."""
    dtype: str
    """How the module stores it: "float32", "float64", "bfloat16" or "float16"."""
    global_shape: tuple[int, ...]
    """Shape of the whole tensor."""
    offset: int
    """First element in the row-major whole tensor."""
    length: int
    """Elements of the run, at least 1."""
    tied_names: tuple[str, ...] = ()
    """The other names of the same tensor, in module order."""
    merge: MergeRule = "rda"
    """Whether contributions to it are merged by radial-directional averaging or by the weighted mean."""

    def __post_init__(self) -> None:
        """Check every rule that does not need another slice."""
        if not isinstance(self.tied_names, tuple):
            raise ConfigurationError(f"tied_names={self.tied_names!r}: must be a tuple of names.")
        for name in self.names:
            _check_name(name, "Tensor name")
        _check_choice(self.dtype, tuple(PARAMETER_DTYPES), f"dtype of {self.name!r}")
        _check_choice(self.merge, ("rda", "mean"), f"merge rule of {self.name!r}")
        numel = _check_shape(self.global_shape, self.name)
        if type(self.offset) is not int or type(self.length) is not int or not 0 <= self.offset < self.offset + self.length <= numel:
            raise ConfigurationError(
                f"Slice [{self.offset!r}, +{self.length!r}) of {self.name!r}: must be a non-empty part of its {numel} elements."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the tensor, the first one first."""
        return (self.name, *self.tied_names)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.global_shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """A fixed subset of the tensors, synchronized together.

    Raises:
        ConfigurationError: the slices do not tile their tensors, or a name occurs twice.
    """

    fragment_id: int
    """Place in the layout, from 0."""
    kind: FragmentKind
    """``parameters``: merged and stepped by the outer optimizer; ``buffers``: weighted mean, overwritten."""
    slices: tuple[TensorSlice, ...]
    """In the order in which they lie in the flat fragment."""

    def __post_init__(self) -> None:
        """Walk over the slices once: every tensor complete, in ascending order, once."""
        if type(self.fragment_id) is not int or self.fragment_id < 0:
            raise ConfigurationError(f"fragment_id={self.fragment_id!r}: must be a whole number from 0.")
        _check_choice(self.kind, ("parameters", "buffers"), "Fragment kind")
        if not isinstance(self.slices, tuple) or not self.slices:
            raise ConfigurationError(f"Fragment {self.fragment_id}: must hold at least one slice.")
        _check_unique(name for part in self.tensors for name in part.names)
        last = self.slices[0]
        covered = 0
        for part in self.slices:
            same = (part.names, part.dtype, part.global_shape, part.merge) == (last.names, last.dtype, last.global_shape, last.merge)
            if part.offset != covered or not (same or covered == 0):
                raise ConfigurationError(f"Fragment {self.fragment_id}: {part.name!r} at {part.offset} leaves a gap or an overlap.")
            last = part
            covered = (part.offset + part.length) % part.numel
        if covered:
            raise ConfigurationError(f"Fragment {self.fragment_id}: {last.name!r} is not complete ({covered} of {last.numel} elements).")

    @property
    def tensors(self) -> tuple[TensorSlice, ...]:
        """The first slice of each tensor."""
        return tuple(part for part in self.slices if part.offset == 0)

    @property
    def holds_values(self) -> bool:
        """Whether contributions are the values themselves (buffers) rather than pseudo-gradients."""
        return self.kind == "buffers"

    def wire_dtype(self, configured: str) -> str:
        """How contributions and differences of this fragment travel: buffers always exactly."""
        return "fp32" if self.holds_values else configured

    @property
    def num_params(self) -> int:
        """Elements of the flat fragment."""
        return sum(part.length for part in self.slices)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of the static state: a frozen parameter or a persistent buffer, sent once at founding and never merged.

    Raises:
        ConfigurationError: a field breaks its rule.
    """

    name: str
    """First name in module order, frozen parameters before buffers."""
    dtype: str
    """One of the dtypes that static state may have."""
    shape: tuple[int, ...]
    """Shape; zero-sized tensors are allowed."""
    kind: StaticKind = "parameter"
    """``parameter``: the same for the whole job. ``buffer``: it starts from this value and changes in training, in each learner apart."""

    def __post_init__(self) -> None:
        """Check every field."""
        _check_name(self.name, "Static tensor name")
        _check_choice(self.dtype, tuple(STATIC_DTYPES), f"dtype of {self.name!r}")
        _check_choice(self.kind, ("parameter", "buffer"), f"kind of {self.name!r}")
        _check_shape(self.shape, self.name)

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * STATIC_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Fragment map and static state of one model.

    Raises:
        ConfigurationError: fragments are not numbered from 0, there is none, or a name occurs twice.
    """

    fragments: tuple[Fragment, ...]
    """Fragment i has `fragment_id` i."""
    static: tuple[TensorSpec, ...] = ()
    """Static tensors, in the order of their payload."""
    shard: int = 0
    """Which part of a larger layout this is (see `lightning_diloco.outer.shards`), of `num_shards`."""
    num_shards: int = 1
    """1: it is the whole."""

    def __post_init__(self) -> None:
        """Check what needs more than one fragment."""
        if not self.fragments or [f.fragment_id for f in self.fragments] != list(range(len(self.fragments))):
            raise ConfigurationError("A layout needs at least one fragment, and fragments numbered from 0 without a gap.")
        if type(self.shard) is not int or type(self.num_shards) is not int or not 0 <= self.shard < self.num_shards:
            raise ConfigurationError(f"Part {self.shard!r} of {self.num_shards!r}: parts are numbered from 0, and there is one at least.")
        _check_unique(self._names())

    @property
    def fragment_sizes(self) -> tuple[int, ...]:
        """Elements of each fragment."""
        return tuple(f.num_params for f in self.fragments)

    @property
    def num_params(self) -> int:
        """Synchronized parameters; the elements of buffer fragments are not counted."""
        return sum(f.num_params for f in self.fragments if f.kind == "parameters")

    def fingerprint(self) -> str:
        """SHA-256 of the canonical encoding, in hex: names, order, shapes, dtypes, ties, fragment map, merge rules, static specs.

        That of a part says which part it is as well (`part_of`): a syncer reads it before it knows any layout.
        """
        sha256 = hashlib.sha256(self.to_bytes()).hexdigest()
        return sha256 if self.num_shards == 1 else f"{self.shard}/{self.num_shards}/{sha256}"

    def to_bytes(self) -> bytes:
        """The canonical encoding: JSON in ASCII, fixed order of keys, no white space."""
        fragments = [[f.kind, [_slice_fields(part) for part in f.slices]] for f in self.fragments]
        static = [[spec.name, spec.dtype, list(spec.shape), spec.kind] for spec in self.static]
        part = [] if self.num_shards == 1 else [[self.shard, self.num_shards]]
        return json.dumps([_SCHEMA, fragments, static, *part], ensure_ascii=True, separators=(",", ":")).encode("ascii")

    @classmethod
    def from_bytes(cls, data: bytes, *, max_bytes: int) -> Layout:
        """Decode and validate what a peer sent.

        The sizes in it are claims: compare `num_params` with the memory at hand before allocating anything.

        Args:
            data: bytes from the network; anything at all.
            max_bytes: longest encoding to look at.

        Returns:
            A layout whose `to_bytes` is exactly `data`.

        Raises:
            RemoteProtocolError: `oversized` above `max_bytes`; `wrong_layout` for everything else that is not a layout.
        """
        if len(data) > max_bytes:
            raise RemoteProtocolError("oversized", f"A layout of {len(data)} bytes: at most {max_bytes} are read.")
        try:
            layout = _parse(read_shallow_json(bytes(data).decode("ascii")))
            canonical = layout.to_bytes()
        # TypeError and ValueError: a list where the unpacking wants another.
        except (ConfigurationError, ValueError, TypeError) as error:
            raise RemoteProtocolError("wrong_layout", f"These bytes are not a layout: {str(error)[:500]}") from None
        if canonical != data:
            raise RemoteProtocolError("wrong_layout", "These bytes are not the canonical encoding of their layout.")
        return layout

    def _names(self) -> Iterator[str]:
        for fragment in self.fragments:
            for part in fragment.tensors:
                yield from part.names
        for spec in self.static:
            yield spec.name


def _check_unique(names: Iterator[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigurationError(f"Tensor name {name!r} occurs twice in the layout.")
        seen.add(name)


def _slice_fields(part: TensorSlice) -> list[Any]:
    return [part.name, part.dtype, list(part.global_shape), part.offset, part.length, list(part.tied_names), part.merge]


def _as_tuple(value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigurationError(f"{type(value).__name__} where a list belongs.")
    return tuple(value)


def _parse(document: object) -> Layout:
    schema, fragments, static, *part = _as_tuple(document)
    if type(schema) is not int or schema != _SCHEMA:
        raise ConfigurationError(f"Layout schema {schema!r}: this program reads {_SCHEMA}. Use the same version of the package everywhere.")
    return Layout(
        fragments=tuple(_parse_fragment(i, entry) for i, entry in enumerate(_as_tuple(fragments))),
        static=tuple(_parse_spec(entry) for entry in _as_tuple(static)),
        **_parse_part(part),
    )


def _parse_part(entries: list[object]) -> dict[str, Any]:
    if not entries:
        return {}
    (entry,) = entries
    shard, num_shards = _as_tuple(entry)
    return {"shard": shard, "num_shards": num_shards}


def _parse_fragment(fragment_id: int, entry: object) -> Fragment:
    kind, slices = _as_tuple(entry)
    return Fragment(fragment_id=fragment_id, kind=kind, slices=tuple(_parse_slice(part) for part in _as_tuple(slices)))


def _parse_slice(entry: object) -> TensorSlice:
    name, dtype, shape, offset, length, tied, merge = _as_tuple(entry)
    return TensorSlice(
        name=name,
        dtype=dtype,
        global_shape=_as_tuple(shape),
        offset=offset,
        length=length,
        tied_names=_as_tuple(tied),
        merge=merge,
    )


def _parse_spec(entry: object) -> TensorSpec:
    name, dtype, shape, kind = _as_tuple(entry)
    return TensorSpec(name=name, dtype=dtype, shape=_as_tuple(shape), kind=kind)
