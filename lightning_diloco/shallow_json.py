"""JSON from a peer, refused before it is parsed where brackets are nested deeper than anything that we write.

The parser of the standard library ends in a `RecursionError` on thousands of brackets, and that can be caught. What cannot: the
lists it makes on the way let Python 3.11 collect garbage at that depth, where every finalizer of whatever object fails for want of stack
and is skipped. A stranger could so keep sockets and files of this process from being closed.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

MAX_DEPTH: Final = 16
"""Deepest nesting that is parsed; a layout has six levels, a configuration fewer."""

# Possessive, and the closing quote is optional: linear on every input, an unclosed string included.
_STRING: Final = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET: Final = re.compile(r"[][{}]")


def read_shallow_json(text: str) -> Any:
    """Parse `text`.

    Raises:
        ValueError: it is no JSON, or is nested deeper than `MAX_DEPTH`.
    """
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError(f"JSON with more than {MAX_DEPTH} levels of brackets is not read.")
    return json.loads(text)
