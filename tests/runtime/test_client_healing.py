"""A learner whose parameters become NaN, with pulls of other fragments at the very boundary of the heal."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lightning_diloco.protocol.actions import Heal
from lightning_diloco.runtime.healing import describe
from tests.runtime.job_helpers import CONFIG, poison, running_job, step, train
from tests.tape_checker import load_tape


def test_no_tokens_of_poisoned_work_are_handed_over_under_the_values_of_a_healed_fragment(tmp_path):
    """Six times all parameters are NaN for one step, while every fragment is asked for every few steps."""
    module = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 2))
    with running_job(tmp_path, config=dataclasses.replace(CONFIG, wire_dtype="fp32", norm_gate=None)) as job:
        client = job.client(0, module)
        client.join()
        healed: list[int] = []
        client.on_heal = lambda parameters: healed.append(len(parameters))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
        for _ in range(6):
            train(client, 12, sleep_s=0.006, optimizer=optimizer)
            step(module, optimizer, 0)
            count = poison(client, module, healed)
            assert len(healed) == count + 4, "all fragments are mended at one boundary"
            assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
        train(client, 12, sleep_s=0.006, optimizer=optimizer)
        client.leave("limit")
        summary = job.finish()
    accepted = [e for e in load_tape(tmp_path / "tape.jsonl") if e["event"] == "contribution" and e["outcome"] != "refused"]
    assert accepted and all(e["norm"] > 0 for e in accepted), "nothing was handed over under the tokens of work that was thrown away"
    assert [r for r, n in summary["discarded_by_reason"].items() if n] == ["nonfinite"]
    for fragment in summary["fragments"]:
        assert fragment["pending"] == 0 and fragment["discarded"] >= 6 * 16


def test_a_refusal_names_the_learner_the_rule_and_the_remedy():
    norm = describe(1, Heal(fragment_id=3, reason="norm"), 10.0)
    assert norm.startswith("Learner 1: fragment 3 was refused (norm): its norm per step is above norm_gate=10.0 times the running median")
    assert norm.endswith("If such jumps are normal in this training, pass norm_gate=None or a larger factor.")
    nonfinite = describe(0, Heal(fragment_id=0, reason="nonfinite"), None)
    assert "fragment 0 was refused (nonfinite): a value in it is not finite" in nonfinite and "norm_gate" not in nonfinite
