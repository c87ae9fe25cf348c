"""The gate and its folder: what is a revocation, what is none, and that none is overlooked."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from zmq.utils import z85

from lightning_diloco.runtime.keys import SiteKeys, admit, read_sites, revoke
from lightning_diloco.runtime.transport import gate as gate_module
from lightning_diloco.runtime.transport.gate import DOUBT_LOOKS, MAX_PEERS_PER_KEY, Gate
from tests.runtime.key_helpers import Keys

PEER, OTHER = b"p" * 16, b"o" * 16


class Frame:
    """A message's first part, with the property that ZeroMQ attaches."""

    def __init__(self, site: SiteKeys) -> None:
        self._key = z85.encode(site.public).decode()

    def get(self, name: str) -> str:
        return self._key if name == "User-Id" else "127.0.0.1"


@pytest.fixture
def keys(tmp_path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture
def paris(keys) -> SiteKeys:
    return keys.site("paris")


@pytest.fixture
def gate(keys, paris) -> Gate:
    gate = Gate(keys.syncer, lambda _: None)
    assert gate.admits(PEER, Frame(paris)) and gate.look() == []
    return gate


def test_whose_key_is_not_known_to_be_admitted_is_told_nothing(gate, keys, paris):
    assert gate.knows(PEER) and not gate.knows(OTHER)
    keys.revoke("paris")
    assert gate.look() == [PEER] and not gate.knows(PEER)


def test_a_peer_that_its_own_site_makes_the_gate_forget_before_it_is_revoked_is_not_known(gate, keys, paris):
    """No look names it, so whoever relied on that would go on telling it."""
    for number in range(MAX_PEERS_PER_KEY):
        assert gate.admits(number.to_bytes(16, "big"), Frame(paris))
    assert not gate.knows(PEER)
    keys.revoke("paris")
    assert PEER not in gate.look() and not gate.knows(PEER)


@contextmanager
def no_descriptor_is_left() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        yield
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_without_a_descriptor_left_nobody_is_revoked_and_a_revocation_comes_afterwards(gate, keys, paris, caplog):
    with no_descriptor_is_left():
        for _ in range(2 * DOUBT_LOOKS):
            assert gate.look() == [] and gate.admits(PEER, Frame(paris))
    assert sum("cannot be read now" in record.getMessage() for record in caplog.records) == 1
    keys.revoke("paris")
    assert gate.look() == [PEER] and not gate.admits(PEER, Frame(paris))


@pytest.mark.parametrize("instead", ["loop", "file", "nothing"])
def test_a_folder_that_cannot_be_read_is_as_it_was(gate, keys, paris, caplog, instead):
    folder = keys.syncer.admitted
    folder.rename(aside := folder.with_name("aside"))
    if instead == "loop":
        folder.symlink_to(folder)
    elif instead == "file":
        folder.write_text("")
    for _ in range(2 * DOUBT_LOOKS):
        assert gate.look() == [] and gate.admits(PEER, Frame(paris))
        assert not gate.has_changed(), "every message would cause a look"
    assert sum("cannot be read now" in record.getMessage() for record in caplog.records) == 1
    folder.unlink(missing_ok=True)
    aside.rename(folder)
    assert gate.has_changed()
    assert gate.look() == [] and gate.admits(PEER, Frame(paris)) and not gate.has_changed()
    keys.revoke("paris")
    assert gate.look() == [PEER]


def test_a_folder_that_goes_while_it_is_read_is_as_it_was(gate, keys, paris, monkeypatch):
    keys.site("oslo")
    folder = keys.syncer.admitted

    def read_too_late(path):
        folder.rename(folder.with_name("aside"))
        return read_sites(path)

    with monkeypatch.context() as patch:
        patch.setattr(gate_module, "read_sites", read_too_late)
        assert gate.look() == []
    assert gate.look() == [] and gate.admits(PEER, Frame(paris))


def test_what_was_revoked_while_the_folder_was_away_is_revoked_when_it_is_back(gate, keys, paris):
    folder = keys.syncer.admitted
    folder.rename(aside := folder.with_name("aside"))
    assert gate.look() == []
    (aside / "paris.key").unlink()
    aside.rename(folder)
    assert gate.look() == [PEER] and not gate.admits(PEER, Frame(paris))


@pytest.mark.parametrize("num_looks", [1, DOUBT_LOOKS, DOUBT_LOOKS + 1])
def test_a_folder_that_is_copied_back_file_by_file_revokes_nobody_at_once(gate, keys, paris, num_looks):
    """A look that a message makes comes between any two files."""
    folder = keys.syncer.admitted
    folder.rename(aside := folder.with_name("aside"))
    folder.mkdir(mode=0o700)
    assert gate.look(is_due=False) == []
    for _ in range(min(num_looks, DOUBT_LOOKS)):
        assert gate.look() == [] and gate.admits(PEER, Frame(paris))
    if num_looks > DOUBT_LOOKS:
        assert gate.look() == [PEER] and not gate.admits(PEER, Frame(paris))
        return
    (folder / "paris.key").write_text((aside / "paris.key").read_text())
    (folder / "paris.key").chmod(0o644)
    assert gate.look() == [] and gate.admits(PEER, Frame(paris))
    keys.revoke("paris")
    assert gate.look() == [PEER], "the folder is an old one by now, and what it loses is revoked at once"


def test_a_folder_that_was_never_there_admits_nobody_and_costs_no_look(keys):
    oslo = keys.site("oslo", is_admitted=False)
    gate = Gate(keys.syncer, lambda _: None)
    assert not gate.admits(PEER, Frame(oslo)) and gate.look() == [] and not gate.has_changed()
    admit(keys.folder, "oslo", oslo.public.hex())
    assert gate.has_changed() and gate.look() == [] and gate.admits(PEER, Frame(oslo))


def test_a_link_that_leads_nowhere_hides_no_revocation(gate, keys):
    (keys.syncer.admitted / ".#paris.key").symlink_to("editor@host.1:2")
    assert gate.look() == []
    keys.revoke("paris")
    assert gate.look() == [PEER]


def test_a_revocation_while_the_gate_is_made_is_seen(keys, paris, monkeypatch):
    def read_and_revoke(folder):
        found = read_sites(folder)
        revoke(keys.folder, "paris")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(gate_module, "read_sites", read_and_revoke)
        gate = Gate(keys.syncer, lambda _: None)
    assert gate.admits(PEER, Frame(paris))
    assert gate.look() == [PEER]


def test_a_file_in_the_place_of_another_is_seen_though_size_and_time_are_the_same(gate, keys, paris):
    path, oslo = keys.syncer.admitted / "paris.key", keys.site("oslo", is_admitted=False)
    about, swap = path.stat(), keys.root / "swap"
    swap.write_text(f"{oslo.public.hex()}\n")
    swap.chmod(0o644)
    os.utime(swap, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert (swap.stat().st_size, swap.stat().st_mtime_ns) == (about.st_size, about.st_mtime_ns)
    swap.replace(path)
    assert gate.look() == [PEER]
    assert gate.admits(OTHER, Frame(oslo)) and not gate.admits(PEER, Frame(paris))


@pytest.mark.parametrize("harm", ["empty", "half", "loop", "loose"])
def test_a_file_that_cannot_be_taken_for_a_moment_revokes_nobody(gate, keys, paris, caplog, harm):
    path = keys.syncer.admitted / "paris.key"
    text = path.read_text()
    for num_looks in (1, DOUBT_LOOKS, DOUBT_LOOKS + 1):
        if harm == "loop":
            path.unlink()
            path.symlink_to(path)
        else:
            path.write_text({"empty": "", "half": text[:30], "loose": text}[harm])
            path.chmod(0o666 if harm == "loose" else 0o644)
        for _ in range(min(num_looks, DOUBT_LOOKS)):
            assert gate.look() == [] and gate.admits(PEER, Frame(paris))
        if num_looks > DOUBT_LOOKS:
            assert gate.look() == [PEER] and not gate.admits(PEER, Frame(paris))
        path.unlink()
        path.write_text(text)
        path.chmod(0o644)
        assert gate.look() == [] and gate.admits(PEER, Frame(paris))
    said = [record.getMessage() for record in caplog.records]
    assert sum("cannot be taken" in line for line in said) == 3 and sum("The key of site paris is revoked" in line for line in said) == 1


def test_a_file_that_others_may_write_admits_nobody(gate, keys):
    oslo = keys.site("oslo", is_admitted=False)
    path = keys.syncer.admitted / "oslo.key"
    path.write_text(f"{oslo.public.hex()}\n")
    path.chmod(0o646)
    assert gate.look() == [] and not gate.admits(OTHER, Frame(oslo))
    path.chmod(0o644)
    assert gate.look() == [] and gate.admits(OTHER, Frame(oslo))


def test_who_goes_on_speaking_is_not_forgotten_for_those_who_come(gate, keys, paris):
    for number in range(2 * (MAX_PEERS_PER_KEY - 10)):
        assert gate.admits(number.to_bytes(16, "big"), Frame(paris))
        if number == MAX_PEERS_PER_KEY - 10:
            assert gate.admits(PEER, Frame(paris))
    keys.revoke("paris")
    shut_out = gate.look()
    assert PEER in shut_out and len(shut_out) == MAX_PEERS_PER_KEY


def test_a_question_that_cannot_be_answered_lets_nobody_in(gate, paris):
    assert gate.callback("lightning-diloco", z85.encode(paris.public))
    assert not gate.callback("lightning-diloco", b"\xff" * 40)
