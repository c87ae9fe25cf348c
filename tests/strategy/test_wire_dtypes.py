"""Two learners as processes, four bits an element: what goes over the wire has its size, and the run is replayed to its bytes."""

from __future__ import annotations

import json

import pytest
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.cli.main import main
from lightning_diloco.config import payload_bytes
from tests.strategy.kit import TinyModel, equal, global_parameters, latest, loader, parameters_of, quiet
from tests.tape_checker import check_run


@pytest.mark.slow
@pytest.mark.process
def test_two_learners_with_int4_send_what_it_says_and_are_replayed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = TinyModel(step_s=0.005)
    strategy = DecoupledDiLoCoStrategy(wire_dtype="int4", num_fragments=2, sync_interval_steps=3, min_quorum=2, tape_payloads=True)
    trainer = Trainer(**quiet(devices=2, max_epochs=3, strategy=strategy))
    trainer.fit(model, loader(96))
    run_dir = latest(tmp_path)
    summary = check_run(run_dir)
    assert summary["status"] == "finished" and summary["merges"] > 8 and summary["tokens_pending"] == 0
    assert equal(parameters_of(model), global_parameters(run_dir))

    events = [json.loads(line) for line in (run_dir / "tape.jsonl").read_text().splitlines()]
    sizes = {f["fragment_id"]: f["num_params"] for f in events[0]["fragments"]}
    differences = [e for e in events if e["event"] == "publish" and not e["is_full"]]
    contributions = [e for e in events if e["event"] == "contribution"]
    assert len(differences) > 8 and len(contributions) > 8
    assert all(e["payload_bytes"] == payload_bytes(sizes[e["fragment_id"]], "int4") for e in (*differences, *contributions))
    full = sum(4 * sizes[e["fragment_id"]] for e in events if e["event"] == "publish" and e["is_full"])
    assert full == sum(e["payload_bytes"] for e in events if e["event"] == "publish" and e["is_full"])

    capsys.readouterr()
    assert main(["replay", str(run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["global_sha256"] == summary["global_sha256"]
