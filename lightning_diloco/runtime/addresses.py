"""Addresses as users write them: what is loopback, which two ports a syncer has, and how a learner reaches the second one.

A syncer listens at two ports, control and bulk. A learner is told one address, that of control; where bulk is, the syncer says when it
answers. The syncer may be bound to every interface (``0.0.0.0``), or stand behind a router that forwards its ports: it does not know by
which name others reach it. So **a learner dials bulk at the host that it has dialled itself**, at the port that it is told, and never
elsewhere: a syncer cannot lead it to another machine.

Beyond loopback bulk has the port after control's, so that whoever opens a firewall knows both beforehand, and a syncer that starts again
has the same ones. On loopback any free port will do.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from lightning_diloco.errors import ConfigurationError

__all__ = ["MAX_PORT", "bulk_after", "is_ipv6_only", "is_loopback", "own_host", "reach", "split"]

MAX_PORT = 65535
_TOLD = re.compile(r"tcp://[\w.:%*\[\]-]+:(?P<port>\d{1,5})", re.ASCII)
_SOMEWHERE = ("192.0.2.1", 9)
"""An address for documentation (RFC 5737): asking for the way to it sends nothing."""


def split(endpoint: str) -> tuple[str, int] | None:
    """Host, without the brackets of IPv6, and port of ``tcp://HOST:PORT``; None for anything else.

    Args:
        endpoint: as a user wrote it.
    """
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme != "tcp" or not host or port is None or parts.path or parts.username is not None:
        return None
    return host, port


def is_loopback(host: str) -> bool:
    """Whether nothing outside of this machine can be meant. A name that is not ``localhost`` may be anything.

    Args:
        host: a name or an address.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_ipv6_only(host: str) -> bool:
    """Whether a host has no IPv4 address. Asks the name service, so it may take a while.

    ZeroMQ dials one kind of address per socket; of a name with both kinds the IPv4 one is taken, since ``0.0.0.0`` is what most bind.

    Args:
        host: a name or an address, without brackets.
    """
    if ":" in host:
        return True
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return bool(socket.getaddrinfo(host, None, family)) and family == socket.AF_INET6
        except (OSError, UnicodeError):
            continue
    return False


def bulk_after(bind: str) -> str:
    """The bulk endpoint that goes with a control endpoint; "" leaves it to the transport: the same host and any free port.

    Args:
        bind: the control endpoint to listen at.

    Raises:
        ConfigurationError: there is no port after this one.
    """
    found = split(bind)
    if found is None or found[1] == 0 or is_loopback(found[0]):
        return ""
    if found[1] >= MAX_PORT:
        raise ConfigurationError(f"--bind {bind}: payloads take the port after it, and there is none. Give a port below {MAX_PORT}.")
    return f"{bind.rpartition(':')[0]}:{found[1] + 1}"


def reach(dialled: str, told: str) -> str:
    """Where a learner dials bulk: the host that it has dialled, the port that it was told.

    Args:
        dialled: the syncer's control endpoint, as the learner knows it.
        told: the syncer's bulk endpoint, as the syncer knows it.

    Raises:
        ConfigurationError: it is no address, or of another kind than the one that was dialled.
    """
    if dialled.startswith("inproc://") and told.startswith("inproc://"):
        return told
    match = _TOLD.fullmatch(told)
    if match is None or not dialled.startswith("tcp://") or not 0 < int(match["port"]) <= MAX_PORT:
        raise ConfigurationError(f"{told!r} is no address beside {dialled!r}; a syncer tells tcp://HOST:PORT")
    return f"{dialled.rpartition(':')[0]}:{int(match['port'])}"


def own_host() -> str:
    """What other machines probably call this one: its address on the way out, or its name where there is no way."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_SOMEWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
