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
