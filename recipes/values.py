"""Values from the command line: a name that nobody takes gets a sentence, not a traceback.

Hydra checks the names of a configuration that is there already. One that is added with a plus reaches the constructor that it is for.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from lightning_diloco.errors import ConfigurationError

__all__ = ["call", "check_devices", "check_names"]

_T = TypeVar("_T")


def call(group: str, make: Callable[..., _T], values: Mapping[Any, Any]) -> _T:
    """Make an object from a group of the configuration.

    Args:
        group: its name, for the sentence.
        make: a class or function that takes keywords.
        values: of the group.

    Raises:
        ConfigurationError: a name is none of its keywords.
    """
    check_names(group, make, values)
    return make(**{str(name): value for name, value in values.items()})


def check_names(group: str, make: Callable[..., Any], names: Collection[Any], *, ours: Collection[str] = ()) -> None:
    """Check the names of a group against the keywords of what it is for.

    Args:
        group: its name, for the sentence.
        make: a class or function that takes keywords.
        names: that were given.
        ours: keywords that recipes set themselves.

    Raises:
        ConfigurationError: a name is none of the keywords, or is one of `ours`.
    """
    known = [name for name in inspect.signature(make).parameters if name not in ours]
    for name in map(str, names):
        if name in ours:
            raise ConfigurationError(f"{group}.{name}: a recipe sets this itself. Leave it out.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {group}.{near[0]}?" if near else f"leave it out; {group} takes {', '.join(known)}."
            raise ConfigurationError(f"{group}.{name}: there is no such value; {hint}")


def check_devices(devices: object) -> None:
    """Check the number of learners, from which other values are made.

    Raises:
        ConfigurationError: it is no whole number, or below 1.
    """
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ConfigurationError(
            f"trainer.devices={devices!r}: must be a whole number of at least 1, the number of learners; for example trainer.devices=2."
        )
