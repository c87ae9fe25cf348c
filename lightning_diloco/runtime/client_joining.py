"""What a learner says of the job: hello, founding state, static state until it has joined; a description if the syncer has lost all.

Control messages may be lost with a connection, so everything that waits for an answer is said again every `AGAIN_S`: `Hello` until the
join is complete (the syncer answers a copy with what is missing and sends nothing twice), `Found` until the syncer asks for the state, and
a `Ping` meanwhile, so that a syncer that has nothing to say yet (another learner founds, slowly) still shows that it lives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.outer import buffer_of, load_static, pack_static
from lightning_diloco.outer.static import static_bytes
from lightning_diloco.protocol.actions import SendDescription
from lightning_diloco.protocol.events import JoinRequested, LearnerEvent, StaticInstalled
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.messages import Description, Found, FoundingFragment, FoundingStatic, Message, Ping, StaticState
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.global_state import FoundingState
from lightning_diloco.runtime.learner_store import LearnerStore

__all__ = ["Joining"]

_log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""What was not answered is said again after so long."""
PING_S = 1.0
"""The syncer is asked for a sign of life so often, or more often if the learner's patience is short."""


class Joining:
    """What a learner says until it is a member; lives on the background thread.

    Args:
        module: the user's; written to while the training thread waits in `join`.
        store: its host copies.
        feed: gives the machine an event.
        send: sends a control message.
        send_payload: sends a payload with its header.
        patience_s: silence of the syncer after which the learner gives up; signs of life are asked for often enough.
        founding: what a job that goes on from a checkpoint begins with, should this learner found it.
    """

    def __init__(
        self,
        *,
        module: nn.Module,
        store: LearnerStore,
        feed: Callable[[LearnerEvent], None],
        send: Callable[[Message], object],
        send_payload: Callable[[Message, memoryview], None],
        patience_s: float,
        founding: FoundingState,
    ) -> None:
        self._founding = founding
        self._module = module
        self._store = store
        self._feed = feed
        self._send = send
        self._send_payload = send_payload
        self.ping_s = min(PING_S, patience_s / 4)
        self._ping_at_s = 0.0
        self._again_at_s: float | None = None
        self._found: Found | None = None
        self._payloads: list[tuple[Message, Tensor]] = []
        self._is_asked = False

    def tick(self, now_s: float) -> None:
        """Say again what may have been lost."""
        if now_s >= self._ping_at_s:
            self._ping_at_s = now_s + self.ping_s
            self._send(Ping(number=0))
        if self._again_at_s is None:
            self._again_at_s = now_s + AGAIN_S  # the first hello is on its way
        elif now_s >= self._again_at_s:
            self._again_at_s = now_s + AGAIN_S
            self._feed(JoinRequested())
            if self._found is not None and not self._is_asked:
                self._send(self._found)

    def describe(self) -> None:
        """Found the job from the module's values of this moment; the training thread waits inside `join`."""
        self._is_asked = False
        layout = self._store.layout
        static = pack_static(self._module, layout)
        numbers, buffers = self._founding.numbers(layout), self._founding.buffers(layout)
        values = [self._store.found(f.fragment_id, n) for f, n in zip(layout.fragments, numbers, strict=True)]
        self._store.momentum.found(buffers)
        infos = tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in layout.fragments)
        self._payloads = [(FoundingFragment(fragment_id=i, crc=crc32(flat)), flat) for i, flat in enumerate(values)]
        self._payloads += [(FoundingFragment(fragment_id=i, crc=crc32(b), part="momentum"), b) for i, b in enumerate(buffers)]
        if static.numel():
            self._payloads.append((FoundingStatic(crc=crc32(static)), static))
        self._found = Found(
            layout=layout.to_bytes(),
            fragments=infos,
            static_bytes=static.numel(),
            static_crc=crc32(static),
            versions=numbers,
            has_momentum=bool(buffers),
        )
        self._send(self._found)

    def describe_again(self, action: SendDescription) -> None:
        """Tell a syncer that has lost everything what the job is; the training thread goes on.

        Frozen parameters are as they were; buffers are this learner's of now, and serve newcomers as a beginning.
        """
        layout = self._store.layout
        self._send(Description(layout=layout.to_bytes(), earlier=action.earlier))
        if not action.with_static or not static_bytes(layout):
            return
        try:
            static = pack_static(self._module, layout)
        except DiLoCoError as error:
            _log.warning("The syncer asks for the static state, and it cannot be given: %s Another learner will be asked.", error)
        else:
            self._send_payload(FoundingStatic(crc=crc32(static)), buffer_of(static))

    def send_state(self) -> None:
        """The syncer is ready for the founding state (it says so again if it had to begin anew)."""
        self._is_asked = True
        for header, payload in self._payloads:
            self._send_payload(header, buffer_of(payload))

    def install_static(self, header: StaticState, payload: memoryview) -> None:
        """Take the job's static state."""
        if crc32(payload) != header.crc:
            _log.warning("The static state did not have its checksum and was dropped.")
            return
        raw = torch.frombuffer(payload, dtype=torch.uint8) if len(payload) else torch.empty(0, dtype=torch.uint8)
        load_static(self._module, self._store.layout, raw)
        self._feed(StaticInstalled())

    def end(self) -> None:
        """The join is complete: nothing of it is needed any more."""
        self._found, self._payloads = None, []
