"""What a syncer prints when it is ready: the line with which a learner joins, and what has to be open and known for that."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_diloco.runtime.addresses import is_loopback, own_host, split
from lightning_diloco.runtime.keys import SyncerKeys, read_admitted

__all__ = ["invite"]

_EVERYWHERE = ("0.0.0.0", "::", "*")


def invite(endpoint: str, bulk: str, keys: SyncerKeys | None, others: Sequence[tuple[str, str]] = ()) -> str:
    """The lines for whoever runs the learners.

    Args:
        endpoint: where control listens.
        bulk: where payloads go.
        keys: of the syncer; None: it has none.
        others: the same two addresses of each further shard.
    """
    address, payloads = split(endpoint), split(bulk)
    assert address is not None and payloads is not None
    host, port = address
    is_local = is_loopback(host)
    if host in _EVERYWHERE:
        endpoint = f"tcp://{own_host()}:{port}"
    folder = "" if keys is None and is_local else ", keys='insecure'" if keys is None else ", keys='DIR'"
    lines = [f"Syncer ready. A learner joins with DecoupledDiLoCoStrategy(syncer={endpoint!r}{folder})."]
    if not is_local:
        known = [split(told) for pair in others for told in pair]
        ports = sorted([port, payloads[1], *(found[1] for found in known if found is not None)])
        named = f"{', '.join(map(str, ports[:-1]))} and {ports[-1]}"
        lines.append(f"Ports {named} (TCP) of this machine must be reachable, under these numbers, by every site.")
    if keys is None and not is_local:
        lines.append(
            "WARNING: --insecure. Nothing is encrypted, and whoever reaches these ports can read the model, change it, and end the job."
        )
    if keys is not None:
        names = ", ".join(sorted(read_admitted(keys.admitted).values())) or "no site yet"
        lines.append(f"DIR is made at the site by: lightning-diloco keygen DIR --syncer {keys.public.hex()}")
        lines.append(f"and admitted here by: lightning-diloco keygen {keys.folder} --admit NAME KEY (admitted: {names})")
    return "\n".join(lines) + "\n"
