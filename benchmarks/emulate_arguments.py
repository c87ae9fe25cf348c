"""The command line of `emulate.py`: what a NAME=VALUE may be."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["read"]

CHOICES = {
    "method": ("diloco", "ddp"),
    "merge": ("rda", "mean"),
    "adopt": ("rebase", "overwrite"),
    "inner": ("adamw", "muon", "shared", "estimate"),
}
IDEAS = ("cool", "rise", "average", "smooth", "agree", "cautious", "restart", "direct", "fine", "noise", "follow", "stretch")


def read(parser: argparse.ArgumentParser, name: str, kind: type, text: str) -> list[Any]:
    """The values of one NAME=VALUE; one that cannot be is told about, since a typo would give a plausible figure for something else."""
    choices = CHOICES.get(name)
    for part in text.split(",") if choices else ():
        if part not in choices:
            parser.error(f"{name}={part}: give one of {', '.join(choices)}.")
    for part in text.replace(",", "+").split("+") if name == "idea" else ():
        if part.partition(":")[0] not in ("", *IDEAS):
            parser.error(f"idea={part}: there are {', '.join(IDEAS)}.")
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        parser.error(f"{name}={text}: give a {kind.__name__}, or several with commas.")
