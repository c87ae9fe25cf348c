"""Who may speak to a syncer with keys.

Three locks. ZeroMQ's CURVE asks, through pyzmq's authenticator (ZAP, RFC 27), once per connection whether its key is admitted; a
connection without that answer does not come about. As connections outlive that moment, every message is judged again by the key of its
connection, which ZeroMQ attaches to it (`User-Id`): a key that was revoked speaks to nobody from the next look at the folder on. And a
peer, which is the nonce of a process, belongs to the key that it first came with: another site cannot go on in its name.

The folder of admitted keys is looked at once a second, not per message. What it loses is revoked, what it gains is let in.

A connection that is refused tells its key to the authenticator if it has one; those without, or with another syncer's in mind, fail before
and are seen by `handshakes` only. All are counted, and told in the log at most every `COMPLAIN_S`, by reason.

Threads: `callback` is called by the authenticator's thread and reads one reference; all else belongs to the transport's.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from lightning_diloco.runtime.complaints import Complaints
from lightning_diloco.runtime.keys import SyncerKeys, read_admitted

__all__ = ["MAX_PEERS_PER_KEY", "Gate"]

_LOGGER = logging.getLogger(__name__)

MAX_PEERS_PER_KEY: Final = 256
"""Processes of one site whose key is remembered; the one that came first is forgotten first."""
_DOMAIN: Final = "lightning-diloco"


class Gate:
    """The syncer's side of keys.

    Args:
        keys: of this syncer.
        count: called with a word for each refused connection and message.
    """

    def __init__(self, keys: SyncerKeys, count: Callable[[str], None]) -> None:
        self._keys, self._count = keys, count
        self._admitted = self._read()
        self._seen = _signature(keys.admitted)
        # Keys are in Z85 here, as ZeroMQ attaches them: judging a message takes a look-up and no decoding.
        self._key_of: dict[bytes, str] = {}
        self._peers: dict[str, OrderedDict[bytes, None]] = {}
        self._strangers: deque[str] = deque(maxlen=16)
        self._complaints: dict[str, Complaints] = {}
        self._authenticator: ThreadAuthenticator | None = None

    def configure(self, sock: zmq.Socket[bytes]) -> None:
        """Give a socket its keys, before it listens."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
        sock.setsockopt_string(zmq.ZAP_DOMAIN, _DOMAIN)
        # Should the authenticator be gone, nobody comes in; without this everybody would.
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def start(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Begin to answer; before the sockets listen."""
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(_DOMAIN, self)
        self._authenticator.start()

    def stop(self) -> None:
        """Let nobody in any more; before the context ends. Idempotent."""
        authenticator, self._authenticator = self._authenticator, None
        if authenticator is not None:
            authenticator.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """The authenticator's question: whether this key may connect.

        Args:
            domain: of the socket.
            key: the public key, in Z85.
        """
        public = key.decode("ascii")
        if public in self._admitted:
            return True
        self._strangers.append(public)
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
            return True
        if peer in self._key_of:
            return self._refuse("foreign_key", f"A message of site {name}", "it speaks in the name of a process of another site")
        self._key_of[peer] = key
        peers = self._peers.setdefault(key, OrderedDict())
        peers[peer] = None
        if len(peers) > MAX_PEERS_PER_KEY:
            del self._key_of[peers.popitem(last=False)[0]]
        return True

    def look(self) -> list[bytes]:
        """Look at the folder of admitted keys; returns the peers that are shut out from here on."""
        seen = _signature(self._keys.admitted)
        if seen == self._seen:
            return []
        before, self._seen, self._admitted = self._admitted, seen, self._read()
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

    def _read(self) -> Mapping[str, str]:
        """Names of the admitted sites by key."""
        return {z85.encode(key).decode("ascii"): name for key, name in read_admitted(self._keys.admitted).items()}

    def _refuse(self, reason: str, what: str, why: str) -> bool:
        self._count(reason)
        self._complaints.setdefault(reason, Complaints(_LOGGER)).add(what, why)
        return False


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


def _signature(folder: os.PathLike[str]) -> tuple[tuple[str, int, int], ...]:
    """What changes whenever a file of the folder is added, removed or written anew; the folder's own time may be too coarse to tell."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                about = entry.stat()
                found.append((entry.name, about.st_mtime_ns, about.st_size))
    except OSError:
        # Not there, or a file that went meanwhile: looked at again in a second.
        return ()
    return tuple(sorted(found))
