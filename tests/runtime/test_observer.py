"""The observer's end: addresses, answers that do not come, and answers that are none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError, SyncerUnavailableError
from lightning_diloco.protocol.messages import Envelope, Ping, StatusRefused
from lightning_diloco.protocol.wire import decode_to_observer, encode
from lightning_diloco.runtime.observer import Observer, find_syncer
from lightning_diloco.runtime.service import SyncerService
from lightning_diloco.runtime.service_options import ServiceOptions
from lightning_diloco.runtime.transport import SyncerTransport
from tests.cli.test_status_table import ACTIVE, STATUS
from tests.fuzzing.values import mutated
from tests.runtime.job_helpers import Background, until
from tests.runtime.key_helpers import Keys

SEED = 20251128
NOBODY = Envelope("", "", 0, 0)


@contextmanager
def serving(run_dir: Path, **options: Any) -> Iterator[str]:
    """A syncer that waits for its founder; yields its address, and stops it at the end."""
    run_dir.mkdir()
    service = SyncerService(ServiceOptions(run_dir=run_dir, **options))
    try:
        yield service.start()
    finally:
        service.finish("stopped")
        assert service.join(30.0) and service.error is None


def test_where_nobody_is_the_observer_gives_up_with_a_sentence():
    with (
        Observer("tcp://127.0.0.1:1") as observer,
        pytest.raises(SyncerUnavailableError, match=r"No syncer answered at tcp://127\.0\.0\.1:1 in 0\.3 s"),
    ):
        observer.ask(0.3)


@pytest.mark.parametrize(
    "target", ["tcp://x", "tcp://", "tcp://h:port", "tcp://h:99999", "ipc:///tmp/x", "http://127.0.0.1:80", "no/folder"]
)
def test_what_is_no_address_is_a_sentence(target):
    with pytest.raises(ConfigurationError, match="tcp://HOST:PORT"):
        find_syncer(target)


@pytest.mark.parametrize("text", ["", "[]", "{}", "17", '{"endpoint"', "\x00"])
def test_a_file_without_an_address_is_a_sentence(tmp_path, text):
    (tmp_path / "syncer.json").write_text(text)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        find_syncer(str(tmp_path))


def test_a_folder_without_a_syncer_is_a_sentence(tmp_path):
    with pytest.raises(ConfigurationError, match="no syncer has said its address there"):
        find_syncer(str(tmp_path))


def test_while_a_syncer_starts_again_its_last_address_holds_and_its_last_token_is_no_error(tmp_path):
    """A shard has no `syncer.json` until it serves again; a syncer of local mode has another token, and is asked with the old one."""
    said = tmp_path / "syncer.json"
    with ExitStack() as stack:
        with serving(tmp_path / "first", observer_token="one") as endpoint:
            said.write_text(json.dumps({"endpoint": endpoint, "observer_token": "none"}))
            with Observer(str(tmp_path)) as stranger, pytest.raises(ConfigurationError, match="tells only who can read"):
                stranger.ask(30.0)
            said.write_text(json.dumps({"endpoint": endpoint, "observer_token": "one"}))
            observer = stack.enter_context(Observer(str(tmp_path)))
            assert observer.ask(30.0).status == "waiting"
        assert observer.listen(10.0).status == "stopped"
        for gone in (said.unlink, lambda: said.write_text('{"endpoint":'), lambda: said.write_text('{"endpoint": "nonsense"}')):
            gone()
            with pytest.raises(SyncerUnavailableError, match=f"No syncer answered at {endpoint} in 0.3 s"):
                observer.ask(0.3)
        with serving(tmp_path / "second", observer_token="two", bind=endpoint):
            with pytest.raises(SyncerUnavailableError):
                observer.ask(2.0)
            said.write_text(json.dumps({"endpoint": endpoint, "observer_token": "two"}))
            assert observer.ask(30.0).status == "waiting"
        with serving(tmp_path / "third", observer_token="three") as elsewhere:
            said.write_text(json.dumps({"endpoint": elsewhere, "observer_token": "three"}))
            assert elsewhere != endpoint and observer.ask(30.0).status == "waiting"


def test_a_site_that_is_revoked_while_it_watches_is_not_told_the_end(tmp_path, caplog):
    """Its connection stays open, and there is no question of it to be dropped."""
    keys = Keys(tmp_path / "keys")
    sites = [keys.site("home"), keys.site("away")]
    with ExitStack() as stack:
        with serving(tmp_path / "run", keys=keys.syncer) as endpoint:
            home, away = (stack.enter_context(Observer(endpoint, site)) for site in sites)
            assert home.ask(30.0).status == away.ask(30.0).status == "waiting"
            keys.revoke("away")
            until(lambda: "The key of site away is revoked" in caplog.text)
        assert home.listen(10.0).status == "stopped" and away.listen(1.0) is None


def test_a_syncer_with_keys_tells_those_that_it_admits(tmp_path):
    keys = Keys(tmp_path / "keys")
    service = SyncerService(ServiceOptions(run_dir=tmp_path, keys=keys.syncer))
    endpoint = service.start()
    try:
        with Observer(endpoint, keys.site("home")) as observer:
            assert observer.ask(30.0).status == "waiting"
        for stranger in (None, keys.site("stranger", is_admitted=False)):
            with Observer(endpoint, stranger) as observer, pytest.raises(SyncerUnavailableError, match="keygen"):
                observer.ask(2.0)
    finally:
        service.finish("stopped")
        assert service.join(30.0)


def test_the_sentence_of_a_syncer_that_does_not_tell_cannot_move_a_cursor():
    liar = SyncerTransport("tcp://127.0.0.1:0", accept=lambda *_: False)
    liar.bind()
    try:
        with Observer(liar.control_endpoint) as observer:
            asking = Background(lambda: observer.ask(20.0))
            peers: list[bytes] = []
            until(lambda: peers.extend(e.peer for e in liar.poll(0.05)) or bool(peers))
            liar.send_control(peers[0], encode(NOBODY, StatusRefused(reason="token", detail="No.\n\x1b[2J\x9b")))
            with pytest.raises(ConfigurationError) as raised:
                asking.result()
            assert str(raised.value) == "No.??[2J?"
    finally:
        liar.close()


def test_a_syncer_that_lies_is_not_believed():
    dice = random.Random(SEED)
    liar = SyncerTransport("tcp://127.0.0.1:0", accept=lambda *_: False)
    liar.bind()
    good = encode(NOBODY, STATUS)
    lies = [
        b"",
        b"\xc1",
        good[:-1],
        encode(NOBODY, Ping(number=1)),
        *(mutated(dice, good, encode(NOBODY, Ping(number=2))) for _ in range(200)),
    ]
    lies += [
        encode(NOBODY, msgspec.structs.replace(STATUS, uptime=7.0, tokens=-1)),
        encode(NOBODY, msgspec.structs.replace(STATUS, learners=300 * (ACTIVE,))),
    ]
    try:
        with Observer(liar.control_endpoint) as observer:
            asking = Background(lambda: observer.ask(20.0))
            peers: list[bytes] = []
            until(lambda: peers.extend(e.peer for e in liar.poll(0.05)) or bool(peers))
            for lie in [x for x in lies if not _is_answer(x)] + [good]:
                until(lambda lie=lie: liar.send_control(peers[0], lie))
            assert asking.result() == STATUS
    finally:
        liar.close()


def _is_answer(data: bytes) -> bool:
    try:
        decode_to_observer(data)
    except RemoteProtocolError:
        return False
    return True
