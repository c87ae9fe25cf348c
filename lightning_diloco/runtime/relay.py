"""Inner optimizer state on its way through the syncer: from a peer to the learner that asked, as it is.

The rules (`protocol.peer_state`) say who may send one and who gets it. Here memory is given to what they expect, up to what an optimizer
can have for the fragment, and the payload goes on without being looked into. Lives on the loop thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol.actions import DropPeerState, RelayPeerState, SyncerAction
from lightning_diloco.protocol.events import PeerStateArrived, PeerStateRelayed, SyncerEvent
from lightning_diloco.protocol.messages import Envelope, PeerState
from lightning_diloco.protocol.syncer import SyncerMachine
from lightning_diloco.protocol.wire import decode_learner_header, encode
from lightning_diloco.runtime.peer_state import max_state_bytes
from lightning_diloco.runtime.store import SyncerStore
from lightning_diloco.runtime.transport import SyncerTransport

__all__ = ["PeerStateRelay"]


class PeerStateRelay:
    """Performs what the rules decide on inner optimizer states.

    Args:
        machine: whose rules they are.
        transport: bound.
        store: gives the store; None before the founding.
        handle: gives the machine an event.
    """

    def __init__(
        self,
        machine: SyncerMachine,
        transport: SyncerTransport,
        *,
        store: Callable[[], SyncerStore | None],
        handle: Callable[[SyncerEvent], None],
    ) -> None:
        self._machine, self._transport, self._store, self._handle = machine, transport, store, handle
        self._arrived: memoryview | None = None
        self._on_way: dict[tuple[str, int], int] = {}

    def accepts(self, session: str, data: bytes, total_bytes: int) -> bool | None:
        """Whether memory may be given to a state that is offered; None: this is not the header of one."""
        try:
            _, header = decode_learner_header(data)
        except RemoteProtocolError:
            return None
        store = self._store()
        if not isinstance(header, PeerState) or store is None:
            return None
        # A ticket names its fragment, so what is expected is one of the layout's.
        if header.fragment_id >= len(store.layout.fragments) or total_bytes > max_state_bytes(store.layout.fragments[header.fragment_id]):
            return False
        return self._machine.peer_states.offered(session, header)

    def take(self, session: str, header: PeerState, payload: memoryview) -> None:
        """Take a state that is complete; whoever is not waiting for it any more does not get it."""
        self._arrived = payload
        self._handle(PeerStateArrived(session=session, header=header))
        self._arrived = None

    def perform(self, actions: Sequence[SyncerAction]) -> None:
        """Do what of these actions is about inner optimizer states."""
        for action in actions:
            if isinstance(action, RelayPeerState) and self._arrived is not None:
                options = self._machine.job.options
                envelope = Envelope(options.job_id, options.lineage, self._machine.job.epoch, 0)
                transfer_id = self._transport.send_payload(bytes.fromhex(action.session), encode(envelope, action.header), self._arrived)
                self._on_way[action.session, transfer_id] = action.header.ticket
            elif isinstance(action, DropPeerState):
                for (session, transfer_id), ticket in list(self._on_way.items()):
                    if ticket == action.ticket:
                        del self._on_way[session, transfer_id]
                        self._transport.cancel(bytes.fromhex(session), transfer_id)

    def ended(self, session: str, transfer_id: int) -> None:
        """A transfer has ended, delivered or not; others are not ours."""
        ticket = self._on_way.pop((session, transfer_id), None)
        if ticket is not None:
            self._handle(PeerStateRelayed(ticket=ticket))
