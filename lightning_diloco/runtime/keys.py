"""Keys of both ends: files, their modes, and who is let in.

Every machine makes its own pair, and only public keys travel: to the site the syncer's, to the syncer the site's. A public key is 64
hexadecimal digits, which survive a chat, a ticket and a shell; nobody who reads it can do anything with it, but it must come from whom
you think. (The other design, a folder made at the syncer and carried to the site, would save one way and leave a secret in two places
and whatever carried it.)

    at the syncer:  DIR/secret.key   DIR/admitted/NAME.key for every site that is let in (its public key)
    at a site:      DIR/secret.key   DIR/syncer.key (the syncer's public key)

Secrets are written with mode 0600 in a folder of mode 0700, in one step, and never overwritten. A secret that others may read, and files
that others may write, are refused. Public keys are derived from the secret (CURVE), so there is no second file that could differ.

References:
    CurveZMQ, rfc.zeromq.org/spec/26.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from lightning_diloco.errors import ConfigurationError

__all__ = [
    "ADMITTED",
    "SECRET",
    "SYNCER",
    "SiteKeys",
    "SyncerKeys",
    "admit",
    "make_pair",
    "read_admitted",
    "read_sites",
    "revoke",
    "trust_syncer",
]

SECRET = "secret.key"
SYNCER = "syncer.key"
ADMITTED = "admitted"

_KEY_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".key"
_OUT_OF_MEANS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Errors of opening a file that say something of this process or machine, and nothing of the file."""


