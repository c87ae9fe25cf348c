"""Registering ``decoupled_diloco`` with Lightning, whichever of the two is imported first, without importing Lightning.

Lightning has no plugin discovery for strategies: its registry is filled when ``lightning.pytorch.strategies`` is imported, and a name
has to be there when a Trainer is built. Two cases:

* Lightning is loaded already: the name is registered at once.
* It is not: a finder in front of ``sys.meta_path`` waits for that module, lets the ordinary finders find it, and registers after the
  module's own code has run. Then it has done its work and removes itself. It answers for two names and for nothing else; an import
  error of the module passes through unchanged and the finder stays for the next attempt.

What is registered is a factory, so our own strategy (and with it torch) is imported when a Trainer asks for it.

``pytorch_lightning`` is the same framework under another name with its own, unrelated class tree: a strategy of one cannot serve a
Trainer of the other. There the same name is registered with a factory that says so, instead of Lightning's "invalid strategy name".
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from lightning_diloco.errors import ConfigurationError

__all__ = ["STRATEGY_NAME", "install", "serve_other_framework", "wrong_framework"]

STRATEGY_NAME = "decoupled_diloco"
"""The name for ``Trainer(strategy=...)``."""
_DESCRIPTION = "Decoupled DiLoCo: learners that never wait for one another, merged fragment by fragment"
_OUR_CLASS_MODULE = "lightning_diloco.strategy.strategy"


def install() -> None:
    """Register now where the framework is loaded, and when it is loaded where it is not; idempotent."""
    for name, hook in _HOOKS.items():
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "StrategyRegistry"):
            hook(module)
        elif not any(isinstance(finder, _WaitingFinder) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _WaitingFinder(name, hook))


def wrong_framework() -> ConfigurationError:
    """The error for a Trainer of the ``pytorch_lightning`` package."""
    return ConfigurationError(
        "strategy='decoupled_diloco' with a pytorch_lightning.Trainer: the two packages have separate class trees, and this strategy is "
        "written for lightning.pytorch. Write `from lightning.pytorch import Trainer, LightningModule` instead."
    )


def _create(**options: Any) -> Any:
    return importlib.import_module(_OUR_CLASS_MODULE).DecoupledDiLoCoStrategy(**options)


def _refuse(**_: Any) -> Any:
    raise wrong_framework()


def _register(module: ModuleType) -> None:
    if STRATEGY_NAME not in module.StrategyRegistry:
        module.StrategyRegistry.register(STRATEGY_NAME, _create, description=_DESCRIPTION)


def _register_refusal(module: ModuleType) -> None:
    if STRATEGY_NAME not in module.StrategyRegistry:
        module.StrategyRegistry.register(STRATEGY_NAME, _refuse, description="needs lightning.pytorch")
    ours = sys.modules.get(_OUR_CLASS_MODULE)
    if ours is not None and hasattr(ours, "DecoupledDiLoCoStrategy"):
        # Let an instance pass the other package's isinstance check: our own check, which comes later, has the better sentence.
        module.Strategy.register(ours.DecoupledDiLoCoStrategy)


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "lightning.pytorch.strategies": _register,
    "pytorch_lightning.strategies": _register_refusal,
}


class _WaitingFinder(MetaPathFinder):
    """Waits for one module and calls a hook once its code has run.

    Args:
        name: the absolute name of the module.
        hook: called with the loaded module.
    """

    def __init__(self, name: str, hook: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.hook = hook

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Answer for our one name, with the spec that the other finders give and a loader around theirs."""
        if fullname != self.name:
            return None
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _HookingLoader(spec.loader, self)
                return spec
        return None

    def done(self) -> None:
        """Leave the import system."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _HookingLoader(Loader):
    """Loads with another loader, puts that one back in its place, and calls the finder's hook."""

    def __init__(self, loader: Loader, finder: _WaitingFinder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        # Introspection between finding and loading (get_source, is_package, resource readers) belongs to the real loader.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the real loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module's code, then the hook."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._finder.done()
        self._finder.hook(module)


def serve_other_framework(strategy: type[Any]) -> None:
    """Let an instance pass ``pytorch_lightning``'s isinstance check, so that our own check can say what is wrong."""
    other = sys.modules.get("pytorch_lightning.strategies")
    if other is not None and hasattr(other, "Strategy"):
        other.Strategy.register(strategy)
