"""Packages that only some recipes need."""

from __future__ import annotations

import importlib.util

from lightning_diloco.errors import ConfigurationError

__all__ = ["require"]


def require(recipe: str, *packages: str) -> None:
    """Say at once what is not installed.

    Args:
        recipe: who asks.
        packages: by import name.

    Raises:
        ConfigurationError: one of them is not there.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"recipe={recipe} needs {' and '.join(missing)}, which no other part of this project does: run `make extras`, or "
            "`pip install -e '.[recipes]'`."
        )
