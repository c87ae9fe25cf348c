"""A syncer of several shards, as processes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.runtime.job_helpers import Background, make_module
from tests.runtime.shard_helpers import Learner, check_sharded, sharded_run

pytestmark = pytest.mark.process


def test_two_learners_train_with_two_shards_and_the_model_is_put_together(tmp_path):
    run_dir = tmp_path / "run"
    with sharded_run(run_dir) as run:
        first, second = (
            Background(lambda: Learner(make_module(0), run.options(0))),
            Background(lambda: Learner(make_module(1), run.options(1))),
        )
        first, second = first.result(), second.result()
        training = [Background(lambda: first.train(60)), Background(lambda: second.train(120))]
        training[0].result()
        first.leave()
        training[1].result()
        second.leave()
        assert run.end() == (0, "")
    summary = check_sharded(run_dir, 2)
    assert summary["status"] == "finished" and summary["tokens"] == summary["tokens_merged"] == 180 * 16
    assert [x["learner_id"] for x in summary["learners"]] == [0, 1]
    saved = load_file(run_dir / "global.safetensors")
    for name, tensor in [*second.module.named_parameters(), *second.module.named_buffers()]:
        if name in saved:
            assert torch.equal(tensor.detach(), saved.pop(name)), name
    assert not saved
