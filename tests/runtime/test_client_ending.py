"""How a learner ends: early, last, without a syncer, twice, in the middle; and what is left of it."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
import time

import pytest
import torch
import zmq

from lightning_diloco.errors import DiLoCoError
from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from lightning_diloco.runtime.leaving import drain_after
from tests.runtime.job_helpers import CONFIG, Background, make_module, running_job, train, until, whole_life
from tests.tape_checker import load_tape


def _threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("diloco"))


def test_a_learner_that_ends_early_is_waited_for_by_nobody_and_loses_nothing(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, min_quorum=2)
    with running_job(tmp_path, config=config) as job:
        long, short = job.client(0), job.client(1)
        rest = Background(lambda: whole_life(long, 200, sleep_s=0.005))
        with caplog.at_level(logging.WARNING):
            whole_life(short, 40)
        before = long.figures.merges
        assert not rest.is_done and "not acknowledged" not in caplog.text
        rest.result()
        assert long.figures.merges > before + 3, "rounds go on with the one that is left"
        summary = job.finish()
    assert summary["tokens"] == summary["tokens_merged"] == 240 * 16


def test_a_boundary_that_finds_the_background_thread_thinking_does_not_wait_and_loses_no_token(tmp_path):
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        train(client, 20)
        start_s, state = time.monotonic(), client._machine.state
        with client._loop.lock:
            counted = state.inner_step
            train(client, 5)
            assert time.monotonic() - start_s < 1.0 and state.inner_step == counted
        steps = 25
        while state.inner_step < steps:  # at the first boundary at which that thread does not happen to think
            train(client, 1)
            steps += 1
        assert state.inner_step == steps and state.tokens == steps * 16
        with client._loop.lock:
            train(client, 3)
        client.leave("limit")  # the last three have not been exchanged at any boundary
        summary = job.finish()
    steps += 3
    assert summary["tokens"] == summary["tokens_merged"] == steps * 16 and summary["learners"][0]["inner_steps"] == steps


def test_without_a_syncer_leaving_takes_the_drain_timeout_and_says_what_is_lost(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, drain_timeout_s=0.5)
    with running_job(tmp_path, "tcp", config) as job:
        client = job.client(0)
        client.join()
        train(client, 20)
        # What a learner says to a job that is just ending is answered with a farewell, and then there is nothing to wait for.
        until(lambda: job.machine.job.members.by_id(0).inner_step == 20 and client._loop.backlog == 0, 5)
        job.service.finish("failed")
        assert job.service.join(10)
        train(client, 20)  # nobody answers, nobody waits
        start_s = time.monotonic()
        with caplog.at_level(logging.WARNING):
            client.leave("limit")
        assert time.monotonic() - start_s < config.drain_timeout_s + 2
        assert "were not acknowledged within drain_timeout_s=0.5" in caplog.text
        client.weights.load_global()
        assert all(torch.isfinite(p).all() for p in client._module.parameters())


@pytest.mark.parametrize(
    ("told_ago_s", "drain_s", "waits_s"),
    [
        (None, 10.0, 10.0),
        (0.0, 10.0, 8.5),  # the good-bye and what comes after it belong to the ten seconds
        (5.0, 10.0, 3.5),
        (8.0, 10.0, 1.0),
        (60.0, 10.0, 1.0),
        (0.0, 60.0, 58.5),
        (0.0, 2.0, 1.0),
        (0.0, 0.5, 0.5),
    ],
)
def test_the_drain_gets_what_is_left_of_its_time_since_the_signal(told_ago_s, drain_s, waits_s):
    assert drain_after(None if told_ago_s is None else 1000.0 - told_ago_s, drain_s, 1000.0) == pytest.approx(waits_s)


def test_who_was_told_to_end_is_gone_in_time_though_no_syncer_answers(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, drain_timeout_s=4.0)
    with running_job(tmp_path, "tcp", config=config) as job:
        client = job.client(0)
        client.join()
        train(client, 20)
        job.service.finish("failed")
        assert job.service.join(10)
        train(client, 20)
        told_s = time.monotonic()
        time.sleep(1.0)  # the rest of the batch
        with caplog.at_level(logging.WARNING):
            client.leave("signal", told_s)
        # 3.5 s; from the batch's end it would be six.
        assert 3.4 < time.monotonic() - told_s < config.drain_timeout_s + 1
        assert "were not acknowledged within drain_timeout_s=4 after SIGTERM" in caplog.text


def test_closing_is_quick_idempotent_and_leaves_no_thread(tmp_path):
    before = _threads()
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        train(client, 10)
        start_s = time.monotonic()
        for _ in range(3):
            client.close()
        assert time.monotonic() - start_s < 1.0
        train(client, 300, sleep_s=0)  # a boundary after the end does nothing, and keeps nothing
        client.leave("limit")
        assert client._loop.backlog == 0
    until(lambda: _threads() == before, 5)


def test_a_client_that_was_never_joined_can_be_closed(tmp_path):
    client = LearnerClient(make_module(), ClientOptions(endpoint="tcp://127.0.0.1:9", config=CONFIG))
    client.close()
    client.leave("limit")
    client.close()
    assert client.fenced is None and client.figures.inner_steps == 0
    assert not any(thread.name == "diloco-client" for thread in threading.enumerate())


def test_a_background_thread_that_fails_ends_the_learner_with_a_sentence(tmp_path, monkeypatch):
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        monkeypatch.setattr(client._store, "encode", lambda *_: 1 / 0)
        end_s = time.monotonic() + 10
        while client.fenced is None:
            assert time.monotonic() < end_s
            train(client, 1)
        assert isinstance(client.fenced, DiLoCoError) and "background thread" in str(client.fenced)
        train(client, 200, sleep_s=0)
        assert client._loop.backlog == 0
        start_s = time.monotonic()
        client.leave("limit")
        assert time.monotonic() - start_s < 1.0


def test_what_a_lost_learner_could_not_report_is_read_from_its_counters(tmp_path, monkeypatch):
    with running_job(tmp_path) as job:
        lost, well = job.client(0), job.client(1)
        lost.join()
        well.join()
        train(lost, 20)
        monkeypatch.setattr(lost._loop._transport, "send_control", lambda *_: True)
        train(lost, 30)
        job.service.learner_lost(0)
        until(lambda: job.machine.job.members.by_id(0) is None, 5)
        lost.close()
        train(well, 20)
        well.leave("limit")
        summary = job.finish()
    events = [e for e in load_tape(tmp_path / "tape.jsonl") if e["event"] in ("counters", "leave", "discard")]
    assert [e["event"] for e in events[:3]] == ["counters", "leave", "discard"]
    assert (events[0]["learner_id"], events[0]["inner_steps"], events[0]["tokens"]) == (0, 50, 50 * 16)
    assert (events[1]["learner_id"], events[1]["reason"]) == (0, "died")
    assert summary["learners"][0]["tokens"] == 50 * 16 and summary["discarded_by_reason"]["died"] > 0
    assert all(fragment["pending"] == 0 for fragment in summary["fragments"])


def test_learner_zero_ends_the_job_for_all_and_others_do_not(tmp_path):
    with running_job(tmp_path) as job:
        clients = [job.client(i) for i in range(2)]
        for client in clients:
            client.join()
        clients[1].request_stop("mine alone")
        for _ in range(10):
            for client in clients:
                train(client, 1)
        time.sleep(0.3)
        assert clients[0].stop_reason is None and clients[1].stop_reason is None
        clients[0].request_stop("early stopping")
        until(lambda: all(client.stop_reason == "early stopping" for client in clients), 5)
        for leave in [Background(lambda c=client: c.leave("stopped")) for client in clients]:
            leave.result()
        assert job.finish("stopped")["status"] == "stopped"


def test_the_token_budget_ends_the_job(tmp_path):
    config = dataclasses.replace(CONFIG, token_budget=16 * 50)
    with running_job(tmp_path, config=config) as job:
        client = job.client(0)
        client.join()
        while client.stop_reason is None:
            train(client, 1)
            assert client.figures.inner_steps < 500
        assert client.stop_reason == "token_budget" and client.figures.tokens >= 16 * 50
        client.leave("stopped")
        job.finish()


def test_a_pause_is_told_and_rounds_go_on_without_the_paused(tmp_path):
    config = dataclasses.replace(CONFIG, min_quorum=2)
    with running_job(tmp_path, config=config) as job:
        busy, paused = job.client(0), job.client(1)
        busy.join()
        paused.join()
        train(paused, 5)
        paused.set_paused(True)
        paused.weights.swap_in_global()
        time.sleep(0.1)
        until(lambda: train(busy, 5) or busy.figures.merges > 10, 30)
        paused.weights.swap_out_global()
        paused.set_paused(False)
        other = Background(lambda: train(busy, 100))
        train(paused, 100)
        other.result()
        for leave in [Background(lambda c=client: c.leave("limit")) for client in (busy, paused)]:
            leave.result()
        summary = job.finish()
    assert summary["learners"][1]["participation"] > 0.2
    assert summary["tokens"] == summary["tokens_merged"]


def test_memory_and_contributions_do_not_pile_up(tmp_path):
    with running_job(tmp_path) as job:
        client = job.client(0)
        client.join()
        until(lambda: train(client, 5, sleep_s=0.001) or client.figures.merges > 50, 30)
        store = client._store
        until(lambda: client._loop.backlog == 0 and not client._loop._waiting, 5)
        until(lambda: len(client._loop._bases) <= 5 and len(store._payloads) <= 5, 5)
        size = 4 * sum(view.num_params for view in store.views)
        # Bases, momenta, and of each fragment at most a payload and what waits for the next boundary: versions and differences. 50 merges
        # that left a block behind would be 10 sizes more.
        until(lambda: store._memory.used_bytes <= 5 * size, 5)
        client.leave("limit")
        until(lambda: not job.service._performer._transfers and not job.service._intake._decoding, 5)
        assert job.finish()["merges"] > 50


def test_an_own_context_is_ended_with_the_client(tmp_path):
    with running_job(tmp_path, "tcp") as job:
        client = LearnerClient(make_module(), ClientOptions(endpoint=job.endpoint, config=CONFIG))
        client.join()
        context = client._loop._transport._context
        assert isinstance(context, zmq.Context) and not context.closed
        client.close()
        assert context.closed
        gc.collect()
