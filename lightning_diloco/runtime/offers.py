"""Which payloads a learner gives memory to: those of its syncer that have the length which its own layout says, and no others."""

from __future__ import annotations

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.outer import Layout, payload_bytes, static_bytes
from lightning_diloco.protocol.messages import PeerState, Publication, StaticState
from lightning_diloco.protocol.wire import decode_syncer_header
from lightning_diloco.runtime.complaints import Complaints
from lightning_diloco.runtime.peer_state import PeerStates

__all__ = ["Offers"]


class Offers:
    """Judges what is offered to one learner; on the background thread.

    Args:
        layout: of what its syncer merges.
        config: of the job.
        peers: knows which inner state was asked for.
        complaints: where headers that are none are told.
    """

    def __init__(self, layout: Layout, config: SyncConfig, peers: PeerStates, complaints: Complaints) -> None:
        self._layout, self._config, self._peers, self._complaints = layout, config, peers, complaints

    def accepts(self, peer: bytes, data: bytes, total_bytes: int) -> bool | str:
        """Whether memory may be given to a payload that is offered: the transport's `accept`."""
        try:
            _, header = decode_syncer_header(data)
        except RemoteProtocolError as error:
            self._complaints.add("A payload of the syncer", error)
            return "refused"
        if isinstance(header, StaticState):
            return total_bytes == static_bytes(self._layout)
        if isinstance(header, Publication) and header.fragment_id < len(self._layout.fragments):
            fragment = self._layout.fragments[header.fragment_id]
            wire_dtype = "fp32" if header.parent is None else fragment.wire_dtype(self._config.wire_dtype)
            return total_bytes == payload_bytes(fragment.num_params, wire_dtype)
        return isinstance(header, PeerState) and self._peers.accepts(header, total_bytes)
