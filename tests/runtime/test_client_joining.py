"""Who founds, who waits, who is refused, and with which sentence."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.errors import ConfigurationError, FencedError, JoinRefusedError, SyncerUnavailableError
from lightning_diloco.protocol.identity import FragmentInfo
from lightning_diloco.protocol.messages import Envelope, Found, JoinRefused, Ping, Pong, SendState, Welcome
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until, whole_life
from tests.runtime.job_raw_peer import RawPeer


def equal(module: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_fresh_learner_waits_for_the_appointed_founder_and_receives(tmp_path):
    modules = [make_module(0), make_module(1)]
    with running_job(tmp_path) as job:
        late = Background(job.client(1, modules[1]).join)
        time.sleep(0.6)
        assert not late.is_done and not job.machine.job.is_founded
        assert job.client(0, modules[0]).join().role == "member"
        info = late.result()
        assert (info.learner_id, info.role, info.incarnation) == (1, "joiner", 0)
        assert equal(*modules) and equal(modules[0], make_module(0))


def test_a_fresh_learner_never_founds_a_job_whose_learners_have_all_left(tmp_path):
    fresh, first = make_module(7), make_module(0)
    with running_job(tmp_path) as job:
        whole_life(job.client(0, first), 20)
        assert not job.machine.job.members.present()
        for learner_id in (0, 5):
            info = job.client(learner_id, fresh).join()
            assert info.role == "joiner"
            assert all(torch.equal(a, b) for a, b in zip(first.parameters(), fresh.parameters(), strict=True))
        assert job.finish()["learners"][0]["incarnations"] == 2


def test_the_joiner_waits_longer_than_its_patience_for_a_slow_founder(tmp_path):
    with running_job(tmp_path) as job:
        waiting = Background(job.client(1, join_timeout_s=0.6).join)
        time.sleep(2.0)
        assert not waiting.is_done
        job.client(0).join()
        assert waiting.result().role == "joiner"


def test_a_syncer_that_dies_while_a_learner_waits_ends_the_wait_with_a_sentence(tmp_path):
    with running_job(tmp_path, "tcp") as job:
        waiting = Background(job.client(1, join_timeout_s=0.6).join)
        time.sleep(0.8)
        assert not waiting.is_done
        job.service.finish("failed")
        with pytest.raises(SyncerUnavailableError, match=r"No syncer answered at tcp://127.0.0.1:\d+ for 0.6 s. Start it"):
            waiting.result(5)


def test_no_syncer_at_all_is_a_sentence(tmp_path):
    client = LearnerClient(make_module(), ClientOptions(endpoint="tcp://127.0.0.1:9", config=CONFIG, join_timeout_s=0.3))
    with pytest.raises(SyncerUnavailableError, match="No syncer answered"):
        client.join()
    client.close()


def test_an_address_that_is_none_is_a_sentence_and_leaves_nothing_open(tmp_path):
    client = LearnerClient(make_module(), ClientOptions(endpoint="nonsense", config=CONFIG))
    with pytest.raises(ConfigurationError, match="nonsense"):
        client.join()
    with pytest.raises(ConfigurationError):
        LearnerClient(nn.Tanh(), ClientOptions(endpoint="tcp://127.0.0.1:9", config=CONFIG))


@pytest.mark.parametrize("has_described", [False, True])
def test_a_founder_that_dies_while_founding_is_followed_by_its_next_life(tmp_path, has_described):
    with running_job(tmp_path, takeover_token="t") as job, RawPeer(job.endpoint, make_module(3), CONFIG, job.context) as dead:
        dead.hello(learner_id=0)
        dead.hear(Welcome, role="founder")
        if has_described:
            _describe(dead)
            dead.hear(SendState)
        joiner, module = Background(job.client(1).join), make_module(0)
        time.sleep(0.2)
        # The word and the next process race: whichever is first, the next process founds.
        job.service.learner_lost(0, life=0)
        info = job.client(0, module, takeover_token="t", life=1).join()
        assert (info.role, info.incarnation) == ("member", 1)
        assert joiner.result().role == "joiner"
        assert equal(module, make_module(0))
        assert job.service.error is None


def test_the_word_of_a_death_that_comes_after_the_next_process_spares_it(tmp_path):
    with running_job(tmp_path, takeover_token="t") as job:
        job.client(0).join()
        later = job.client(0, takeover_token="t", life=1)
        assert later.join().incarnation == 1
        job.service.learner_lost(0, life=0)
        train(later, 20)
        later.leave("limit")
        assert later.fenced is None
        job.finish()


def _describe(peer: RawPeer) -> None:
    infos = tuple(FragmentInfo(fragment_id=f.fragment_id, num_params=f.num_params, kind=f.kind) for f in peer.layout.fragments)
    peer.say(Found(layout=peer.layout.to_bytes(), fragments=infos, static_bytes=sum(s.num_bytes for s in peer.layout.static), static_crc=0))


def test_a_second_process_founds_when_it_takes_over_the_id_of_a_founder_that_hangs(tmp_path):
    with running_job(tmp_path, takeover_token="t") as job, RawPeer(job.endpoint, make_module(3), CONFIG, job.context) as hung:
        hung.hello(learner_id=0)
        hung.hear(Welcome, role="founder")
        with pytest.raises(JoinRefusedError, match="learner_id=0 is in use by a live process"):
            job.client(0).join()
        assert job.client(0, takeover_token="t").join().role == "member"


def test_a_learner_of_another_history_is_refused(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
            peer.hello(learner_id=1, lineage="another")
            assert "never founded twice" in peer.hear(JoinRefused, reason="lineage").detail
        with RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
            peer.envelope = Envelope("another-job", "", 0, 0)
            peer.hello(learner_id=1)
            assert "another-job" in peer.hear(JoinRefused, reason="job_id").detail


def test_a_learner_of_another_history_founds_no_empty_job(tmp_path):
    with running_job(tmp_path) as job, RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
        peer.hello(learner_id=0, lineage="another")
        peer.hear(JoinRefused, reason="lineage")
        assert not job.machine.job.is_founded


def test_the_token_of_another_job_is_refused_with_a_sentence(tmp_path):
    with running_job(tmp_path, token="mine") as job:
        with pytest.raises(JoinRefusedError, match="token is not this job's. Two jobs must not share a syncer"):
            job.client(0, token="theirs").join()
        assert job.client(0, token="mine").join().role == "member"


def test_another_value_of_the_configuration_is_refused_with_the_fields_name(tmp_path):
    with running_job(tmp_path) as job:
        job.client(0).join()
        for field, value in (("outer_lr", 0.5), ("sync_interval_steps", 5), ("wire_dtype", "fp32")):
            with pytest.raises(JoinRefusedError, match=rf"{field}={value!r} differs from the job's"):
                job.client(1, config=dataclasses.replace(CONFIG, **{field: value})).join()


class _Pair(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(6, 6))


@pytest.mark.parametrize("names", [("b", "a"), ("a", "c"), ("a",)], ids=["reordered", "renamed", "missing"])
def test_tensors_renamed_or_reordered_with_equal_sizes_are_refused(tmp_path, names):
    with running_job(tmp_path) as job:
        job.client(0, _Pair("a", "b")).join()
        with pytest.raises(JoinRefusedError, match="layout .names, order, shapes, dtypes, ties. differs from the founder's"):
            job.client(1, _Pair(*names)).join()
        assert job.client(1, _Pair("a", "b")).join().role == "joiner"


def test_those_who_wait_are_checked_against_the_founder_when_it_has_come(tmp_path):
    with running_job(tmp_path) as job:
        other = Background(job.client(1, config=dataclasses.replace(CONFIG, outer_lr=0.5)).join)
        time.sleep(0.2)
        job.client(0).join()
        with pytest.raises(JoinRefusedError, match="outer_lr"):
            other.result()


def test_an_id_beyond_the_slots_is_refused_and_free_ids_are_given_in_order(tmp_path):
    with running_job(tmp_path, num_slots=3) as job:
        with pytest.raises(JoinRefusedError, match="learner_id=3: this job has 3 learners, ids 0 to 2"):
            job.client(3).join()
        assert [job.client(None).join().learner_id for _ in range(3)] == [0, 1, 2]
        with pytest.raises(JoinRefusedError, match="this job has 3 learners"):
            job.client(None).join()


def test_an_id_in_use_is_refused_and_the_takeover_token_fences_the_old_process(tmp_path):
    with running_job(tmp_path, takeover_token="t") as job:
        old = job.client(0)
        old.join()
        train(old, 30)
        for token in ("", "wrong"):
            with pytest.raises(JoinRefusedError, match="learner_id=0 is in use by a live process"):
                job.client(0, takeover_token=token).join()
        new = job.client(0, takeover_token="t")
        assert new.join().incarnation == 1
        until(lambda: old.fenced is not None, 5)
        assert isinstance(old.fenced, FencedError) and "taken over" in str(old.fenced)
        train(old, 3)  # harmless: nobody hears it
        train(new, 20)
        new.leave("limit")
        summary = job.finish()
    [learner] = summary["learners"]
    assert learner["incarnations"] == 2 and summary["tokens_merged"] > 20 * 16
    assert set(k for k, v in summary["discarded_by_reason"].items() if v) <= {"fenced"}


def test_a_founding_state_that_is_not_finite_is_refused_with_a_sentence(tmp_path):
    module = make_module()
    with torch.no_grad():
        next(module.parameters())[0, 0] = float("nan")
    with running_job(tmp_path) as job:
        with pytest.raises(JoinRefusedError, match="not finite. Check the initialization"):
            job.client(0, module).join()
        assert job.client(0).join().role == "member"


def test_frozen_parameters_and_buffers_come_from_the_founder(tmp_path):
    def build(seed: int) -> nn.Module:
        module = make_module(seed)
        module[0].weight.requires_grad_(False)
        module[3].running_mean.fill_(seed)
        return module

    founder, joiner = build(1), build(2)
    with running_job(tmp_path) as job:
        job.client(0, founder).join()
        job.client(1, joiner).join()
        assert equal(founder, joiner) and float(joiner[3].running_mean[0]) == 1.0


def test_a_lost_hello_and_a_lost_description_are_said_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.client_joining.AGAIN_S", 0.2)
    lost: list[str] = []
    with running_job(tmp_path) as job:
        client = job.client(0)
        send = client._loop._transport.send_control

        def lossy(peer: bytes, data: bytes) -> bool:
            for word in ("Hello", "Found", "Ready"):
                if word.encode() in data and word not in lost:
                    lost.append(word)
                    return True
            return send(peer, data)

        monkeypatch.setattr(client._loop._transport, "send_control", lossy)
        assert client.join().role == "member"
        train(client, 20)
        client.leave("limit")
        assert lost == ["Hello", "Found", "Ready"]
        assert job.finish()["tokens_merged"] == 20 * 16


def test_lost_answers_of_the_syncer_are_asked_for_again(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_diloco.runtime.client_joining.AGAIN_S", 0.2)
    lost: list[str] = []
    with running_job(tmp_path) as job:
        send = job.service._transport.send_control

        def lossy(peer: bytes, data: bytes) -> bool:
            for word in ("founder", "SendState", "member", "joiner"):
                if word.encode() in data and word not in lost:
                    lost.append(word)
                    return True
            return send(peer, data)

        monkeypatch.setattr(job.service._transport, "send_control", lossy)
        assert job.client(0).join().role in ("member", "joiner")
        assert job.client(1).join().role == "joiner"
        assert lost == ["founder", "SendState", "member", "joiner"]


def test_pings_of_strangers_are_answered_and_change_nothing(tmp_path):
    with running_job(tmp_path) as job, RawPeer(job.endpoint, make_module(), CONFIG, job.context) as peer:
        peer.say(Ping(number=5))
        assert peer.hear(Pong).number == 5
        assert not job.machine.job.members.present()


def test_the_configuration_of_the_options_is_the_jobs(tmp_path):
    config = SyncConfig(num_fragments=2, sync_interval_steps=3, heartbeat_s=0.2)
    with running_job(tmp_path, config=config) as job:
        job.client(0).join()
        assert job.machine.job.config == config and job.machine.job.num_fragments == 3, "two, and the running statistics"


@pytest.mark.parametrize(("num_slots", "is_late"), [(None, True), (2, False)])
def test_a_newcomer_starts_at_the_jobs_step_unless_all_were_started_together(tmp_path, num_slots, is_late):
    with running_job(tmp_path, num_slots=num_slots) as job:
        first, second = job.client(0), job.client(1)
        first.join()
        train(first, 30)
        until(lambda: job.machine.job.members.by_id(0).inner_step == 30)
        assert second.join().job_step == (30 if is_late else 0)
