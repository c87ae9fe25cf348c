"""A syncer's keys and those of sites, as keygen makes them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from lightning_diloco.runtime.keys import SECRET, SiteKeys, SyncerKeys, admit, make_pair, revoke, trust_syncer
from lightning_diloco.runtime.transport import LearnerTransport


class Keys:
    """One syncer with sites; folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "syncer"
        self.public = make_pair(self.folder).hex()

    @property
    def syncer(self) -> SyncerKeys:
        return SyncerKeys.read(self.folder)

    def site(self, name: str, *, is_admitted: bool = True, syncer: str | None = None) -> SiteKeys:
        folder = self.site_folder(name)
        public = trust_syncer(folder, syncer or self.public).hex()
        if is_admitted:
            admit(self.folder, name, public)
        return SiteKeys.read(folder)

    def site_folder(self, name: str) -> Path:
        return self.root / name

    def revoke(self, name: str) -> None:
        revoke(self.folder, name)

    def secrets(self) -> list[bytes]:
        """All secrets in the forms in which they could be written down."""
        from zmq.utils import z85

        texts = [path.read_text().split()[-1] for path in self.root.glob(f"*/{SECRET}")]
        return [form for text in texts for form in (text.encode(), bytes.fromhex(text), z85.encode(bytes.fromhex(text)))]


def transport_with(keys: SiteKeys | None) -> Any:
    """What a `RawPeer` speaks through."""
    return LearnerTransport if keys is None else functools.partial(LearnerTransport, configure=keys.configure)
