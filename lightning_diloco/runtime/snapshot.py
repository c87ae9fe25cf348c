"""Snapshots of a syncer: what it needs to go on with its job, on disk.

    snapshots/identity.json     job, lineage, the epoch of the newest start; replaced at every start, before anything is served
    snapshots/founding.json     configuration, layout and fingerprint of the founding; written once, before the first snapshot
    snapshots/static.bin        its static state; written once, before founding.json
    snapshots/00000012/         manifest.json, and a safetensors file for each fragment: theta, momentum, shadow

Fragments are independent, so a set of files, each of which is one fragment at one version, is a consistent cut (DESIGN.md section 7). A
snapshot is written into a folder beside, made durable, and renamed: it is there whole or not at all. The last two are kept. The manifest
has size and CRC-32 of every file; what does not fit them is damaged, and the snapshot before is used. So the two share no file: a fragment
that has not changed is a hard link to its file in the snapshot before the last one, which goes, and is written once more if it is not
there. When a job has ended the last one is enough.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, DiLoCoError, RemoteProtocolError
from lightning_diloco.outer import FragmentState, Layout, buffer_of
from lightning_diloco.protocol.identity import MergedThrough, Origin, Version
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.disk import unlink_quietly
from lightning_diloco.runtime.store import MAX_LAYOUT_BYTES
from lightning_diloco.runtime.tensor_file import write_file, write_tensors

__all__ = ["Founding", "FragmentSnapshot", "Identity", "SnapshotError", "SnapshotStore"]

_log = logging.getLogger(__name__)

FOLDER: Final = "snapshots"
_IDENTITY, _FOUNDING, _STATIC, _MANIFEST = "identity.json", "founding.json", "static.bin", "manifest.json"
_SCHEMA = 1
_KEPT = 2
_PARTS: Final = ("theta", "momentum", "shadow")


class SnapshotError(DiLoCoError):
    """A snapshot is damaged, or is not one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose snapshots these are, and how often a syncer has been started for them."""

    job_id: str
    lineage: str
    epoch: int
    started_unix_s: float
    """Wall clock at the tape's second 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Founding:
    """What was said once, when the job began."""

    config: SyncConfig
    fingerprint: str
    layout: Layout
    static: Tensor
    """uint8, packed in the order of the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FragmentSnapshot:
    """One fragment at one version; its tensors are never changed in place."""

    state: FragmentState
    version: Version
    crc: int
    """Of the shadow."""
    merged_through: dict[int, MergedThrough]
    origin: Origin | None = None
    """What it was before a restart that is not known to be on the tape."""


class SnapshotStore:
    """The snapshots of one run directory; one thread at a time.

    Args:
        run_dir: exists and is locked by the caller.
    """

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / FOLDER
        self._written: deque[dict[int, tuple[Version, Path, dict[str, Any]]]] = deque(maxlen=_KEPT)
        self._owed: Founding | None = None

    # ---- what is written once -----------------------------------------------------------------------------------------------

    def write_identity(self, identity: Identity) -> None:
        """Replace the identity, durably.

        Raises:
            OSError: the disk failed.
        """
        self.folder.mkdir(exist_ok=True)
        fields = {name: getattr(identity, name) for name in Identity.__slots__}
        _write_json(self.folder / _IDENTITY, {"schema": _SCHEMA, **fields})

    def read_identity(self) -> Identity | None:
        """Whose snapshots these are; None if no syncer has been started here.

        Raises:
            SnapshotError: the file is there and cannot be used.
        """
        value = _read_json(self.folder / _IDENTITY)
        try:
            return None if value is None else msgspec.convert({name: value.get(name) for name in Identity.__slots__}, Identity)
        except msgspec.ValidationError as error:
            raise SnapshotError(f"{self.folder / _IDENTITY}: {error}. The file is damaged, and the job cannot be gone on with.") from error

    def write_founding(self, founding: Founding) -> None:
        """Keep what a founding said, durably; once. What the disk refuses is tried again before each snapshot.

        Raises:
            OSError: the disk failed.
        """
        self._owed = founding
        self.folder.mkdir(exist_ok=True)
        static = {"static_bytes": founding.static.numel(), "static_crc": crc32(founding.static)}
        temporary = self.folder / f".{_STATIC}"
        try:
            write_file(temporary, [buffer_of(founding.static)] if founding.static.numel() else [], is_durable=True)
            temporary.replace(self.folder / _STATIC)
        except OSError:
            unlink_quietly(temporary)
            raise
        layout = base64.b64encode(founding.layout.to_bytes()).decode()
        told = {"config": founding.config.as_dict(), "fingerprint": founding.fingerprint, "layout": layout}
        _write_json(self.folder / _FOUNDING, {"schema": _SCHEMA, **told, **static})
        self._owed = None

    def read_founding(self) -> Founding | None:
        """What the founding said; None if the job has not been founded.

        Raises:
            SnapshotError: the files are there and cannot be used.
        """
        value = _read_json(self.folder / _FOUNDING)
        if value is None:
            return None
        path = self.folder / _STATIC
        try:
            data = path.read_bytes()
            if len(data) != value["static_bytes"] or crc32(data) != value["static_crc"]:
                raise SnapshotError(f"{path}: does not have its length or checksum. The file is damaged.")
            return Founding(
                config=SyncConfig.from_options(value["config"]),
                fingerprint=value["fingerprint"],
                layout=Layout.from_bytes(base64.b64decode(value["layout"]), max_bytes=MAX_LAYOUT_BYTES),
                static=torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8),
            )
        except (OSError, KeyError, TypeError, ValueError, ConfigurationError, RemoteProtocolError) as error:
            raise SnapshotError(f"{self.folder / _FOUNDING}: {error}. The file is damaged, and the job cannot be gone on with.") from error

    # ---- snapshots ----------------------------------------------------------------------------------------------------------

    def write(self, fragments: Iterable[Callable[[], FragmentSnapshot]]) -> Path:
        """Write one snapshot, durably, and remove all but the last two.

        Args:
            fragments: in the order of the layout; each is asked when it is written, so that nothing is held longer than needed.

        Returns:
            Its folder.

        Raises:
            OSError: the disk failed; what was there before is still there.
        """
        if self._owed is not None:
            # Without its founding no snapshot is of any use.
            self.write_founding(self._owed)
            _log.warning("%s: the founding is written now. The run can be resumed.", self.folder)
        number = max((int(path.name) for path in self._folders()), default=0) + 1
        temporary = self.folder / f".{number:08d}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        written: dict[int, tuple[Version, Path, dict[str, Any]]] = {}
        path = self.folder / f"{number:08d}"
        try:
            for fragment_id, ask in enumerate(fragments):
                found = ask()
                name = f"fragment_{fragment_id:04d}.safetensors"
                entry = self._link(fragment_id, found, temporary / name) or _write_fragment(temporary / name, found)
                written[fragment_id] = (found.version, path / name, entry)
            _write_json(temporary / _MANIFEST, {"schema": _SCHEMA, "fragments": [entry for _, _, entry in written.values()]})
            _sync_folder(temporary)
            temporary.rename(path)
            _sync_folder(self.folder)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        self._written.append(written)
        self.prune(_KEPT)
        return path

    def prune(self, kept: int) -> None:
        """Remove all but the newest `kept` snapshots."""
        for old in self._folders()[:-kept]:
            shutil.rmtree(old, ignore_errors=True)

    def _link(self, fragment_id: int, found: FragmentSnapshot, path: Path) -> dict[str, Any] | None:
        """Use the file of the snapshot that goes if it holds this version; None if it does not, or cannot be linked to.

        Not that of the last one, which stays: damage to a file that both have would be damage to both.
        """
        going = self._written[0] if len(self._written) == _KEPT else {}
        version, before, entry = going.get(fragment_id, (None, path, {}))
        if version != found.version:
            return None
        try:
            os.link(before, path)
        except OSError:
            return None
        return entry

    def read(self, sizes: Sequence[int]) -> list[FragmentSnapshot | None]:
        """The newest snapshot that is whole; None for every fragment if there is none.

        A damaged one is logged, and the one before is used.

        Args:
            sizes: elements of each fragment.
        """
        for path in reversed(self._folders()):
            try:
                return list(_read_snapshot(path, sizes))
            except SnapshotError as error:
                _log.error("%s The snapshot before it is used.", error)
        return [None] * len(sizes)

    def _folders(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("[0-9]*") if p.name.isdigit())


def _read_snapshot(folder: Path, sizes: Sequence[int]) -> Iterable[FragmentSnapshot]:
    manifest = _read_json(folder / _MANIFEST)
    entries = manifest.get("fragments") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or len(entries) != len(sizes):
        raise SnapshotError(f"{folder}: the manifest does not name the job's {len(sizes)} fragments.")
    return [
        _read_fragment(folder / f"fragment_{i:04d}.safetensors", entry, size)
        for i, (entry, size) in enumerate(zip(entries, sizes, strict=True))
    ]


def _read_fragment(path: Path, entry: dict[str, Any], size: int) -> FragmentSnapshot:
    try:
        data = path.read_bytes()
        if len(data) != entry["bytes"] or crc32(data) != entry["crc32"]:
            raise SnapshotError(f"{path}: does not have the size or checksum that the manifest names.")
        tensors = load(data)
        if any(tensors[name].shape != (size,) for name in _PARTS) or crc32(tensors["shadow"]) != entry["crc"]:
            raise SnapshotError(f"{path}: does not have the job's {size} elements, or other values than were published.")
        return FragmentSnapshot(
            state=FragmentState(
                **{name: tensors[name] for name in _PARTS}, ahead=float(entry["ahead"]), merge_index=int(entry["merge_index"])
            ),
            version=Version(*map(int, entry["version"])),
            crc=int(entry["crc"]),
            merged_through={int(m): MergedThrough(int(seq), int(tokens)) for m, (seq, tokens) in entry["merged_through"].items()},
            origin=msgspec.convert(entry.get("origin"), Origin | None),
        )
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError, msgspec.ValidationError, DiLoCoError) as error:
        raise SnapshotError(f"{path}: {error}") from error


def _write_fragment(path: Path, found: FragmentSnapshot) -> dict[str, Any]:
    size, crc = write_tensors(path, {name: getattr(found.state, name) for name in _PARTS}, {}, is_durable=True)
    return {
        "bytes": size,
        "crc32": crc,
        "version": [found.version.epoch, found.version.n],
        "crc": found.crc,
        "ahead": found.state.ahead,
        "merge_index": found.state.merge_index,
        "merged_through": {str(m): [x.seq, x.tokens] for m, x in found.merged_through.items()},
        "origin": msgspec.to_builtins(found.origin),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        write_file(temporary, [json.dumps(value).encode()], is_durable=True)
        temporary.replace(path)
    except OSError:
        unlink_quietly(temporary)
        raise
    _sync_folder(path.parent)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path}: cannot be read ({error}).") from error
    if not isinstance(value, dict) or value.get("schema") != _SCHEMA:
        raise SnapshotError(f"{path}: is of another kind or release.")
    return value


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
