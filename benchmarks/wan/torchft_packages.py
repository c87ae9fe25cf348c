"""torchft in a folder of its own, for the rows `torchft_diloco` and `torchft_streaming` of `benchmarks/wan.py` alone.

The project does not depend on torchft, and this environment does not get it: pip puts it with what it needs into
`outputs/torchft-VERSION`, and only the processes of those rows have that folder on their PYTHONPATH, before everything else. torch,
Lightning and the rest are those of this environment, so that all rows compute with the same arithmetic.

Everything is pinned and nothing else is resolved (`--no-deps`): torchft's own requirement of torch would bring a second torch. Of the rest
torchft imports only opentelemetry, which is idle as long as `TORCHFT_USE_OTEL` is not set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["TORCHFT_VERSION", "find_torchft", "packages"]

TORCHFT_VERSION = "2026.10.26"
PINNED = (
    f"torchft-nightly=={TORCHFT_VERSION}",
    "opentelemetry-api==1.45.2",
    "opentelemetry-exporter-http-transport==0.66b2",
    "opentelemetry-exporter-otlp-common==0.66b2",
    "opentelemetry-exporter-otlp-proto-common==1.45.2",
    "opentelemetry-exporter-otlp-proto-http==1.45.2",
    "opentelemetry-proto==1.45.2",
    "opentelemetry-sdk==1.45.2",
    "opentelemetry-semantic-conventions==0.66b2",
    "googleapis-common-protos==1.76.0",
    "protobuf==7.36.2",
    "requests==2.34.2",
    "certifi==2026.10.19.post1",
    "charset-normalizer==3.5.3",
    "idna==3.20",
    "urllib3==2.8.0",
)
PATIENCE_S = 300.0


def find_torchft(outputs: Path, why_no_namespaces: str | None) -> Path | None:
    """The folder with torchft; None, with a sentence on standard error, where its rows are left out.

    Args:
        outputs: see `packages`.
        why_no_namespaces: as `net.is_possible` says it.
    """
    try:
        if why_no_namespaces is not None:
            raise RuntimeError(f"they need network namespaces, and {why_no_namespaces}")
        return packages(outputs)
    except RuntimeError as error:
        print(f"The rows of torchft are left out: {error}.", file=sys.stderr)
        return None


def packages(outputs: Path) -> Path:
    """The folder with torchft in it; installed from pip's index if it is not there yet.

    Args:
        outputs: the folder in which it is made.

    Raises:
        RuntimeError: it cannot be had here; the message says why.
    """
    # torchft names its addresses by the machine's name, so each learner needs one of its own (`wan/jobs.py`).
    if shutil.which("unshare") is None:
        raise RuntimeError("unshare (util-linux) is not installed")
    folder = outputs / f"torchft-{TORCHFT_VERSION}"
    if not folder.exists():
        outputs.mkdir(parents=True, exist_ok=True)
        # Under another name until it is complete.
        with tempfile.TemporaryDirectory(prefix="torchft-", dir=outputs) as unfinished:
            _install(Path(unfinished) / "packages")
            os.rename(Path(unfinished) / "packages", folder)
    _check(folder)
    return folder


def _install(folder: Path) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1", "--timeout", "15"]
    command = [sys.executable, "-m", "pip", "install", *options, "--no-deps", "--only-binary", ":all:", "--target", str(folder), *PINNED]
    _run(command, None, "pip could not install it")


def _check(folder: Path) -> None:
    """Whether it can be imported beside this environment's torch."""
    _run([sys.executable, "-c", "import torchft.local_sgd"], folder, "it cannot be imported")


def _run(command: list[str], folder: Path | None, failed: str) -> None:
    environment = os.environ | ({} if folder is None else {"PYTHONPATH": str(folder)})
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{failed} within {PATIENCE_S:g} s") from None
    if done.returncode:
        raise RuntimeError(f"{failed}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
