"""The whole model of a syncer with several shards, from what each has left in its folder.

Tensors lie in the shards' mapped files and are written from there, block by block: no copy of the model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import sha256_of, whole
from lightning_diloco.runtime.final_model import GLOBAL_NAME
from lightning_diloco.runtime.global_state import OUTER_NAME
from lightning_diloco.runtime.shards import shard_dirs
from lightning_diloco.runtime.snapshot import Founding, SnapshotStore
from lightning_diloco.runtime.tensor_file import write_tensors

__all__ = ["put_together", "read_founding"]


def read_founding(run_dir: Path) -> Founding | None:
    """What a job was founded with, put together from all shards; None if it was not, at all of them.

    Args:
        run_dir: of a job, with shards or without.

    Raises:
        ConfigurationError: `shards.json` cannot be read, or the shards do not belong together.
        SnapshotError: a file is damaged.
    """
    parts = [SnapshotStore(folder).read_founding() for folder in shard_dirs(run_dir)]
    found = [part for part in parts if part is not None]
    if len(found) != len(parts):
        return None
    if len(found) == 1:
        return found[0]
    layout = whole([part.layout for part in found])
    return Founding(config=found[0].config, fingerprint=layout.fingerprint(), layout=layout, static=found[0].static)


def put_together(run_dir: Path) -> str | None:
    """Write the files of the whole model that a syncer without shards writes itself.

    Args:
        run_dir: of a job with shards that has ended.

    Returns:
        SHA-256 of all fragments in layout order, float32 little endian; None if a shard has left no model.

    Raises:
        OSError: the disk failed.
        DiLoCoError: the folders do not hold the parts of one model.
    """
    founding, folders = read_founding(run_dir), shard_dirs(run_dir)
    if founding is None or not all((folder / GLOBAL_NAME).exists() for folder in folders):
        return None
    tensors = _read_all([folder / GLOBAL_NAME for folder in folders])
    names = [part.name for fragment in founding.layout.fragments for part in fragment.slices]
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ConfigurationError(f"{run_dir}: no shard has {missing[0]!r} of its model. Use the folder as its syncer has left it.")
    _write(tensors, run_dir / GLOBAL_NAME)
    outer = [folder / OUTER_NAME for folder in folders if (folder / OUTER_NAME).exists()]
    if len(outer) == len(folders):
        _write(_read_all(outer), run_dir / OUTER_NAME, _versions(outer))
    return sha256_of(_flat(tensors, names))


def _flat(tensors: dict[str, Tensor], names: list[str]) -> Iterator[Tensor]:
    # A tensor is whole in one fragment, so its values follow one another there as they do in the file.
    yield from (tensors[name] for name in names)


def _read_all(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return tensors


def _versions(paths: list[Path]) -> dict[str, str]:
    import json

    numbers: dict[str, int] = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            numbers |= json.loads((file.metadata() or {}).get("versions", "{}"))
    return {"versions": json.dumps(numbers)}


def _write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    temporary = path.with_suffix(".tmp")
    write_tensors(temporary, tensors, metadata or {}, is_durable=False)
    temporary.replace(path)
