"""A peer that speaks the real transport and says whatever a test wants, word by word."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import buffer_of, encode, plan_layout
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import (
    PROTOCOL_VERSION,
    Contribution,
    Envelope,
    Hello,
    Message,
    Progress,
    Publication,
    Ready,
    Welcome,
)
from lightning_diloco.protocol.wire import decode_from_syncer, decode_syncer_header
from lightning_diloco.protocol.wire import encode as encode_message
from lightning_diloco.runtime.checksum import crc32
from lightning_diloco.runtime.transport import SYNCER, ControlReceived, LearnerTransport, PayloadDelivered, PayloadFailed, PayloadReceived


class RawPeer:
    """A process's worth of transport; what arrives is kept in `heard`, payload headers in `published`."""

    def __init__(
        self,
        endpoint: str,
        module: nn.Module,
        config: SyncConfig,
        context: Any = None,
        transport: type[LearnerTransport] = LearnerTransport,
        nonce: bytes | None = None,
    ) -> None:
        self.layout = plan_layout(
            module, num_fragments=config.num_fragments, merge=config.merge, mean_patterns=config.mean_patterns, include_frozen=False
        )
        self.config = config
        self.nonce = secrets.token_bytes(16) if nonce is None else nonce
        self.envelope = Envelope("", "", 0, 0)
        self.transport = transport(endpoint, nonce=self.nonce, accept=lambda *_: True, context=context)
        self.transport.connect()
        self.heard: list[Message] = []
        self.published: list[Publication] = []
        self.ends: dict[int, str | None] = {}

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.transport.close()

    def say(self, message: Message, **envelope: Any) -> None:
        fields = dict(zip(("job_id", "lineage", "epoch", "incarnation"), _fields(self.envelope), strict=True)) | envelope
        self.say_bytes(encode_message(Envelope(**fields), message))

    def say_bytes(self, data: bytes) -> None:
        self.transport.send_control(SYNCER, data)

    def hello(self, **fields: Any) -> None:
        standard = {
            "protocol_version": PROTOCOL_VERSION,
            "token": "",
            "learner_id": None,
            "nonce": self.nonce.hex(),
            "takeover_token": "",
            "config": json.dumps(self.config.as_dict()).encode(),
            "fingerprint": self.layout.fingerprint(),
        }
        self.say(Hello(**(standard | fields)))

    def offer(self, header: Message, payload: Any, **envelope: Any) -> int:
        fields = dict(zip(("job_id", "lineage", "epoch", "incarnation"), _fields(self.envelope), strict=True)) | envelope
        data = header if isinstance(header, bytes) else encode_message(Envelope(**fields), header)
        return self.transport.send_payload(SYNCER, data, payload)

    def poll(self, timeout_s: float = 0.05) -> None:
        for event in self.transport.poll(timeout_s):
            if isinstance(event, ControlReceived):
                envelope, message = decode_from_syncer(event.data)
                if isinstance(message, Welcome):
                    self.envelope = envelope
                    self.transport.connect_bulk(message.shards[0].bulk_endpoint)
                self.heard.append(message)
            elif isinstance(event, PayloadReceived):
                header = decode_syncer_header(event.header)[1]
                if isinstance(header, Publication):
                    self.published.append(header)
            elif isinstance(event, PayloadDelivered):
                self.ends[event.transfer_id] = None
            elif isinstance(event, PayloadFailed):
                self.ends[event.transfer_id] = event.reason

    def hear(self, kind: type[Message], limit_s: float = 10.0, **fields: Any) -> Any:
        """Wait for a message of this kind with these fields; it is taken out of `heard`."""
        end_s = time.monotonic() + limit_s
        while True:
            for message in self.heard:
                if isinstance(message, kind) and all(getattr(message, k) == v for k, v in fields.items()):
                    self.heard.remove(message)
                    return message
            assert time.monotonic() < end_s, f"no {kind.__name__} {fields} among {self.heard}"
            self.poll()

    def end_of(self, transfer_id: int, limit_s: float = 10.0) -> str | None:
        end_s = time.monotonic() + limit_s
        while transfer_id not in self.ends:
            assert time.monotonic() < end_s, "the transfer did not end"
            self.poll()
        return self.ends[transfer_id]

    def poll_for(self, duration_s: float) -> None:
        end_s = time.monotonic() + duration_s
        while time.monotonic() < end_s:
            self.poll()

    def join(self, learner_id: int | None = None, **fields: Any) -> Welcome:
        """Become a member of a founded job."""
        self.hello(learner_id=learner_id, **fields)
        welcome = self.hear(Welcome, role="joiner")
        end_s = time.monotonic() + 10
        while len(self.published) < len(self.layout.fragments):
            assert time.monotonic() < end_s
            self.poll()
        self.say(Ready())
        return welcome

    def contribution(self, fragment_id: int, seq: int, d: torch.Tensor, **fields: Any) -> tuple[Contribution, Any]:
        """A header and its payload; base is the version that was published last."""
        payload = encode(d, self.config.wire_dtype)
        newest = [p for p in self.published if p.fragment_id == fragment_id][-1]
        standard = {
            "fragment_id": fragment_id,
            "seq": seq,
            "round_id": None,
            "base": newest.version,
            "base_merged_seq": 0,
            "steps": 1,
            "tokens": 8,
            "inner_step": 1,
            "total_tokens": 8,
            "crc": crc32(payload),
        }
        return Contribution(**(standard | fields)), buffer_of(payload)

    def step(self, inner_step: int, tokens: int) -> None:
        self.say(Progress(inner_step=inner_step, tokens=tokens))

    @property
    def versions(self) -> dict[int, Version]:
        return {p.fragment_id: p.version for p in self.published}


def _fields(envelope: Envelope) -> tuple[Any, ...]:
    return envelope.job_id, envelope.lineage, envelope.epoch, envelope.incarnation
