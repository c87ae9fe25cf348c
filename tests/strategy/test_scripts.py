"""Scripts as users write them, in an interpreter of their own: no main guard, signals, hydra, a syncer started by hand."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.outer import FragmentView
from lightning_diloco.runtime.weights import Weights
from lightning_diloco.strategy.island_launcher import IslandLauncher
from tests.strategy.kit import (
    ROOT,
    Script,
    TinyModel,
    alive,
    family,
    latest,
    learner_processes,
    loader,
    parameters_of,
    quiet,
    summary_of,
    wait_until,
)

pytestmark = pytest.mark.process

MODEL = """
import sys, time
import torch
import lightning.pytorch as pl
from torch.utils.data import DataLoader, TensorDataset

class Model(pl.LightningModule):
    def __init__(self, step_s=0.0):
        super().__init__()
        self.step_s = step_s
        self.layer = torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        time.sleep(self.step_s)
        return self.layer(batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

def data(length=256, **kwargs):
    return DataLoader(TensorDataset(torch.randn(length, 8)), batch_size=4, **kwargs)

QUIET = dict(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
"""


@pytest.fixture
def script(tmp_path):
    scripts = []

    def make(source: str) -> Script:
        scripts.append(Script(tmp_path, source))
        return scripts[-1]

    yield make
    for each in scripts:
        each.close()


@pytest.mark.slow
def test_a_script_without_a_main_guard_and_with_the_bare_name(script, tmp_path):
    """Scenario 1."""
    text = script(
        "import lightning_diloco\n" + MODEL + "print('top of the script')\n"
        "model = Model(0.005)\n"
        "start = model.layer.weight.detach().clone()\n"
        "trainer = pl.Trainer(devices=2, strategy='decoupled_diloco', max_steps=60, enable_checkpointing=False, **QUIET)\n"
        "trainer.fit(model, data())\n"
        "from safetensors.torch import load_file\n"
        "final = load_file('outputs/latest/global.safetensors')\n"
        "assert not torch.equal(start, model.layer.weight)\n"
        "assert all(torch.equal(final[name], value) for name, value in model.named_parameters())\n"
        "assert trainer.global_step == 60\n"
        "print(trainer.strategy.summary['status'])\n"
    ).run()
    assert text.count("top of the script") == 1
    assert "finished" in text
    checkpoint = torch.load(latest(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
    assert len(checkpoint["optimizer_states"]) == 1
    assert os.readlink(tmp_path / "outputs" / "latest") == latest(tmp_path).name


@pytest.mark.slow
def test_devices_auto_is_one_learner_and_says_so(script, tmp_path):
    text = script(
        "import lightning_diloco\n"
        + MODEL
        + "trainer = pl.Trainer(strategy='decoupled_diloco', max_steps=5, enable_checkpointing=False, **QUIET)\n"
        "trainer.fit(Model(), data())\n"
        "print(len(trainer.strategy.summary['learners']), 'in the summary')\n"
    ).run()
    assert "one learner (on CPU devices='auto' means 1)" in text
    assert "1 in the summary" in text


LONG = (
    "import lightning_diloco\n"
    + MODEL
    + "from lightning.pytorch.callbacks import OnExceptionCheckpoint\n"
    + "import signal\n"
    + "signal.signal(signal.SIGTERM, lambda *_: (print('my own handler', flush=True), exit(3)))\n"
    + "trainer = pl.Trainer(devices=2, strategy='decoupled_diloco', max_epochs=-1,\n"
    + "    callbacks=[OnExceptionCheckpoint('ckpt')], **QUIET)\n"
    + "trainer.fit(Model(0.02), data(100_000, num_workers=1))\n"
)


def is_training(folder) -> bool:
    """Whether both learners have joined and a merge was done."""
    tape = folder / "outputs" / "latest" / "tape.jsonl"
    text = tape.read_text() if tape.exists() else ""
    return text.count('"event":"join"') == 2 and '"event":"merge"' in text


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 1), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)])
def test_a_signal_ends_everything_in_order(script, tmp_path, signum, code):
    """Scenario 8."""
    run = script(LONG)
    main = run.start()
    wait_until(lambda: is_training(tmp_path), "training", script=run)
    children = family(main)
    # Syncer, two learners, and a loader worker of each.
    assert len(children) >= 5
    main.send_signal(signum)
    assert run.wait(timeout_s=15) == code, run.text()
    assert run.text().count("my own handler") == (signum == signal.SIGTERM)
    assert alive(children) == []
    summary = summary_of(latest(tmp_path))
    assert summary["status"] == "stopped"
    assert summary["tokens_pending"] == 0
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["on_exception.ckpt"]
    saved = torch.load(tmp_path / "ckpt" / "on_exception.ckpt", weights_only=False)
    assert saved["global_step"] > 0


def test_nothing_outlives_a_killed_supervisor(script, tmp_path):
    """Scenario 9."""
    run = script(LONG)
    main = run.start()
    wait_until(lambda: is_training(tmp_path), "training", script=run)
    children = family(main)
    assert len(children) >= 5
    main.kill()
    run.wait()
    wait_until(lambda: not alive(children), "the children's end", timeout_s=5)


def test_a_learner_that_gets_sigterm_leaves_in_order_and_comes_back(script, tmp_path):
    run = script(LONG)
    main = run.start()
    wait_until(lambda: is_training(tmp_path), "training", script=run)
    learners = learner_processes(main)
    assert len(learners) == 2
    learners[1].terminate()
    wait_until(lambda: (latest(tmp_path) / "tape.jsonl").read_text().count('"event":"join"') == 3, "the second life", script=run)
    main.send_signal(signal.SIGINT)
    run.wait()
    lines = [json.loads(line) for line in (latest(tmp_path) / "tape.jsonl").read_text().splitlines()]
    leaves = [line["reason"] for line in lines if line["event"] == "leave"]
    assert leaves == ["signal"] * 3
    assert "restart 1 of at most 3" in run.text()
    assert summary_of(latest(tmp_path))["tokens_discarded"] == 0


@pytest.mark.slow
def test_a_hydra_script_runs_once_and_its_configuration_is_there_in_the_learners(script, tmp_path):
    """Scenario 11."""
    text = script(
        "import hydra, lightning_diloco\nfrom hydra.core.hydra_config import HydraConfig\n"
        + MODEL
        + "class Configured(Model):\n"
        + "    def on_train_start(self):\n"
        + "        open(f'{HydraConfig.get().runtime.output_dir}/seen_{self.trainer.global_rank}', 'w').write(HydraConfig.get().job.name)\n"
        + "@hydra.main(version_base='1.3', config_path=None)\n"
        + "def main(cfg):\n"
        + "    print('main was called')\n"
        + "    trainer = pl.Trainer(devices=2, strategy='decoupled_diloco', max_steps=20, enable_checkpointing=False, **QUIET)\n"
        + "    trainer.fit(Configured(), data())\n"
        + "main()\n"
    ).run("hydra.run.dir=hydra")
    assert text.count("main was called") == 1
    assert {path.name: path.read_text() for path in (tmp_path / "hydra").glob("seen_*")} == {"seen_0": "script", "seen_1": "script"}


def test_a_learner_of_a_syncer_that_was_started_by_hand(tmp_path, monkeypatch):
    published, load = [], Weights.load_global
    monkeypatch.setattr(Weights, "load_global", lambda self: published.append((self._store.layout, load(self))) or published[-1][1])
    run_dir = tmp_path / "syncer"
    command = [sys.executable, "-m", "lightning_diloco", "syncer", "--bind", "tcp://127.0.0.1:0", "--run-dir", str(run_dir)]
    with (tmp_path / "syncer.txt").open("wb") as file:
        syncer = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
    try:
        wait_until((run_dir / "syncer.json").exists, "the syncer's address")
        endpoint = json.loads((run_dir / "syncer.json").read_text())["endpoint"]
        model = TinyModel(step_s=0.005)
        strategy = DecoupledDiLoCoStrategy(syncer=endpoint, run_dir=tmp_path / "mine", sync_interval_steps=5)
        trainer = Trainer(**quiet(devices=1, max_steps=30, strategy=strategy))
        start = parameters_of(model)
        trainer.fit(model, loader())
        assert isinstance(strategy.launcher, IslandLauncher)
        assert trainer.global_step == 30
        assert not torch.equal(start["layer.weight"], model.layer.weight)
        layout, state = published[-1]
        for fragment, values in zip(layout.fragments, state.published, strict=True):
            held = torch.empty_like(values)
            FragmentView(model, fragment).copy_to(held)
            assert torch.equal(held, values), "the module holds what was published last, bit for bit"
        assert not (run_dir / "logs").exists() and not (run_dir / "checkpoints").exists()
        tape = (run_dir / "tape.jsonl").read_text()
        wait_until(lambda: '"event":"leave"' in (run_dir / "tape.jsonl").read_text(), f"the leave on the tape: {tape}")
        assert list((tmp_path / "mine" / "counters").glob("*.bin"))
    finally:
        syncer.terminate()
        try:
            syncer.wait(20)
        except subprocess.TimeoutExpired:
            syncer.kill()
            syncer.wait()
