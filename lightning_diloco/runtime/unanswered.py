"""Why no syncer answers, as far as a learner can tell, and what to do about it."""

from __future__ import annotations

from collections.abc import Collection

from lightning_diloco.runtime.keys import SiteKeys

__all__ = ["explain"]


def explain(failed_handshakes: Collection[str], keys: SiteKeys | None) -> str:
    """The sentence for a learner that nobody answered.

    Args:
        failed_handshakes: what its transport has seen.
        keys: of this site, if it has any.
    """
    if not failed_handshakes:
        return "Start it, or check address and port."
    if keys is None:
        return (
            "Somebody listens there and hangs up: a syncer with keys, probably. Pass keys=DIR with the folder that lightning-diloco "
            "keygen makes at this site (to a command: --keys DIR)."
        )
    if "unknown_key" in failed_handshakes:
        return (
            f"The syncer there does not admit this site's key: run lightning-diloco keygen DIR --admit NAME {keys.public.hex()} at the "
            "syncer, with its folder."
        )
    if "no_keys" in failed_handshakes:
        return "Somebody listens there without keys, and this learner speaks to nobody without: start the syncer with --keys DIR."
    return (
        "Somebody listens there and hangs up: its key is not the one in this site's syncer.key, or it is no syncer. Compare with what "
        "lightning-diloco keygen printed at the syncer."
    )


def explain_bulk(control: str, bulk: str, failed_handshakes: Collection[str]) -> str:
    """The sentences for a learner whose syncer answers on control, with no connection on bulk.

    Args:
        control: the address that was dialled.
        bulk: the address at which the syncer serves payloads, as this learner dials it.
        failed_handshakes: what its transport has seen there.
    """
    port = bulk.rpartition(":")[2]
    seen = f"Nothing answers at {bulk}"
    if failed_handshakes:
        seen = f"What answers at {bulk} hangs up (is that port forwarded to another machine?)"
    return (
        f"{seen}, and {control} does. A learner needs both ports of its syncer, the one for control and the one for payloads, which is the "
        f"port after it unless the syncer is on this machine: let TCP port {port} through the firewall, and behind a router forward it "
        "under the same number."
    )


def explain_refusal(endpoint: str, refused_s: float, keys: SiteKeys) -> str:
    """The sentence for a member whose key is refused.

    Args:
        endpoint: of the syncer.
        refused_s: for so long.
        keys: of this site.
    """
    return (
        f"The key of this site was revoked: {endpoint} has refused it for {refused_s:.0f} s, so this learner takes no part in the job any "
        f"more. If that is a mistake, run lightning-diloco keygen DIR --admit NAME {keys.public.hex()} at the syncer and start it again."
    )
