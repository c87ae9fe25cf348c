"""Finding the attribute that keeps an object from being pickled, so that the error can name it: ``model.lock (type _thread.lock)``.

pickle says what it cannot pickle and not where it is. The search asks of each child whether it can be pickled, goes into the first one
that cannot, and ends where no child is to blame. It runs only after a failure, and costs a few attempts for each level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["find_unpicklable"]

_MAX_DEPTH = 12
_MAX_CHILDREN = 1000
_BACK_REFERENCES = ("_trainer", "trainer", "_fabric", "_strategy", "_lightning_module")
"""Ways back up to what was searched already."""


def find_unpicklable(roots: Mapping[str, Any], is_picklable: Callable[[Any], bool]) -> tuple[str, str] | None:
    """Find the deepest object to blame.

    Args:
        roots: objects by the names that the user knows them by, the likely ones first.
        is_picklable: tries one object.

    Returns:
        The path of the attribute and the name of its type, or None if every root can be pickled.
    """
    for name, root in roots.items():
        if not is_picklable(root):
            return _descend(name, root, is_picklable, {id(root)})
    return None


def _descend(path: str, obj: Any, is_picklable: Callable[[Any], bool], seen: set[int]) -> tuple[str, str]:
    for _ in range(_MAX_DEPTH):
        for name, child in _children(path, obj):
            if id(child) not in seen and not is_picklable(child):
                seen.add(id(child))
                path, obj = name, child
                break
        else:
            break
    kind = type(obj)
    return path, kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _children(path: str, obj: Any) -> Iterator[tuple[str, Any]]:
    count = 0
    for name, child in _all_children(path, obj):
        count += 1
        if count > _MAX_CHILDREN:
            return
        yield name, child


def _all_children(path: str, obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, Mapping):
        yield from ((f"{path}[{key!r}]", value) for key, value in list(obj.items()))
    elif isinstance(obj, (list, tuple)):
        yield from ((f"{path}[{i}]", value) for i, value in enumerate(obj))
    attributes = getattr(obj, "__dict__", {})
    for name, value in list(attributes.items()):
        if name in _BACK_REFERENCES:
            continue
        if isinstance(obj, nn.Module) and name in ("_modules", "_parameters", "_buffers"):
            yield from ((f"{path}.{key}", child) for key, child in list(value.items()))
        else:
            yield f"{path}.{name}", value
