"""The observer's end: asks a syncer how its job is, over the control socket and nothing else.

A question is said again every `AGAIN_S` until the answer is here: either may be lost, and a syncer that many ask drops some. The answer
is a peer's word like any other: it is validated before it is believed.

A syncer that starts again may have no `syncer.json` for a while, and a new token in the next one. Neither is an error to an observer that
has asked before: without an address it asks at the last one, and a refusal of the token is then one of a question from before.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError, SyncerUnavailableError
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Envelope, Status, StatusRefused, StatusRequest
from lightning_diloco.protocol.observer_messages import LearnerStatus
from lightning_diloco.protocol.wire import decode_to_observer, encode
from lightning_diloco.runtime.complaints import MAX_SENTENCE, printable
from lightning_diloco.runtime.keys import SiteKeys
from lightning_diloco.runtime.transport import NONCE_BYTES, SYNCER, ControlReceived, LearnerTransport
from lightning_diloco.runtime.unanswered import explain

__all__ = ["Address", "LearnerStatus", "Observer", "Status", "find_syncer", "open_link"]

AGAIN_S: Final = 1.0
"""Seconds after which a question without an answer is said again."""
_NOBODY: Final = Envelope("", "", 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to ask, and what to show there."""

    endpoint: str
    token: str = ""


def find_syncer(target: str) -> Address:
    """The address in ``tcp://HOST:PORT``, or that in the ``syncer.json`` of a run directory.

    Raises:
        ConfigurationError: it is neither.
    """
    if "://" in target:
        try:
            parts = urlsplit(target)
            is_address = parts.scheme == "tcp" and bool(parts.hostname) and bool(parts.port)
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigurationError(f"{target}: the address of a syncer is tcp://HOST:PORT, for example tcp://127.0.0.1:7777.")
        return Address(endpoint=target)
    path = Path(target) / "syncer.json"
    if not Path(target).is_dir():
        raise ConfigurationError(f"{target}: there is no such folder. Give tcp://HOST:PORT of a syncer, or the run directory of a job.")
    try:
        said = json.loads(path.read_text())
        return Address(endpoint=str(said["endpoint"]), token=str(said.get("observer_token", "")))
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{target}: no syncer has said its address there. A job with launch='inline' has none to ask; its summary.json tells the rest."
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigurationError(f"{path}: cannot be read ({error}). Give tcp://HOST:PORT of the syncer instead.") from error


def open_link(endpoint: str, keys: SiteKeys | None = None) -> LearnerTransport:
    """The one place where an observer's socket is made.

    Args:
        endpoint: of the syncer.
        keys: of this site, if the syncer has keys.

    Raises:
        ConfigurationError: the address is malformed.
    """
    link = LearnerTransport(
        endpoint, nonce=secrets.token_bytes(NONCE_BYTES), accept=lambda *_: False, configure=None if keys is None else keys.configure
    )
    try:
        link.connect()
    except BaseException:
        link.close()
        raise
    return link


class Observer:
    """Asks one syncer, again and again.

    Args:
        target: see `find_syncer`; a run directory is looked at anew for every question, as long as it tells an address.
        keys: of this site, if the syncer has keys.

    Raises:
        ConfigurationError: there is no address in it.
    """

    def __init__(self, target: str, keys: SiteKeys | None = None) -> None:
        self._target, self._keys = target, keys
        self._address = find_syncer(target)
        self._was_told = False
        self._link = open_link(self._address.endpoint, keys)

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._link.close()

    def ask(self, timeout_s: float) -> Status:
        """The job at this moment.

        Raises:
            SyncerUnavailableError: nobody answered in this time.
            ConfigurationError: the syncer does not tell this observer.
        """
        end_s, again_s = time.monotonic() + timeout_s, 0.0
        while (now_s := time.monotonic()) < end_s:
            if now_s >= again_s:
                again_s = now_s + AGAIN_S
                self._say()
            status = self.listen(min(again_s, end_s) - now_s)
            if status is not None:
                return status
        failed = self._link.failed_handshakes
        why = explain(failed, self._keys) if failed else "Is it running, is the address right, and does it run this release?"
        raise SyncerUnavailableError(f"No syncer answered at {self._address.endpoint} in {timeout_s:g} s. {why}")

    def listen(self, duration_s: float) -> Status | None:
        """What the syncer says within this time, None if nothing: it tells the end of its job unasked.

        Raises:
            ConfigurationError: the syncer does not tell this observer.
        """
        end_s = time.monotonic() + duration_s
        while True:
            for event in self._link.poll(max(0.0, end_s - time.monotonic())):
                answer = _decoded(event.data) if isinstance(event, ControlReceived) else None
                if isinstance(answer, Status):
                    self._was_told = True
                    return answer
                if answer is not None and not (self._was_told and answer.reason == "token"):
                    raise ConfigurationError(printable(answer.detail, MAX_SENTENCE))
            if time.monotonic() >= end_s:
                return None

    def _say(self) -> None:
        with contextlib.suppress(ConfigurationError):
            address = find_syncer(self._target)
            if address.endpoint != self._address.endpoint:
                link = open_link(address.endpoint, self._keys)
                self._link.close()
                self._link = link
            self._address = address
        request = StatusRequest(protocol_version=PROTOCOL_VERSION, token=self._address.token)
        self._link.send_control(SYNCER, encode(_NOBODY, request))


def _decoded(data: bytes) -> Status | StatusRefused | None:
    try:
        return decode_to_observer(data)[1]
    except RemoteProtocolError:
        return None
