"""One key in one file: how it is written, and when it is believed.

A key is 32 bytes, written as 64 hexadecimal digits; lines that begin with ``#`` are comments. A file is written whole or not at all, and
never over another. What others may write to is not read, its folder included, nor a secret that they may read.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from lightning_diloco.errors import ConfigurationError

__all__ = [
    "SECRET",
    "SUFFIX",
    "key_files",
    "make_folder",
    "parse_public",
    "read_public",
    "read_secret",
    "refuse_open_folder",
    "write_new",
    "write_once",
]

SECRET = "secret.key"
SUFFIX = ".key"

_KEY_BYTES = 32


def key_files(folder: Path) -> list[Path]:
    """The key files of a folder, by name; none if it is not there.

    Raises:
        OSError: what is in it cannot be told.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def parse_public(text: str) -> bytes:
    """Read a public key as keygen prints it.

    Raises:
        ConfigurationError: it is none.
    """
    key = _parse(text)
    if key is None:
        raise ConfigurationError(f"{text[:80]!r}: is no public key. It has {2 * _KEY_BYTES} hexadecimal digits; keygen prints it.")
    return key


def read_secret(folder: Path) -> bytes:
    """The secret of a machine's folder.

    Raises:
        ConfigurationError: there is none, or it or its folder is open to others.
    """
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder. Make the keys with lightning-diloco keygen {folder}.")
    refuse_open_folder(folder, "put another key in the place of yours")
    path = folder / SECRET
    key = _parse(_content(path, is_secret=True))
    if key is None:
        # What it holds instead is not repeated: it may be a secret all the same.
        raise ConfigurationError(f"{path}: holds no key. Move it away and make new keys with lightning-diloco keygen {folder}.")
    return key


def read_public(path: Path) -> bytes:
    """The public key in a file.

    Raises:
        ConfigurationError: there is none, or others may write to it.
    """
    key = _parse(_content(path))
    if key is None:
        raise ConfigurationError(f"{path}: holds no public key ({2 * _KEY_BYTES} hexadecimal digits). Remove it, and add the key again.")
    return key


def refuse_open_folder(folder: Path, harm: str) -> None:
    """Others who may write to a folder may exchange what is in it, or (the sticky bit does not hinder that) add to it.

    Args:
        folder: with keys.
        harm: what they could do, for the sentence.

    Raises:
        ConfigurationError: there are such others.
    """
    _refuse_open(folder, folder.stat(), harm)


def make_folder(folder: Path) -> None:
    """Make a folder for keys; one that is there stays.

    Raises:
        ConfigurationError: it cannot be made, or others may write to it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be created ({error.strerror}). Give a directory that can be written to.") from error
    refuse_open_folder(folder, "put another key in the place of yours")


def write_once(path: Path, public: bytes) -> None:
    """Write a public key; one that is there already must be the same.

    Raises:
        ConfigurationError: it is another one, or cannot be written.
    """
    if path.exists():
        if read_public(path) != public:
            raise ConfigurationError(f"{path}: holds another key, and keys are never overwritten. Remove it first if it is out of use.")
        return
    write_new(path, f"{public.hex()}\n", 0o644)


def write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet, whole or not at all.

    Raises:
        ConfigurationError: it is there, or cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)
            os.write(fd, text.encode("ascii"))
            os.fsync(fd)
        finally:
            os.close(fd)
        # Unlike a rename, a link fails where something stands already.
        os.link(temporary, path)
    except FileExistsError as error:
        raise ConfigurationError(f"{path}: is there already, and keys are never overwritten. Give another folder.") from error
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be written ({error.strerror}). Give a directory that can be written to.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _content(path: Path, *, is_secret: bool = False) -> str:
    """A key file without its comments, if nobody else could have written it (or read it, if it is the secret)."""
    try:
        # Nothing that is no file, such as a pipe, makes us wait.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            # Of what is open: under its name another file may stand a moment later.
            _refuse_open(path, os.fstat(fd), "put another key in its place", is_secret=is_secret)
            data = os.read(fd, 4096)
        finally:
            os.close(fd)
    except OSError as error:
        remedy = f"Make keys with lightning-diloco keygen {path.parent}." if is_secret else "Run this as the owner of the file."
        raise ConfigurationError(f"{path}: cannot be read ({error.strerror}). {remedy}") from error
    return "\n".join(line for line in data.decode("ascii", "replace").splitlines() if not line.startswith("#"))


def _refuse_open(path: Path, about: os.stat_result, harm: str, *, is_secret: bool = False) -> None:
    """Refuse what others may write to, its owner included if that is neither this user nor root, and a secret that they may read."""
    mode = stat.S_IMODE(about.st_mode)
    if about.st_uid not in (0, os.geteuid()):
        raise ConfigurationError(
            f"{path}: belongs to another user (uid {about.st_uid}), who could {harm}. Run this as that user, or chown {os.geteuid()} {path}"
        )
    if is_secret and mode & 0o077:
        raise ConfigurationError(
            f"{path}: mode {mode:04o} opens the secret to others of this machine. Make new keys if somebody may have read it; otherwise "
            f"chmod 600 {path}"
        )
    if mode & 0o022:
        raise ConfigurationError(f"{path}: mode {mode:04o} lets others of this machine write to it: one could {harm}. chmod go-w {path}")


def _parse(text: str) -> bytes | None:
    text = text.strip()
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * _KEY_BYTES}}}", text, re.ASCII):
        return None
    return bytes.fromhex(text)
