"""Who may speak to a syncer with keys.

Three locks. ZeroMQ's CURVE asks, through pyzmq's authenticator (ZAP, RFC 27), once per connection whether its key is admitted; a
connection without that answer does not come about. As connections outlive that moment, every message is judged again by the key of its
connection, which ZeroMQ attaches to it (`User-Id`): a key that was revoked speaks to nobody from the next message on. And a
peer, which is the nonce of a process, belongs to the key that it first came with: what another site says in its name is dropped.

The folder of admitted keys is looked at twice a second, and before a message is judged if the folder's own time says that a file came or
went (one `stat`, about a microsecond). What it loses is revoked, what it gains is let in. A revocation
cannot be taken back for the learners that it ends, so three things are none. A folder that cannot be read is as it was, and so is one
that had files and is gone: nobody revokes by that, but a volume is unmounted, or the folder is moved away. A file that cannot be taken
(half written, say) counts as before for `DOUBT_LOOKS` more looks, and so does one that is missing where another folder stands in the place
of the one that was there: it may be on its way, file by file. As long as the folder has never been read nobody is let in, and nobody is
told that his key is unknown: a learner takes that for a revocation when it lasts (`runtime.link_care`). One that is not there at the start
admits nobody.

A connection that is refused tells its key to the authenticator if it has one; those without, or with another syncer's in mind, fail before
and are seen by `handshakes` only. All are counted, and told in the log at most every `COMPLAIN_S`, by reason; the counts are told at the
end, for there may be no endpoint that has them.

Threads: `callback` is called by the authenticator's thread and reads one reference; all else belongs to the transport's.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.complaints import Complaints
from lightning_diloco.runtime.keys import SyncerKeys, read_sites

__all__ = ["MAX_PEERS_PER_KEY", "Gate"]

_LOGGER = logging.getLogger(__name__)

MAX_PEERS_PER_KEY: Final = 256
"""Processes of one site whose key is remembered; the one that was heard least recently is forgotten first."""
DOUBT_LOOKS: Final = 3
"""So many looks in a row a file may be one that cannot be taken, or missing in a folder that is new, before what it held is revoked."""
_HANDSHAKE_MS: Final = 5000
"""Whoever connects and says nothing holds a descriptor for so long (ZeroMQ's own 30 s let strangers hold more than a process has)."""
_DOMAIN: Final = "lightning-diloco"
_ZAP: Final = "inproc://zeromq.zap.01"
_Signature = tuple[tuple[str, int, int, int, int], ...]


class Gate:
    """The syncer's side of keys.

    Args:
        keys: of this syncer.
        count: called with a word for each refused connection and message.
    """

    def __init__(self, keys: SyncerKeys, count: Callable[[str], None]) -> None:
        self._keys, self._count = keys, count
        self._seen: _Signature | None = None
        self._folder_ns = 0
        self._place: tuple[int, int] | None = None
        self._sites: dict[str, str] = {}
        self._doubts: dict[str, int] = {}
        # Keys are in Z85 here, as ZeroMQ attaches them: judging a message takes a look-up and no decoding.
        self._admitted: Mapping[str, str] = {}
        self._key_of: dict[bytes, str] = {}
        self._peers: dict[str, OrderedDict[bytes, None]] = {}
        self._strangers: deque[str] = deque(maxlen=16)
        self._complaints: dict[str, Complaints] = {}
        self._refused: Counter[str] = Counter()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._authenticator: ThreadAuthenticator | None = None
        self._read()

    def configure(self, sock: zmq.Socket[bytes]) -> None:
        """Give a socket its keys, before it listens."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        sock.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
        # Should the authenticator be gone, nobody comes in; without this everybody would.
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)

    def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Begin to answer; before the sockets listen. If it is not known yet who is admitted, that is put off: see above."""
        self._context = context
        if self._seen is not None:
            self._answer(context)

    def _answer(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        self._authenticator.start()

    def stop(self) -> None:
        """Let nobody in any more; before the context ends. Idempotent."""
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is None:
            return
        if not authenticator.is_alive():
            # Nobody reads its pipe: telling it to end would wait for ever. Its address is given back here and now, for the next one.
            with contextlib.suppress(zmq.ZMQError, AttributeError):
                authenticator.zap_socket.unbind(_ZAP)
            with contextlib.suppress(AttributeError):
                authenticator.pipe.close()
            authenticator.pipe = None  # type: ignore[assignment]
        authenticator.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """The authenticator's question: whether this key may connect.

        Args:
            domain: of the socket.
            key: the public key, in Z85.
        """
        try:
            public = key.decode("ascii")
            if public in self._admitted:
                return True
            self._strangers.append(public)
        except Exception:  # it would end the authenticator's thread, and nobody would come in any more
            _LOGGER.exception("Whether a key is admitted could not be told.")
        return False

    def admits(self, peer: bytes, frame: zmq.Frame) -> bool:
        """Whether a message may be taken; counts and logs what may not.

        Args:
            peer: whose routing id it came under.
            frame: any of its parts.
        """
        try:
            key = str(frame.get("User-Id"))
        except (zmq.ZMQError, ValueError):
            return self._refuse("no_key", "A message without a key", "every connection must have one")
        name = self._admitted.get(key)
        if name is None:
            return self._refuse("revoked_key", f"A message from {frame.get('Peer-Address')}", f"its key {_hex(key)} is revoked")
        if self._key_of.get(peer) == key:
            self._peers[key].move_to_end(peer)
            return True
        if peer in self._key_of:
            return self._refuse("foreign_key", f"A message of site {name}", "it speaks in the name of a process of another site")
        self._key_of[peer] = key
        peers = self._peers.setdefault(key, OrderedDict())
        peers[peer] = None
        if len(peers) > MAX_PEERS_PER_KEY:
            del self._key_of[peers.popitem(last=False)[0]]
        return True

    def knows(self, peer: bytes) -> bool:
        """Whether a peer came with a key that is admitted.

        Args:
            peer: false for one that was forgotten (`MAX_PEERS_PER_KEY`): nothing can be told of its key any more.
        """
        return self._key_of.get(peer) in self._admitted

    def has_changed(self) -> bool:
        """Whether a file came or went since the last look. A file written anew in its place is for the next look to see."""
        return _time_of(self._keys.admitted) not in (self._folder_ns, None)

    def look(self, *, is_due: bool = True) -> list[bytes]:
        """Look at the folder of admitted keys; returns the peers that are shut out from here on.

        Args:
            is_due: one of the looks that come twice a second. Others, which a message makes, take no part in the count of doubts.
        """
        self._revive()
        before = self._admitted
        self._read(is_due=is_due)
        if self._admitted is before:
            return []
        for key, name in self._admitted.items():
            if key not in before:
                _LOGGER.warning("Site %s is admitted.", name)
        shut_out: list[bytes] = []
        for key, name in before.items():
            if key not in self._admitted:
                peers = list(self._peers.pop(key, ()))
                _LOGGER.warning("The key of site %s is revoked; %d processes came with it.", name, len(peers))
                for peer in peers:
                    del self._key_of[peer]
                shut_out += peers
        return shut_out

    def turned_away(self, reason: str) -> None:
        """A handshake has failed.

        Args:
            reason: as `handshakes` calls it.
        """
        why = _WHY[reason]
        if reason == "unknown_key" and self._strangers:
            key = _hex(self._strangers.popleft())
            why = f"its key {key} is not admitted (lightning-diloco keygen {self._keys.folder} --admit NAME {key} lets it in)"
        self._refuse(reason, "A connection", why)

    def _read(self, *, is_due: bool = True) -> None:
        """Read the folder, if anything in it may have changed."""
        folder = self._keys.admitted
        self._folder_ns = _time_of(folder) or 0
        try:
            # Before the keys: what changes after this is seen by the next look.
            seen = _signature(folder)
            if seen == self._seen and not self._doubts:
                return
            found = read_sites(folder)
            # After them: had the folder gone meanwhile, its files would look as if they had been removed.
            place = _place_of(folder)
        except OSError as error:
            if self._seen or not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                self._complain("unknown", f"{folder} cannot be read now ({error}); who is admitted stays so")
                return
            seen, found, place = (), {}, None
        if self._place in (None, place):
            missing: dict[str, ConfigurationError] = {}
        else:
            why = f"{folder} is another folder than before, which has no such file: put it there, or leave it, and the site is revoked."
            missing = {name: ConfigurationError(why) for name in self._sites if name not in found}
        self._take(found | missing, is_due=is_due)
        self._seen = seen
        if not missing:
            self._place = place

    def _take(self, found: Mapping[str, bytes | ConfigurationError], *, is_due: bool) -> None:
        """Admit those whose files can be taken, and for some looks those whose files could be before."""
        sites: dict[str, str] = {}
        doubts: dict[str, int] = {}
        for name, key in found.items():
            if isinstance(key, ConfigurationError):
                doubts[name] = min(self._doubts.get(name, 0) + is_due, DOUBT_LOOKS + 1)
                if name not in self._doubts:
                    _LOGGER.warning("The key file of site %s cannot be taken; it counts as before for %d looks. %s", name, DOUBT_LOOKS, key)
                if doubts[name] <= DOUBT_LOOKS and name in self._sites:
                    sites[name] = self._sites[name]
            else:
                sites[name] = z85.encode(key).decode("ascii")
        self._sites, self._doubts = sites, doubts
        self._admitted = {key: name for name, key in sites.items()}

    def _revive(self) -> None:
        """Begin to answer where that was put off; replace an authenticator whose thread has ended: nobody would come in any more."""
        before, context = self._authenticator, self._context
        if context is None or self._seen is None or (before is not None and before.is_alive()):
            return
        if before is not None:
            self._complain("authenticator", "The thread that answers whether a key is admitted has ended; another one takes its place")
        try:
            self.stop()
            self._answer(context)
        except (zmq.ZMQError, OSError, RuntimeError) as error:
            self._authenticator = self._authenticator or before  # tried again at the next look
            self._complain("authenticator again", f"It cannot be started now ({error}): until then no new connection is let in")

    def sum_up(self) -> None:
        """Say in the log how many were refused since the last time that this was asked, if there were any."""
        refused, self._refused = self._refused, Counter()
        if refused:
            _LOGGER.warning("Refused in all: %s.", ", ".join(f"{reason} {count}" for reason, count in sorted(refused.items())))

    def _refuse(self, reason: str, what: str, why: str) -> bool:
        self._count(reason)
        self._refused[reason] += 1
        self._complaints.setdefault(reason, Complaints(_LOGGER)).add(what, why)
        return False

    def _complain(self, reason: str, text: str) -> None:
        self._complaints.setdefault(reason, Complaints(_LOGGER)).say(text)


_WHY: Final = {
    "unknown_key": "its key is not admitted",
    "no_keys": "it came without keys, and every learner of this syncer needs keys=",
    "other_syncer": "what it says does not open with this syncer's key: it has another one in mind, or plays back what others have said",
    "handshake": "it hung up before it had shown a key",
}


def _hex(key: str) -> str:
    """A key as keygen prints it."""
    public: bytes = z85.decode(key.encode("ascii"))
    return public.hex()


def _time_of(folder: os.PathLike[str]) -> int | None:
    """When a file last came or went, in ns; None if it cannot be told now."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return None


def _place_of(folder: os.PathLike[str]) -> tuple[int, int]:
    """Which folder it is, whatever its name leads to now: device and inode.

    Raises:
        OSError: it cannot be told now.
    """
    about = os.stat(folder)
    return about.st_dev, about.st_ino


def _signature(folder: os.PathLike[str]) -> _Signature:
    """What changes whenever a file of the folder is added, removed or written anew; the folder's own time may be too coarse to tell.

    Raises:
        OSError: it cannot be told now.
    """
    with os.scandir(folder) as entries:
        return tuple(sorted((entry.name, *_about(entry)) for entry in entries))


def _about(entry: os.DirEntry[str]) -> tuple[int, int, int, int]:
    """Of what a link leads to, or of the link if that is nothing; nothing of a file that went meanwhile."""
    for follow in (True, False):
        try:
            about = entry.stat(follow_symlinks=follow)
        except OSError:
            continue
        # A file that another one replaces may keep size and time; the inode and the time of the change it does not.
        return about.st_ino, about.st_ctime_ns, about.st_mtime_ns, about.st_size
    return 0, 0, 0, 0
