"""The import rule (DESIGN.md section 3) as data, and one walk over the syntax trees.

A module imports only from layers that its row names. Imports count wherever they stand: at the top, inside a function, under
``TYPE_CHECKING``, relative, or as a literal given to ``importlib.import_module``. Nothing is imported to find out. The second half of
the file breaks each rule in a small tree and expects the walk to say so.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "lightning_diloco"
MAX_LINES = 400
MEASURED = (PACKAGE, "recipes", "tests", "benchmarks")

HOST = ("lightning", "pytorch_lightning", "lightning_fabric")
IMPURE = (
    *("asyncio", "concurrent", "logging", "multiprocessing", "numpy", "random", "secrets", "select", "selectors"),
    *("socket", "ssl", "subprocess", "threading", "time", "torch", "zmq"),
)


@dataclass(frozen=True)
class Row:
    """What the modules of one layer may import."""

    ours: tuple[str, ...] = ()
    """Our layers, beside the layer itself and `FOR_ALL`."""
    outside: tuple[str, ...] | None = ()
    """Top-level packages beside the standard library; None: any."""
    never: tuple[str, ...] = ()
    """Top-level modules that are refused although the above would let them pass."""


LAYERS = {
    "errors": Row(),
    "config": Row(),
    "shallow_json": Row(),
    "protocol": Row(outside=("msgspec",), never=IMPURE),
    "outer": Row(outside=("torch",), never=("socket", "threading", "time")),
    "metrics": Row(
        ours=("protocol",), outside=("msgspec", "torch", "torchmetrics"), never=("io", "os", "pathlib", "socket", "threading", "time")
    ),
    "runtime": Row(ours=("protocol", "outer", "metrics"), outside=None, never=(*HOST, "hydra", "recipes")),
    "sim": Row(ours=("protocol", "metrics", "outer"), outside=None, never=("time", "recipes")),
    "strategy": Row(ours=("runtime", "outer", "metrics", "protocol"), outside=None, never=("hydra", "recipes")),
    "cli": Row(ours=("runtime", "sim", "metrics"), outside=None, never=(*HOST, "recipes")),
    # The package's own `__init__`: the public names, handed on.
    "__init__": Row(ours=("strategy", "runtime", "metrics", "outer", "protocol"), outside=None, never=("hydra", "recipes")),
    "__main__": Row(ours=("cli",), outside=None, never=(*HOST, "recipes")),
}
"""`recipes/` lies outside the package, may import everything, and is in no row's reach."""

FOR_ALL = ("errors", "config", "shallow_json")


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a syntax tree; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, node.args[0].value


def layer_of(relative: Path) -> str:
    """The layer of a file, given its path inside the package."""
    return relative.parts[0].removesuffix(".py")


def complaint(layer: str, name: str) -> str | None:
    """Why a module of `layer` may not import `name`, or None."""
    row = LAYERS[layer]
    top, _, rest = name.partition(".")
    if top == PACKAGE:
        target = rest.partition(".")[0]
        if target not in LAYERS:
            # A public name of the package's `__init__`, which hands on what lies above.
            return None if layer == "__init__" or target == "__version__" else "the package's __init__ lies above every layer"
        allowed = target in (layer, *FOR_ALL, *row.ours)
        return None if allowed else f"{layer} may import {', '.join(row.ours) or 'none of our layers'}"
    if top in row.never:
        return f"{layer} must never import {top}"
    if row.outside is not None and top not in row.outside and top not in sys.stdlib_module_names:
        return f"{layer} may import the standard library and {', '.join(row.outside) or 'nothing else'}"
    return None


