"""What a syncer says of itself: one log line a round, and the versions of the packages it runs on."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from lightning_diloco.protocol.records import MergeRecord

__all__ = ["package_versions", "sentence"]


def sentence(record: MergeRecord) -> str:
    """One line that explains a round."""
    members = {m.learner_id for m in record.members}
    late = [str(i) for i in record.eligible if i not in members]
    missing = f", learner {' and '.join(late)} late" if late else ""
    return (
        f"fragment {record.fragment_id} v{record.version.n}: {len(members)} of {len(record.eligible)} in, K={record.quorum}, "
        f"grace {record.grace_used_s:.2f} s of {record.grace_window_s:.2f} s{missing}"
    )


def package_versions() -> dict[str, str]:
    """Of everything that has a part in the numbers."""
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("lightning-diloco", "lightning", "pyzmq", "msgspec", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
