"""What holds for a learner's links holds for those to every shard of its syncer."""

from __future__ import annotations

import shutil
import time

import pytest

from lightning_diloco.errors import SyncerUnavailableError
from lightning_diloco.runtime.keys import SyncerKeys
from tests.runtime.key_helpers import Keys
from tests.runtime.test_blocked_bulk import RULE, shut_port, tell_bulk
from tests.runtime.test_revoked_while_away import REVOKED, end_without_a_word, in_place_of, train_until_fenced
from tests.runtime.test_sharded_client import shards

TCP = "tcp://127.0.0.1:0"


def test_a_join_without_a_way_for_the_payloads_of_one_shard_ends_with_its_port(tmp_path):
    with shards(tmp_path, bind=TCP) as syncer, shut_port("refused") as shut:
        number = shut.getsockname()[1]
        tell_bulk(syncer.services[1], number)
        with pytest.raises(SyncerUnavailableError) as caught:
            syncer.join(0, join_timeout_s=1.5)
    assert f"Nothing answers at tcp://127.0.0.1:{number}, and {syncer.endpoints[1]} does. {RULE}" in str(caught.value)


def test_a_learner_whose_key_one_shard_admits_no_more_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.link_care.REFUSED_S", 2.0)
    keys = Keys(tmp_path / "keys")
    site = keys.site("oslo")
    shutil.copytree(keys.folder, bare := tmp_path / "bare", ignore=shutil.ignore_patterns("admitted"))
    (tmp_path / "run").mkdir()
    with shards(tmp_path / "run", bind=TCP, keys=keys.syncer) as syncer:
        client = syncer.join(0, keys=site)

        def step() -> None:
            client.boundary(tokens=1)
            time.sleep(0.01)

        end_without_a_word(syncer.services[1])
        with in_place_of(syncer.services[1], SyncerKeys.read(bare)):
            train_until_fenced(client, step)
            client.close()
        assert REVOKED in str(client.fenced) and f"{syncer.endpoints[1]} has refused it for" in str(client.fenced)