def import_violations(root: Path) -> list[str]:
    """One sentence for each import that breaks the rule, and for each module that no row knows."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        relative = path.relative_to(root / PACKAGE)
        layer = layer_of(relative)
        where = path.relative_to(root).as_posix()
        if layer not in LAYERS:
            found.append(f"{where}: no row of the table knows {layer!r}")
            continue
        package = ".".join((PACKAGE, *relative.parent.parts))
        for line, name in imported_names(ast.parse(path.read_text("utf-8")), package):
            reason = complaint(layer, name)
            if reason:
                found.append(f"{where}:{line}: imports {name}, but {reason}")
    return found


def length_violations(root: Path) -> list[str]:
    """One sentence for each Python file that is too long."""
    found = []
    for path in (p for folder in MEASURED for p in sorted((root / folder).rglob("*.py"))):
        lines = len(path.read_text("utf-8").splitlines())
        if lines > MAX_LINES:
            found.append(f"{path.relative_to(root).as_posix()}: {lines} lines, at most {MAX_LINES}")
    return found


def test_every_import_is_in_its_layers_row():
    assert (ROOT / PACKAGE).is_dir()
    violations = import_violations(ROOT)
    assert not violations, "\n".join(violations)


def test_no_file_is_too_long():
    violations = length_violations(ROOT)
    assert not violations, "\n".join(violations)


BROKEN = [
    ("errors.py", "from lightning_diloco.protocol import records", "none of our layers"),
    ("config.py", "import torch", "standard library"),
    *[("protocol/machine.py", f"import {name}", "must never") for name in ("time", "socket", "threading", "random", "logging", "torch")],
    ("protocol/machine.py", "import numpy.linalg", "must never"),
    ("protocol/machine.py", "import attrs", "standard library"),
    ("protocol/machine.py", "from lightning_diloco.outer import merge", "none of our layers"),
    ("protocol/machine.py", "from ..outer import merge", "none of our layers"),
    ("protocol/machine.py", "from .. import outer", "none of our layers"),
    ("protocol/deep/machine.py", "from ...runtime.tape import Tape", "none of our layers"),
    ("protocol/machine.py", "def f():\n    from time import monotonic", "must never"),
    ("protocol/machine.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from torch import Tensor", "must never"),
    ("protocol/machine.py", "import importlib\nimportlib.import_module('torch.nn')", "must never"),
    ("protocol/machine.py", "from lightning_diloco import DecoupledDiLoCoStrategy", "__init__ lies above"),
    ("outer/merge.py", "from lightning_diloco.protocol.records import Merge", "none of our layers"),
    ("outer/merge.py", "import msgspec", "standard library and torch"),
    ("metrics/goodput.py", "from lightning_diloco.runtime import tape", "may import protocol"),
    ("metrics/goodput.py", "import time", "must never"),
    ("metrics/goodput.py", "from pathlib import Path", "must never"),
    *[("runtime/service.py", f"import {name}", "must never") for name in ("lightning.pytorch", "pytorch_lightning", "hydra")],
    ("runtime/service.py", "from lightning_diloco.sim import engine", "may import protocol, outer, metrics"),
    ("runtime/service.py", "from lightning_diloco.strategy import launcher", "may import protocol, outer, metrics"),
    ("sim/engine.py", "from lightning_diloco.runtime import service", "may import protocol, metrics, outer"),
    ("sim/engine.py", "import time", "must never"),
    ("strategy/strategy.py", "import hydra", "must never"),
    ("strategy/strategy.py", "from lightning_diloco.sim import engine", "may import runtime"),
    ("strategy/strategy.py", "from lightning_diloco.cli import main", "may import runtime"),
    ("strategy/strategy.py", "from recipes.gpt_text import model", "must never"),
    ("cli/main.py", "import lightning", "must never"),
    ("cli/main.py", "from lightning_diloco.strategy import strategy", "may import runtime, sim, metrics"),
    ("__init__.py", "import hydra", "must never"),
    ("helpers/text.py", "", "no row"),
]


@pytest.mark.parametrize(("file", "source", "reason"), BROKEN)
def test_a_broken_rule_is_found(tmp_path, file, source, reason):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source, "utf-8")
    (found,) = import_violations(tmp_path)
    assert found.startswith(f"{PACKAGE}/{file}:")
    assert reason in found


ALLOWED = [
    ("config.py", "import math\nfrom lightning_diloco.errors import ConfigurationError"),
    ("protocol/deep/machine.py", "import msgspec\nfrom ..records import Merge\nfrom . import sibling\nfrom ...errors import ProtocolError"),
    ("outer/merge.py", "import torch.nn.functional as F\nfrom lightning_diloco import config"),
    ("runtime/service.py", "import time\nimport zmq\nfrom lightning_diloco.outer.merge import rda"),
    ("strategy/strategy.py", "import lightning.pytorch as pl\nfrom lightning_diloco.runtime import service"),
    ("cli/main.py", "from lightning_diloco.sim import engine\nfrom lightning_diloco import __version__"),
    ("__init__.py", "from lightning_diloco.strategy import DecoupledDiLoCoStrategy"),
]


@pytest.mark.parametrize(("file", "source"), ALLOWED)
def test_what_the_table_allows_is_not_found(tmp_path, file, source):
    path = tmp_path / PACKAGE / file
    path.parent.mkdir(parents=True)
    path.write_text(source, "utf-8")
    assert import_violations(tmp_path) == []


@pytest.mark.parametrize("folder", MEASURED)
def test_a_file_of_one_line_too_many_is_found(tmp_path, folder):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "fits.py").write_text("x = 1\n" * MAX_LINES, "utf-8")
    (tmp_path / folder / "long.py").write_text("x = 1\n" * (MAX_LINES + 1), "utf-8")
    assert length_violations(tmp_path) == [f"{folder}/long.py: 401 lines, at most 400"]
