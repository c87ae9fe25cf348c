"""The numbers of the transport, and what goes wrong when they are too small or too large."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_diloco.errors import ConfigurationError

__all__ = ["TransportOptions", "TransportStats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportOptions:
    """Limits and times of one transport.

    Raises:
        ConfigurationError: a number is not positive, or `resend_max_s` is below `resend_after_s`.
    """

    window_chunks: int = 8
    """Chunks of 1 MiB that a peer may have under way to us. Too few: a long link idles. Too many: more memory per peer."""

    turn_chunks: int = 2
    """Chunks sent, hashed and taken in one turn of `poll`. More: control waits longer behind bulk."""

    resend_after_s: float = 5.0
    """A payload without progress for so long is offered again. Shorter than a round trip: needless offers."""

    resend_max_s: float = 60.0
    """The wait doubles at each miss up to this. Longer: slower recovery after a long outage."""

    abandon_after_s: float = 600.0
    """A half-received payload of a peer that sends nothing more of it is freed after so long; a later offer starts anew."""

    close_linger_s: float = 0.2
    """`close` gives what was sent last so long to leave, for instance a good-bye."""

    heartbeat_interval_s: float = 2.0
    """ZeroMQ pings on a silent connection (tcp only)."""

    heartbeat_timeout_s: float = 15.0
    """A control connection without an answer for so long is cut and opened again, one for bulk after four times as long (tcp only). Bulk's
    has to carry a chunk in that time."""

    def __post_init__(self) -> None:
        """Check every number."""
        for name in ("window_chunks", "turn_chunks", "resend_after_s", "abandon_after_s", "heartbeat_interval_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name}={getattr(self, name)!r} must be positive; leave it out for the default")
        if self.resend_max_s < self.resend_after_s:
            raise ConfigurationError(
                f"resend_max_s={self.resend_max_s} is below resend_after_s={self.resend_after_s}; raise it to at least that"
            )
        if self.close_linger_s < 0 or self.heartbeat_timeout_s < self.heartbeat_interval_s:
            raise ConfigurationError(
                f"close_linger_s={self.close_linger_s} must not be negative and heartbeat_timeout_s={self.heartbeat_timeout_s} "
                f"not below heartbeat_interval_s={self.heartbeat_interval_s}; leave them out for the defaults"
            )


@dataclass(slots=True)
class TransportStats:
    """Counters since the transport was made; only grow.

    "Up" is from learners to the syncer, "down" from the syncer to learners, on both sides. Bytes are those of payload chunks
    handed to or taken from the socket, repetitions included.
    """

    bytes_up: int = 0
    """Payload bytes on the uplink."""

    bytes_down: int = 0
    """Payload bytes on the downlink."""

    payloads_sent: int = 0
    """Payloads acknowledged by their receiver."""

    payloads_received: int = 0
    """Payloads delivered here."""

    control_sent: int = 0
    """Control messages of the user that the socket took."""

    control_received: int = 0
    """Control messages of the user that arrived."""

    drops: dict[str, int] = field(default_factory=dict)
    """What was ignored, refused or repeated, by reason."""

    def count(self, reason: str) -> None:
        """Count one drop.

        Args:
            reason: a word for it.
        """
        self.drops[reason] = self.drops.get(reason, 0) + 1