@dataclass(frozen=True, slots=True)
class SiteKeys:
    """What a learner's sockets need: its own pair and the syncer's public key.

    Args:
        public: this site's public key.
        secret: the other half; shown nowhere.
        syncer: the one syncer that this site speaks to.
    """

    public: bytes
    secret: bytes = field(repr=False)
    syncer: bytes

    @classmethod
    def read(cls, folder: Path) -> SiteKeys:
        """Read a site's folder.

        Raises:
            ConfigurationError: a file is not there, is no key, or is open to others.
        """
        secret = _read_secret(folder)
        if not (folder / SYNCER).exists():
            raise ConfigurationError(
                f"{folder / SYNCER}: is not there: this folder does not know its syncer's public key. Run lightning-diloco keygen {folder} "
                "--syncer KEY with the key that keygen printed at the syncer."
            )
        return cls(public=_public_of(secret), secret=secret, syncer=_read_public(folder / SYNCER))

    def configure(self, sock: zmq.Socket[bytes]) -> None:
        """Give a socket its keys, before it dials."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.syncer)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


@dataclass(frozen=True, slots=True)
class SyncerKeys:
    """What a syncer's sockets need, and the folder that says who is let in.

    Args:
        folder: as given to `--keys`.
        public: this syncer's public key.
        secret: the other half; shown nowhere.
    """

    folder: Path
    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> SyncerKeys:
        """Read a syncer's folder.

        Raises:
            ConfigurationError: a file is not there, is no key, or is open to others.
        """
        secret = _read_secret(folder)
        keys = cls(folder=folder, public=_public_of(secret), secret=secret)
        if keys.admitted.exists():
            _refuse_open_folder(keys.admitted, "admit itself")
        try:
            paths = key_files(keys.admitted)
        except OSError as error:
            raise ConfigurationError(f"{keys.admitted}: cannot be read ({error.strerror}). Run this as the owner of {folder}.") from error
        for path in paths:
            _read_public(path)
        return keys

    @property
    def admitted(self) -> Path:
        """The folder with the public keys that are let in."""
        return self.folder / ADMITTED


def make_pair(folder: Path) -> bytes:
    """Make this machine's pair; returns the public key.

    Raises:
        ConfigurationError: there is one already, or the folder cannot be written to.
    """
    if (folder / SECRET).exists():
        raise ConfigurationError(
            f"{folder / SECRET}: is there already, and keys are never overwritten. Its public key is {own_public(folder).hex()}"
        )
    _make_folder(folder)
    secret = z85.decode(zmq.curve_keypair()[1])
    _write_new(folder / SECRET, f"# Secret: whoever has this is this machine. It stays here.\n{secret.hex()}\n", 0o600)
    return _public_of(secret)


def own_public(folder: Path) -> bytes:
    """The public key of this machine's pair.

    Raises:
        ConfigurationError: there is no pair, or it is open to others.
    """
    return _public_of(_read_secret(folder))


def trust_syncer(folder: Path, key: str) -> bytes:
    """Make this site's pair if there is none, and note its syncer's public key; returns the site's own.

    Raises:
        ConfigurationError: `key` is none, or another syncer's is noted.
    """
    syncer = parse_public(key)
    own = own_public(folder) if (folder / SECRET).exists() else make_pair(folder)
    if syncer == own:
        raise ConfigurationError(
            f"--syncer {key}: is the key of {folder} itself. Give the one that keygen printed at the syncer; on the syncer's "
            "own machine a site has another folder than the syncer."
        )
    _write_once(folder / SYNCER, syncer)
    return own


def admit(folder: Path, name: str, key: str) -> None:
    """Let a site in, from now on, also into a job that runs.

    Raises:
        ConfigurationError: the name or the key is none, or one of them is in use.
    """
    _check_name(name)
    public = parse_public(key)
    if public == own_public(folder):
        raise ConfigurationError(f"--admit {name} {key}: is the key of this syncer. Give the one that keygen printed at the site.")
    _make_folder(folder / ADMITTED)
    for path in key_files(folder / ADMITTED):
        if path.stem != name and _read_public(path) == public:
            raise ConfigurationError(
                f"--admit {name}: this key is admitted as {path.stem}. One site has one key, or revoking would leave it another."
            )
    _write_once(folder / ADMITTED / f"{name}{_SUFFIX}", public)


def revoke(folder: Path, name: str) -> None:
    """Shut a site out, from now on, also from a job that runs.

    Raises:
        ConfigurationError: no site of this name is admitted, or its key still is, under another name.
    """
    _check_name(name)
    path = folder / ADMITTED / f"{name}{_SUFFIX}"
    try:
        sites = read_sites(folder / ADMITTED)
        path.unlink()
    except FileNotFoundError:
        known = ", ".join(path.stem for path in key_files(folder / ADMITTED)) or "none"
        raise ConfigurationError(f"--revoke {name}: no such site is admitted in {folder}. Admitted: {known}.") from None
    except OSError as error:
        raise ConfigurationError(f"--revoke {name}: {error}. Run it as the owner of {folder}.") from error
    key = sites.pop(name, None)
    others = [other for other, its_key in sites.items() if isinstance(its_key, bytes) and its_key == key]
    if others:
        raise ConfigurationError(
            f"--revoke {name}: {path} is removed, but the same key is admitted as {', '.join(others)}. Revoke that too."
        )


def read_admitted(folder: Path) -> Mapping[bytes, str]:
    """Names of the sites that are let in, by public key. A file that cannot be taken lets nobody in.

    Args:
        folder: of the admitted keys; one that is not there admits nobody.

    Raises:
        OSError: see `read_sites`.
    """
    return {key: name for name, key in read_sites(folder).items() if isinstance(key, bytes)}


def read_sites(folder: Path) -> dict[str, bytes | ConfigurationError]:
    """What the key files of a folder hold, by the site's name: its public key, or why it cannot be taken.

    Args:
        folder: of the admitted keys; one that is not there holds none.

    Raises:
        OSError: it cannot be told now, which says nothing of who is admitted.
    """
    found: dict[str, bytes | ConfigurationError] = {}
    for path in key_files(folder):
        try:
            found[path.stem] = _read_public(path)
        except ConfigurationError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                continue  # removed since the folder was read
            if isinstance(cause, OSError) and cause.errno in _OUT_OF_MEANS:
                raise cause from None
            found[path.stem] = error
    return found


def key_files(folder: Path) -> list[Path]:
    """The key files of a folder, by name; none if it is not there.

    Raises:
        OSError: what is in it cannot be told.
    """
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX and not path.name.startswith("."))
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


def _parse(text: str) -> bytes | None:
    text = text.strip()
    if not re.fullmatch(f"[0-9a-fA-F]{{{2 * _KEY_BYTES}}}", text, re.ASCII):
        return None
    return bytes.fromhex(text)


def _public_of(secret: bytes) -> bytes:
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name[:80]!r}: is no name of a site. Use up to 64 letters, digits, dots, dashes and underscores.")


# ---- files ----------------------------------------------------------------------------------------------------------------------


def _read_secret(folder: Path) -> bytes:
    if not folder.is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder. Make the keys with lightning-diloco keygen {folder}.")
    _refuse_open_folder(folder, "put another key in the place of yours")
    path = folder / SECRET
    key = _parse(_content(path, is_secret=True))
    if key is None:
        # What it holds instead is not repeated: it may be a secret all the same.
        raise ConfigurationError(f"{path}: holds no key. Move it away and make new keys with lightning-diloco keygen {folder}.")
    return key


def _read_public(path: Path) -> bytes:
    key = _parse(_content(path))
    if key is None:
        raise ConfigurationError(f"{path}: holds no public key ({2 * _KEY_BYTES} hexadecimal digits). Remove it, and add the key again.")
    return key


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


def _refuse_open_folder(folder: Path, harm: str) -> None:
    """Others who may write to a folder may exchange what is in it, or (the sticky bit does not hinder that) add to it."""
    _refuse_open(folder, folder.stat(), harm)


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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{folder}: cannot be created ({error.strerror}). Give a directory that can be written to.") from error
    _refuse_open_folder(folder, "put another key in the place of yours")


def _write_once(path: Path, public: bytes) -> None:
    """Write a public key; one that is there already must be the same."""
    if path.exists():
        if _read_public(path) != public:
            raise ConfigurationError(f"{path}: holds another key, and keys are never overwritten. Remove it first if it is out of use.")
        return
    _write_new(path, f"{public.hex()}\n", 0o644)


def _write_new(path: Path, text: str, mode: int) -> None:
    """Write a file that is not there yet, whole or not at all."""
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
