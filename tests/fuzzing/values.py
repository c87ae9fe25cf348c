"""Values for every type that may stand in a message, taken from the types themselves: a new message is fuzzed without anybody adding it.

Three kinds: *likely* ones, which a peer knows of its job and which are named like the field; *legal* ones, at the edges of what the type
allows; *broken* ones, which no type allows and which must not be decoded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

Hints = Mapping[str, tuple[Any, ...]]
"""By the name of a field, alone or after its type's: what a peer of this job would say there."""

EDGES = (0, 1, 2, 3, 7, 2**16, 2**31, 2**32, 2**53 - 1, 2**53, 2**53 + 1, 2**62 - 1, 2**62)
WORDS = ("", "x", "norm", "other", "\x00", "é" * 50, "a" * 199)
BROKEN: tuple[Any, ...] = (
    -1,
    2**62 + 1,
    2**63 - 1,
    2**64 - 1,
    -(2**63),
    "",
    "z" * 3000,
    None,
    [],
    {},
    [[]],
    1.5,
    True,
    b"\xff",
    float("nan"),
)
LONG = 3000


@cache
def fields_of(kind: type) -> tuple[inspect.Field, ...]:
    """The fields of a struct with their types."""
    described = inspect.type_info(kind)
    assert isinstance(described, inspect.StructType)
    return described.fields


def legal(dice: random.Random, kind: inspect.Type, hints: Hints) -> Any:
    """A value that the type allows, at its edges more often than not."""
    match kind:
        case inspect.UnionType(types=types):
            return legal(dice, dice.choice(types), hints)
        case inspect.LiteralType(values=values):
            return dice.choice(values)
        case inspect.NoneType():
            return None
        case inspect.BoolType():
            return dice.random() < 0.5
        case inspect.IntType(ge=low, le=high, lt=below):
            low, high = low or 0, high if high is not None else (below or 2**62 + 1) - 1
            return min(max(dice.choice(EDGES), low), high)
        case inspect.FloatType(gt=above, le=high):
            edges = (0.0, 1e-9, 0.5, 60.0, high if high is not None else 1e300)
            return dice.choice([edge for edge in edges if above is None or edge > above])
        case inspect.StrType(max_length=length):
            return dice.choice(WORDS)[:length]
        case inspect.BytesType(max_length=length):
            return dice.randbytes(dice.choice((0, 1, 4, 64)))[:length]
        case inspect.VarTupleType(item_type=item, min_length=least, max_length=most):
            return tuple(legal(dice, item, hints) for _ in range(_length(dice, least or 0, most)))
        case inspect.TupleType(item_types=items):
            return tuple(legal(dice, item, hints) for item in items)
        case inspect.DictType(key_type=key, value_type=value):
            return {legal(dice, key, hints): legal(dice, value, hints) for _ in range(_length(dice, 0, None))}
        case inspect.StructType(cls=cls):
            return struct(dice, cls, hints, wildness=0.4)
    raise AssertionError(f"no values for {kind!r}: add them here")


def _length(dice: random.Random, least: int, most: int | None) -> int:
    length = LONG if dice.random() < 0.002 else dice.randrange(6)
    return max(least, length if most is None else min(length, most))


def struct(dice: random.Random, kind: type, hints: Hints, *, wildness: float) -> Any:
    """A struct that its decoder takes: each field likely, or with probability `wildness` anything legal."""
    values = {}
    for field in fields_of(kind):
        likely = hints.get(f"{kind.__name__}.{field.name}") or hints.get(field.name)
        is_likely = likely and dice.random() >= wildness
        values[field.name] = dice.choice(likely) if is_likely else legal(dice, field.type, hints)
    return kind(**values)


def broken(dice: random.Random, message: Any) -> Any:
    """The same message as plain data with one thing in it that its type forbids: a value, a field too many, too few, another tag."""
    plain = msgspec.to_builtins(message, builtin_types=(bytes,))
    if isinstance(plain, list) or len(plain) < 2 or dice.random() < 0.3:
        tag, tail = ("type", plain) if isinstance(plain, dict) else ("", {})
        return dice.choice(({**tail, "colour": 1}, {tag: "Nobody"}, {k: v for k, v in tail.items() if k != tag}, [plain], None, 7))
    name = dice.choice([name for name in plain if name != "type"])
    if dice.random() < 0.15:
        return {k: v for k, v in plain.items() if k != name}
    return plain | {name: dice.choice(BROKEN)}


def mutated(dice: random.Random, data: bytes, other: bytes) -> bytes:
    """Bytes that began as a message: bits flipped, cut off, grown, spliced with another message, or with a false length."""
    out = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        where = dice.randrange(len(out) + 1)
        match dice.randrange(7):
            case 0 | 1 if where < len(out):
                out[where] ^= 1 << dice.randrange(8)
            case 2:
                del out[where:]
            case 3:
                out[where:where] = dice.randbytes(dice.choice((1, 2, 9)))
            case 4:
                out[where:] = other[dice.randrange(len(other) + 1) :]
            case 5 if where < len(out):
                out[where : where + 1] = dice.choice(
                    (b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc1", b"\xc0")
                )
            case _:
                out[where:where] = dice.choice((b"\x91" * 500, b"\x81\xa4type" * 20, out[:where]))
    return bytes(out[: 1 << 16])
