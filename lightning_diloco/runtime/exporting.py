"""The global model of a run directory as a file for others, from its newest snapshot alone: no learner, no tape, no user code needed.

The state dict has the module's own names, shapes and dtypes: merged parameters and running statistics from the snapshot, frozen parameters
and other persistent buffers as they were at the founding, every name of a tied tensor. As a checkpoint it is what plain Lightning reads in
``load_from_checkpoint``, ``validate`` and ``predict``; there is no optimizer state in it, so a fit cannot be resumed from it.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.outer import sha256_of
from lightning_diloco.outer.static import unpack_static
from lightning_diloco.runtime.sharded_model import read_founding
from lightning_diloco.runtime.shards import shard_dirs
from lightning_diloco.runtime.snapshot import Founding, FragmentSnapshot, SnapshotError, SnapshotStore

__all__ = ["Exported", "export_model"]

SUFFIXES = (".ckpt", ".safetensors")
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    job_id: str
    versions: tuple[int, ...]
    """n per fragment."""
    num_params: int
    """Merged parameters and running statistics."""
    global_sha256: str
    """Over the fragments in layout order, float32; ``summary.json`` has that of the end."""


def export_model(run_dir: Path, out: Path) -> Exported:
    """Write the global model of the newest snapshot.

    Args:
        run_dir: of a job that runs or has ended.
        out: a file that ends in ``.ckpt`` or ``.safetensors``; replaced in one step.

    Raises:
        ConfigurationError: there is no snapshot, `out` has another ending, or cannot be written.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigurationError(f"{out}: must end in {' or '.join(SUFFIXES)}.")
    folders = shard_dirs(run_dir)
    try:
        identity, founding = SnapshotStore(folders[0]).read_identity(), read_founding(run_dir)
    except SnapshotError as error:
        raise ConfigurationError(f"{run_dir}: {error}") from error
    if identity is None or founding is None:
        raise ConfigurationError(f"{run_dir}: holds no snapshot of a job that was founded. Give the run directory of a syncer.")
    sizes, count = founding.layout.fragment_sizes, len(folders)
    by_shard = [SnapshotStore(folder).read(sizes[shard::count]) for shard, folder in enumerate(folders)]
    found = [f for p in range(len(sizes)) if (f := by_shard[p % count][p // count]) is not None]
    if len(found) != len(founding.layout.fragments):
        raise ConfigurationError(f"{run_dir}: no snapshot in it is whole. global.safetensors, if it is there, is the model of the end.")
    _write(state_dict(founding, found), out)
    return Exported(
        job_id=identity.job_id,
        versions=tuple(f.version.n for f in found),
        num_params=sum(f.num_params for f in founding.layout.fragments),
        global_sha256=sha256_of(f.state.shadow for f in found),
    )


def state_dict(founding: Founding, fragments: list[FragmentSnapshot]) -> dict[str, Tensor]:
    """All tensors of the module by name; names of a tied tensor share its memory."""
    tensors = unpack_static(founding.layout, founding.static)
    for fragment, found in zip(founding.layout.fragments, fragments, strict=True):
        for part, flat in zip(fragment.slices, found.state.shadow.split_with_sizes([s.length for s in fragment.slices]), strict=True):
            whole = tensors.get(part.name)
            if whole is None:
                whole = torch.empty(part.global_shape, dtype=_DTYPES[part.dtype], device="cpu")
                tensors |= dict.fromkeys(part.names, whole)
            whole.view(-1)[part.offset : part.offset + part.length] = flat.to(whole.dtype)
    return tensors


def _write(tensors: dict[str, Tensor], out: Path) -> None:
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.suffix == ".safetensors":
            save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, temporary)
        else:
            torch.save(_checkpoint(tensors), temporary)
        temporary.replace(out)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(f"{out}: cannot be written ({error}). Give a file in a folder that exists, with room for it.") from error


def _checkpoint(tensors: dict[str, Tensor]) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("lightning")
    except importlib.metadata.PackageNotFoundError:
        version = "2.0.0"  # the oldest whose files look like this one
    return {"epoch": 0, "global_step": 0, "pytorch-lightning_version": version, "state_dict": tensors, "loops": {}, "callbacks": {}}
