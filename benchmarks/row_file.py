"""The JSON file in which a benchmark keeps its rows: read with a sentence where it is broken, written whole or not at all.

Not a benchmark itself: each that keeps rows uses it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["read_rows", "write_rows"]

Kind = TypeVar("Kind", dict[str, Any], list[dict[str, Any]])


def read_rows(path: Path, empty: Kind) -> Kind:
    """The rows so far.

    Args:
        path: of the file; it need not be there.
        empty: what there is without the file, ``{}`` or ``[]``; the file has to hold the same.

    Raises:
        SystemExit: what is there cannot be read, is no JSON, or holds something else than rows of this kind.
    """
    remedy = "Mend or delete it, or give another one with --json."
    try:
        rows: Any = json.loads(path.read_text())
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path} is no file of rows ({error}). {remedy}") from None
    if not isinstance(rows, type(empty)):
        raise SystemExit(f"{path} is no file of rows (it holds a {type(rows).__name__}, not a {type(empty).__name__}). {remedy}")
    return rows


def write_rows(path: Path, rows: dict[str, Any] | list[dict[str, Any]], *, indent: int | None = 1) -> None:
    """Replace the file by these rows; whoever is killed here leaves the rows that were there.

    Args:
        path: of the file; its folder is made.
        rows: all of them.
        indent: of a level; None: one line, for files that hold long lists of numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the process's number: `emulate.py` may run once a core with one file.
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(rows, indent=indent) + "\n")
    new.replace(path)
