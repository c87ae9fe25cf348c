"""A learner of several shards, in one process: what crosses from one part to another, and who is let in."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import zmq
from torch import nn

from lightning_diloco.errors import ConfigurationError, FencedError, JoinRefusedError, ShardedSyncerError
from lightning_diloco.outer import buffer_of, parts_of
from lightning_diloco.protocol.identity import Version
from lightning_diloco.protocol.messages import PeerState, Sharded
from lightning_diloco.runtime import client_waiting, reporting, sharded_client
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.client_options import planned_layout
from lightning_diloco.runtime.opening import open_job
from lightning_diloco.runtime.peer_state import PeerStates
from lightning_diloco.runtime.rejoin import InnerState, pack
from lightning_diloco.runtime.service import ServiceOptions, SyncerService
from lightning_diloco.runtime.sharded_client import ShardedClient, ShardedPeers, join_job
from lightning_diloco.runtime.snapshot import SnapshotStore
from tests.runtime.job_helpers import CONFIG, Background, make_module, poison, step, sum_up, train, until

PLAIN = dataclasses.replace(CONFIG, wire_dtype="fp32", norm_gate=None)


class Shards:
    """The services of one syncer, on threads."""

    def __init__(self, folder: Path, num_shards: int, **options) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.folders = [folder / str(shard) for shard in range(num_shards)]
        self.services: list[SyncerService] = []
        told: list[str] = []
        for shard in [*range(1, num_shards), 0]:
            self.folders[shard].mkdir()
            fields = {"run_dir": self.folders[shard], "bind": f"inproc://{folder.name}-{shard}", "supervised": True} | options
            service = SyncerService(
                ServiceOptions(shard=shard, num_shards=num_shards, shard_endpoints=() if shard else tuple(told), **fields),
                None if "keys" in options else self.context,  # one context has room for one syncer that asks who is admitted
            )
            told.append(service.start())
            self.services.append(service)
        self.services.insert(0, self.services.pop())
        self.endpoints = [told[-1], *told[:-1]]

    def options(self, learner_id: int | None, **options) -> ClientOptions:
        return ClientOptions(**{"endpoint": self.endpoints[0], "config": PLAIN, "learner_id": learner_id} | options)

    def join(self, learner_id: int | None, module: nn.Module | None = None, **options) -> ShardedClient:
        client, _ = join_job(make_module() if module is None else module, self.options(learner_id, **options), context=self.context)
        assert isinstance(client, ShardedClient)
        return client

    def finish(self) -> list[dict]:
        for service in self.services:
            service.finish("finished")
        for service in self.services:
            assert service.join(20) and service.error is None
        return [sum_up(folder, "finished") for folder in self.folders]

    def close(self) -> None:
        for service in self.services:
            service.finish("failed")
            service.join(20)
        self.context.destroy(linger=0)


@contextmanager
def shards(folder: Path, num_shards: int = 2, **options) -> Iterator[Shards]:
    found = Shards(folder, num_shards, **options)
    try:
        yield found
    finally:
        found.close()


def test_one_shards_refusal_of_nan_mends_the_fragments_of_all_at_one_boundary(tmp_path):
    """Mended one by one, each part would be poisoned again by the next step of the others."""
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2))
    with shards(tmp_path) as syncer:
        client = syncer.join(0, module)
        healed: list[int] = []
        client.on_heal = lambda parameters: healed.append(len(parameters))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        for _ in range(3):
            inner_steps(client, module, optimizer, 12)
            count = poison(client, module, healed)
            assert len(healed) > count
            for _ in range(50):  # a part whose lock was taken at that boundary follows at the next one that finds it free
                time.sleep(0.002)
                client.boundary(tokens=0)
            assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
        inner_steps(client, module, optimizer, 12)
        client.leave("limit")
        client.close()
        parts = syncer.finish()
    assert all([r for r, n in part["discarded_by_reason"].items() if n] == ["nonfinite"] for part in parts)


def inner_steps(client: ShardedClient, module: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for number in range(count):
        step(module, optimizer, number)
        time.sleep(0.004)
        client.boundary(tokens=16)


def test_a_client_of_one_syncer_is_told_that_there_are_several_shards(tmp_path):
    with shards(tmp_path) as syncer:
        client = LearnerClient(make_module(), syncer.options(0), context=syncer.context)
        with pytest.raises(ShardedSyncerError, match="This syncer has 2 shards") as caught:
            client.join()
        assert caught.value.endpoints == (syncer.endpoints[1],)


def test_who_dials_another_shard_than_the_lead_is_refused_with_the_remedy(tmp_path):
    with shards(tmp_path) as syncer, pytest.raises(JoinRefusedError, match="shard 1 of 2 of a syncer. Dial the address"):
        syncer.join(0, endpoint=syncer.endpoints[1])


def test_a_part_of_another_syncer_is_refused(tmp_path):
    with shards(tmp_path) as syncer:
        wrong = ShardedClient(make_module(), syncer.options(0), (syncer.endpoints[1], syncer.endpoints[0]), context=syncer.context)
        with pytest.raises(JoinRefusedError, match="Part 0 of 2 of a model: this is shard 1 of 2. Start the learner again."):
            wrong.join()


def test_a_syncer_without_shards_takes_no_part(tmp_path):
    with shards(tmp_path, 1) as syncer:
        wrong = ShardedClient(make_module(), syncer.options(0), (syncer.endpoints[0], "inproc://nowhere"), context=syncer.context)
        with pytest.raises(JoinRefusedError, match="Part 0 of 2 of a model: this is shard 0 of 1"):
            wrong.join()


def test_strangers_are_not_told_where_the_shards_are(tmp_path):
    with shards(tmp_path, token="job") as syncer, pytest.raises(JoinRefusedError, match="The token is not this job's"):
        syncer.join(0, token="guess")


def test_more_shards_than_fragments_are_refused_before_anything_is_founded(tmp_path):
    with shards(tmp_path, 3) as syncer:
        with pytest.raises(ConfigurationError, match="--shards 3: .* this model has 2 .* at most 2 shards"):
            syncer.join(0, config=dataclasses.replace(PLAIN, num_fragments=2))
        assert not any(service._machine.job.is_founded for service in syncer.services)


def test_what_the_whole_model_is_comes_from_all_parts(tmp_path):
    module = make_module()
    with shards(tmp_path, 3) as syncer:
        client = syncer.join(0, module, keeps_momentum=True)
        before = client.weights.global_state()
        layout = client.layout
        assert [len(values) for values in before.published] == list(layout.fragment_sizes)
        assert [len(values) for values in before.momentum] == list(layout.fragment_sizes)
        names = [[part.name for part in fragment.slices] for fragment in layout.fragments]
        assert [[name for name, _ in client.weights.parameters_of(p)] for p in range(len(layout.fragments))] == names
        assert client.weights.unmerged_parameters() == []
        inner_steps(client, module, torch.optim.SGD(module.parameters(), lr=0.02), 40)
        until(lambda: min(client.version(p).n for p in range(len(layout.fragments))) > 0)
        assert client.figures.merges > 4 and client.figures.inner_steps == 40 and client.figures.participation == 1.0
        local = client.weights.local_tensors()
        client.weights.swap_in_global()
        assert any(not torch.equal(value, dict(module.named_parameters())[name]) for name, value in local.items() if "running" not in name)
        client.weights.swap_out_global()
        assert all(torch.equal(value, local[name]) for name, value in client.weights.local_tensors().items())
        client.leave("limit")
        client.close()


def test_the_leads_stop_ends_the_job_for_all(tmp_path):
    with shards(tmp_path) as syncer:
        modules = [make_module(i) for i in range(2)]
        clients = [syncer.join(i, modules[i]) for i in range(2)]
        optimizers = [torch.optim.SGD(module.parameters(), lr=0.02) for module in modules]
        for client, module, optimizer in zip(clients, modules, optimizers, strict=True):
            inner_steps(client, module, optimizer, 3)
        clients[0].request_stop("enough")
        until(lambda: clients[1].stop_reason == "enough")
        leaving = [Background(lambda c=c: (c.leave("stopped"), c.close())) for c in clients]
        for life in leaving:
            life.result()
        parts = syncer.finish()
    assert [part["tokens"] for part in parts] == [96, 96]


def test_a_learner_comes_back_under_its_id_though_a_shard_takes_its_last_life_for_alive(tmp_path, monkeypatch):
    """The lead is told of the death, the other shard finds out by itself, and the new life waits for that."""
    from lightning_diloco.protocol import job as job_rules

    monkeypatch.setattr(job_rules, "SILENT_S", 1.0)
    quick = dataclasses.replace(PLAIN, heartbeat_s=0.1)
    with shards(tmp_path, supervised=False) as syncer:
        syncer.join(0, config=quick)
        second = syncer.join(1, config=quick)
        for part in second._parts:  # as a kill would: no word is said
            part.close()
        syncer.services[0].learner_lost(1)
        until(lambda: syncer.services[0]._machine.job.members.by_id(1) is None)
        assert syncer.services[1]._machine.job.members.by_id(1) is not None
        again = syncer.join(1, config=quick)
        assert [part._machine.state.learner_id for part in again._parts] == [1, 1]


def test_a_founder_that_dies_between_two_shards_is_replaced_by_its_next_life(tmp_path):
    """Nobody trains before all shards are founded, so what the first life has founded is what it was."""
    with shards(tmp_path) as syncer:
        half = ShardedClient(make_module(0), syncer.options(0), tuple(syncer.endpoints), context=syncer.context)
        half._lead.join()
        half.close()
        waiting = Background(lambda: syncer.join(1, make_module(1)))
        syncer.services[0].learner_lost(0)
        until(lambda: syncer.services[0]._machine.job.members.by_id(0) is None)
        module = make_module(2)
        client = syncer.join(0, module)
        founded = syncer.services[0]._performer.store.state(0).shadow
        assert torch.equal(founded, torch.cat([t.detach().flatten() for _, t in client.weights.parameters_of(0)]))
        other = waiting.result()
        for x in (client, other):
            train_for(x, 10)
        leaving = [Background(lambda x=x: (x.leave("limit"), x.close())) for x in (client, other)]
        for life in leaving:
            life.result()
        assert [part["status"] for part in syncer.finish()] == ["finished", "finished"]


def test_sharded_messages_after_the_join_change_nothing(tmp_path):
    with shards(tmp_path) as syncer:
        client = syncer.join(0)
        member = syncer.services[0]._machine.job.members.by_id(0)
        syncer.services[0]._on_loop(lambda: syncer.services[0]._performer.say(member.session, Sharded(endpoints=("tcp://1.2.3.4:5",))))
        until(lambda: client._lead._loop.sharded is not None)
        train_for(client, 10)
        assert client.fenced is None and client.stop_reason is None
        before = client.figures.merges
        until(lambda: train_for(client, 1) is None and client.figures.merges > before)


def train_for(client: ShardedClient, count: int) -> None:
    inner_steps(client, client._module, torch.optim.SGD(client._module.parameters(), lr=0.02), count)


def test_learners_that_wait_for_a_founder_say_so_and_heed_the_leads_end(tmp_path, monkeypatch, caplog):
    """The founder has founded the lead, and is gone: the other one waits in shard 1."""
    monkeypatch.setattr(client_waiting, "COMPLAIN_S", 0.3)
    with shards(tmp_path) as syncer:
        half = ShardedClient(make_module(0), syncer.options(0), tuple(syncer.endpoints), context=syncer.context)
        half._lead.join()
        waiting = Background(lambda: syncer.join(1, make_module(1)))
        until(lambda: caplog.text.count("Shard 1 of the syncer waits for learner 0 to found the job, for ") >= 2)
        assert "Shard 0" not in caplog.text
        half._lead.request_stop("enough")
        with pytest.raises(JoinRefusedError, match="ended: This job ends .enough."):
            waiting.result()
        until(lambda: syncer.services[0]._machine.job.members.by_id(1) is None)
        half.close()


def test_a_fence_by_the_lead_ends_the_wait_for_another_shard(tmp_path):
    with shards(tmp_path) as syncer:
        half = ShardedClient(make_module(0), syncer.options(0), tuple(syncer.endpoints), context=syncer.context)
        half._lead.join()
        waiting = Background(lambda: syncer.join(1, make_module(1)))
        lead = syncer.services[0]
        until(lambda: lead._machine.job.members.by_id(1) is not None and syncer.services[1]._machine.job.members.by_id(1) is not None)
        session = lead._machine.job.members.by_id(1).session
        lead._on_loop(lambda: lead._performer.refuse(session, "wrong_layout", "This one is not wanted."))
        with pytest.raises(FencedError, match="not wanted"):
            waiting.result()
        half.close()


def test_the_copies_of_the_whole_model_are_freed_before_the_shards_are_joined(tmp_path, monkeypatch):
    """A client of the whole model finds out that there are shards; it has a residual and host copies for all of it."""
    made: list[weakref.ref] = []

    def making(*args, **options) -> LearnerClient:
        if made:
            assert made[0]() is None
        client = LearnerClient(*args, **options)
        made.append(weakref.ref(client))
        return client

    with shards(tmp_path) as syncer:
        monkeypatch.setattr(sharded_client, "LearnerClient", making)
        client, _ = join_job(make_module(), syncer.options(0), context=syncer.context)
        assert len(made) == 3 and all(made[i]() is not None for i in (1, 2))
        client.close()


def test_silence_is_said_of_the_shard_that_is_silent(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reporting, "SILENT_S", 0.5)
    with shards(tmp_path) as syncer:
        client = syncer.join(0, config=dataclasses.replace(PLAIN, heartbeat_s=0.05))
        syncer.services[1]._transport.poll = lambda wait_s: time.sleep(0.05) or []
        until(lambda: client.lost_syncer)
        assert "Nothing was heard from shard 1 of the syncer for 0 s; training goes on, and its fragments stay as they are" in caplog.text
        del syncer.services[1]._transport.poll
        until(lambda: not client.lost_syncer)
        assert "Shard 1 of the syncer is back." in caplog.text and "shard 0" not in caplog.text.lower()
        client.close()


def test_a_shards_folder_is_gone_on_with_by_that_shard_alone(tmp_path):
    with shards(tmp_path) as syncer:
        client = syncer.join(0)
        client.leave("limit")
        client.close()
        syncer.finish()
    for part, words in (((0, 1), "a syncer without shards was to"), ((0, 2), "shard 0 of 2 was to"), ((1, 3), "shard 1 of 3 was to")):
        with pytest.raises(ConfigurationError, match=f"1: holds the part of shard 1 of 2, and {words} go on .* --resume {tmp_path.parent}"):
            open_job(tmp_path / "1", SnapshotStore(tmp_path / "1"), resume=True, part=part)
    assert open_job(tmp_path / "1", SnapshotStore(tmp_path / "1"), resume=True, part=(1, 2)).founding is not None


def test_what_was_put_in_place_is_of_the_part_that_was_looked_at(tmp_path):
    """The state of a fragment of a lower shard may arrive between the look and the last word, on another thread."""
    layouts = parts_of(planned_layout(make_module(), PLAIN), 2)
    parts = [PeerStates(part, send=lambda m: True, send_payload=lambda h, p: 0, wake=lambda: None) for part in layouts]
    peers = ShardedPeers(parts)
    peers.ask({0: None, 1: None}, lineage="lead", optimizers=("SGD",))

    def arrive(fragment_id: int) -> None:
        state = InnerState(
            lineage="lead",
            optimizers=("SGD",),
            fragment_id=fragment_id,
            version=Version(0, 1),
            inner_step=5,
            tensors={"0/weight/momentum_buffer": torch.ones(3)},
        )
        parts[fragment_id].take(PeerState(ticket=1, fragment_id=0), memoryview(bytearray(buffer_of(pack(state)))))

    for part in parts:
        part.tick(0.0)
    arrive(1)
    assert peers.arrived is parts[1].arrived is not None
    arrive(0)
    peers.took(is_useful=True)
    assert [part.num_taken for part in parts] == [0, 1] and parts[1].arrived is None
    assert peers.arrived is parts[0].arrived is not None
    peers.took(is_useful=False)
    assert peers.arrived is None and peers.num_taken == 1


def test_a_peers_inner_state_comes_by_the_shard_of_its_fragment(tmp_path):
    """Fragments have the numbers of the whole at both ends, and those of the shard in between."""
    with shards(tmp_path, 2) as syncer:
        giver, taker = syncer.join(0, make_module(0)), syncer.join(1, make_module(1))
        count = len(giver.layout.fragments)
        giver.peers.can_give = True
        train_for(giver, 5)
        taker.peers.ask({p: None for p in range(count)}, lineage="lead", optimizers=("SGD",))
        taken: dict[int, float] = {}

        def exchange() -> bool:
            giver.boundary(tokens=0)
            if (wanted := giver.peers.next_wanted()) is not None:
                state = InnerState(
                    lineage="lead",
                    optimizers=wanted.optimizers,
                    fragment_id=wanted.fragment_id,
                    version=Version(0, 1),
                    inner_step=5,
                    tensors={"0/weight/momentum_buffer": torch.full((3,), float(wanted.fragment_id))},
                )
                giver.peers.give(wanted, pack(state))
            if (state := taker.peers.arrived) is not None:
                taken[state.fragment_id] = float(state.tensors["0/weight/momentum_buffer"][0])
                taker.peers.took(is_useful=True)
            return not taker.peers.is_asking

        until(exchange)
        assert taken == {p: float(p) for p in range(count)} and taker.peers.num_taken == count


def test_one_shard_is_an_ordinary_syncer(tmp_path):
    with shards(tmp_path, 1) as syncer:
        client, info = join_job(make_module(), syncer.options(0), context=syncer.context)
        assert isinstance(client, LearnerClient) and info.role == "member"
        train(client, 10)
        client.leave("limit")
        client.close()
        assert syncer.finish()[0]["tokens"] == 160
