"""Keys of both ends: what is in their folders, and who is let in.

Every machine makes its own pair, and only public keys travel: to the site the syncer's, to the syncer the site's. A public key is 64
hexadecimal digits, which survive a chat, a ticket and a shell; nobody who reads it can do anything with it, but it must come from whom
you think. (The other design, a folder made at the syncer and carried to the site, would save one way and leave a secret in two places
and whatever carried it.)

    at the syncer:  DIR/secret.key   DIR/admitted/NAME.key for every site that is let in (its public key)
    at a site:      DIR/secret.key   DIR/syncer.key (the syncer's public key)

A folder is one end's: what only the other end has makes it the other's, and it is refused. (A syncer on a site's folder would show the
site's key as its own, and let nobody in.) Secrets are written with mode 0600 in a folder of mode 0700, in one step, and never overwritten.
A secret that others may read, and files that others may write, are refused (`key_files`). Public keys are derived from the secret (CURVE),
so there is no second file that could differ.

References:
    CurveZMQ, rfc.zeromq.org/spec/26.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.key_files import (
    SECRET,
    SUFFIX,
    key_files,
    make_folder,
    parse_public,
    read_public,
    read_secret,
    refuse_open_folder,
    write_new,
    write_once,
)

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

SYNCER = "syncer.key"
ADMITTED = "admitted"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
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
            ConfigurationError: it is a syncer's, or a file is not there, is no key, or is open to others.
        """
        secret = read_secret(folder)
        _refuse_syncers(folder)
        if not (folder / SYNCER).exists():
            raise ConfigurationError(
                f"{folder / SYNCER}: is not there: this folder does not know its syncer's public key. Run lightning-diloco keygen {folder} "
                "--syncer KEY with the key that keygen printed at the syncer."
            )
        return cls(public=_public_of(secret), secret=secret, syncer=read_public(folder / SYNCER))

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
            ConfigurationError: it is a site's, or a file is not there, is no key, or is open to others.
        """
        secret = read_secret(folder)
        _refuse_sites(folder)
        keys = cls(folder=folder, public=_public_of(secret), secret=secret)
        if keys.admitted.exists():
            refuse_open_folder(keys.admitted, "admit itself")
        try:
            paths = key_files(keys.admitted)
        except OSError as error:
            raise ConfigurationError(f"{keys.admitted}: cannot be read ({error.strerror}). Run this as the owner of {folder}.") from error
        for path in paths:
            read_public(path)
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
    make_folder(folder)
    secret = z85.decode(zmq.curve_keypair()[1])
    write_new(folder / SECRET, f"# Secret: whoever has this is this machine. It stays here.\n{secret.hex()}\n", 0o600)
    return _public_of(secret)


def own_public(folder: Path) -> bytes:
    """The public key of this machine's pair.

    Raises:
        ConfigurationError: there is no pair, or it is open to others.
    """
    return _public_of(read_secret(folder))


def trust_syncer(folder: Path, key: str) -> bytes:
    """Make this site's pair if there is none, and note its syncer's public key; returns the site's own.

    Raises:
        ConfigurationError: `key` is none, another syncer's is noted, or the folder is a syncer's.
    """
    syncer = parse_public(key)
    _refuse_syncers(folder)
    own = own_public(folder) if (folder / SECRET).exists() else make_pair(folder)
    if syncer == own:
        raise ConfigurationError(
            f"--syncer {key}: is the key of {folder} itself. Give the one that keygen printed at the syncer; on the syncer's "
            "own machine a site has another folder than the syncer."
        )
    write_once(folder / SYNCER, syncer)
    return own


def admit(folder: Path, name: str, key: str) -> None:
    """Let a site in, from now on, also into a job that runs.

    Raises:
        ConfigurationError: the name or the key is none, one of them is in use, or the folder is a site's.
    """
    _check_name(name)
    public, own = parse_public(key), own_public(folder)
    _refuse_sites(folder)
    if public == own:
        raise ConfigurationError(f"--admit {name} {key}: is the key of this syncer. Give the one that keygen printed at the site.")
    make_folder(folder / ADMITTED)
    for path in key_files(folder / ADMITTED):
        if path.stem != name and read_public(path) == public:
            raise ConfigurationError(
                f"--admit {name}: this key is admitted as {path.stem}. One site has one key, or revoking would leave it another."
            )
    write_once(folder / ADMITTED / f"{name}{SUFFIX}", public)


def revoke(folder: Path, name: str) -> None:
    """Shut a site out, from now on, also from a job that runs.

    Raises:
        ConfigurationError: no site of this name is admitted, or its key still is, under another name; or the folder is a site's.
    """
    _check_name(name)
    path = folder / ADMITTED / f"{name}{SUFFIX}"
    try:
        sites = read_sites(folder / ADMITTED)
        path.unlink()
    except FileNotFoundError:
        _refuse_sites(folder)
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
            found[path.stem] = read_public(path)
        except ConfigurationError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                continue  # removed since the folder was read
            if isinstance(cause, OSError) and cause.errno in _OUT_OF_MEANS:
                raise cause from None
            found[path.stem] = error
    return found


def _public_of(secret: bytes) -> bytes:
    return z85.decode(zmq.curve_public(z85.encode(secret)))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{name[:80]!r}: is no name of a site. Use up to 64 letters, digits, dots, dashes and underscores.")


def _refuse_sites(folder: Path) -> None:
    """For the syncer's end: refuse the folder of a site."""
    if (folder / SYNCER).exists():
        raise ConfigurationError(
            f"{folder}: is the folder of a site, for {SYNCER} in it names the syncer that it speaks to. A syncer and a site have a folder "
            f"each, on one machine too. Give the syncer's (lightning-diloco keygen DIR makes one), or remove {SYNCER} if this is the "
            "syncer's."
        )


def _refuse_syncers(folder: Path) -> None:
    """For a site's end: refuse the folder of a syncer."""
    if (folder / ADMITTED).exists():
        raise ConfigurationError(
            f"{folder}: is the folder of a syncer, for {ADMITTED} in it names the sites that are let in. A syncer and a site have a folder "
            f"each, on one machine too. Give the site's (lightning-diloco keygen DIR --syncer KEY makes one), or remove {ADMITTED} if this "
            "is the site's."
        )
