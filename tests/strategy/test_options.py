"""What is wrong is said at once, in a sentence that names value, rule and remedy."""

from __future__ import annotations

import subprocess
import sys
import threading
from types import MethodType

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.compile import from_compiled, to_uncompiled

from lightning_diloco import ConfigurationError, DecoupledDiLoCoStrategy, SyncConfig
from lightning_diloco.runtime.keys import admit, make_pair, trust_syncer
from lightning_diloco.strategy import checks
from lightning_diloco.strategy.payload import InterpreterState, Payload, load_payload, save_payload
from tests.strategy.kit import ROOT, TinyModel, loader, quiet

WRONG = [
    ({"sync_interval_step": 5}, "did you mean 'sync_interval_steps'"),
    ({"outer_lr": 0.0}, "outer_lr=0.0"),
    ({"keys": "keys"}, "keys='keys' without syncer=: in local mode everything stays on this machine"),
    ({"keys": "insecure"}, "keys='insecure' without syncer="),
    ({"keys": b"secret", "syncer": "tcp://10.0.0.1:5555"}, "keys=bytes: must be the folder that lightning-diloco keygen made"),
    ({"keys": "no/keys", "syncer": "tcp://127.0.0.1:5555"}, "no/keys: there is no such folder. Make the keys with lightning-diloco keygen"),
    ({"devices_per_learner": 2}, "devices_per_learner=2 is not there yet. Leave it"),
    ({"data": "leases"}, "data='leases': must be 'shard' or 'lease'"),
    ({"launch": "spawn"}, "must be 'supervised' or 'inline'"),
    ({"max_restarts": -1}, "max_restarts=-1"),
    ({"hang_timeout_s": 0.5}, "hang_timeout_s=0.5: must be a finite number of seconds, at least 1; pass None"),
    ({"hang_timeout_s": float("inf")}, "hang_timeout_s=inf"),
    ({"hang_timeout_s": True}, "hang_timeout_s=True"),
    ({"hang_timeout_s": "600"}, "hang_timeout_s='600'"),
    ({"token_counter": 3}, "token_counter=3"),
    ({"learner_id": 1}, "without syncer="),
    ({"syncer": "tcp://10.0.0.1:5555"}, "without keys=: beyond loopback the model would travel for everybody to read and change"),
    ({"syncer": "tcp://syncer.example:5555"}, "without keys=: beyond loopback"),
    ({"syncer": "tcp://10.0.0.1:0", "keys": "insecure"}, "must be an endpoint"),
    ({"syncer": "127.0.0.1:5555"}, "must be an endpoint"),
    ({"syncer": "tcp://127.0.0.1"}, "must be an endpoint"),
    ({"syncer": "tcp://127.0.0.1:notaport"}, "must be an endpoint"),
    ({"syncer": "tcp://127.0.0.1:5555", "launch": "inline"}, "Leave out one of the two"),
    ({"syncer": "tcp://127.0.0.1:5555", "num_learners": 2}, "without learner_id="),
    ({"syncer": "tcp://127.0.0.1:5555", "num_learners": 2, "learner_id": 2}, "below num_learners=2"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_a_wrong_option_is_refused_in_the_constructor(options, sentence):
    with pytest.raises(ConfigurationError) as caught:
        DecoupledDiLoCoStrategy(**options)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("syncer", ["tcp://127.0.0.1:5555", "tcp://[::1]:5555", "tcp://localhost:5555"])
def test_on_loopback_no_keys_are_needed(syncer):
    assert DecoupledDiLoCoStrategy(syncer=syncer).process_options.keys is None


def test_keys_are_a_folder_or_the_word_for_none(tmp_path):
    trust_syncer(tmp_path / "site", make_pair(tmp_path / "syncer").hex())
    link = {"syncer": "tcp://10.0.0.1:5555"}
    assert DecoupledDiLoCoStrategy(**link, keys=str(tmp_path / "site")).process_options.keys == tmp_path / "site"
    assert DecoupledDiLoCoStrategy(**link, keys="insecure").process_options.keys is None
    admit(tmp_path / "syncer", "paris", "12" * 32)
    with pytest.raises(ConfigurationError, match="is the folder of a syncer"):
        DecoupledDiLoCoStrategy(**link, keys=tmp_path / "syncer")


def test_sync_options_reach_the_configuration():
    strategy = DecoupledDiLoCoStrategy(outer_lr=0.5, num_fragments=3)
    assert strategy.sync == SyncConfig(outer_lr=0.5, num_fragments=3)


def test_more_contributions_than_learners_are_refused_when_the_trainer_is_built():
    with pytest.raises(ConfigurationError, match=r"min_quorum=3 with devices=2.*Lower min_quorum to at most 2"):
        Trainer(**quiet(devices=2, strategy=DecoupledDiLoCoStrategy(min_quorum=3)))


def test_inline_with_two_devices_is_refused():
    with pytest.raises(ConfigurationError, match=r"launch='inline' with devices=2"):
        Trainer(**quiet(devices=2, strategy=DecoupledDiLoCoStrategy(launch="inline")))


def test_an_island_of_two_devices_is_refused():
    with pytest.raises(ConfigurationError, match=r"syncer= with devices=2"):
        Trainer(**quiet(devices=2, strategy=DecoupledDiLoCoStrategy(syncer="tcp://127.0.0.1:5555")))


def test_several_nodes_are_refused():
    with pytest.raises(
        ConfigurationError, match=r"num_nodes=2, which means learners on several machines, is not there yet\. Pass num_nodes=1; devices=N"
    ):
        Trainer(**quiet(devices=2, num_nodes=2, strategy="decoupled_diloco"))


def test_a_process_that_a_launcher_started_as_one_of_many_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigurationError, match=r"one of 2 that an outside launcher started"):
        Trainer(**quiet(devices=2, strategy="decoupled_diloco"))
    with pytest.raises(ConfigurationError, match=r"one of 2 that an outside launcher started"):
        Trainer(**quiet(devices=1, strategy=DecoupledDiLoCoStrategy(launch="inline")))


def test_a_schedulers_environment_without_a_number_of_tasks_is_no_launcher(monkeypatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    checks.check_local(SyncConfig(), "inline", 1, SLURMEnvironment(auto_requeue=False))


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)


BOTH_ORDERS = [
    "import lightning_diloco\nimport lightning.pytorch as pl",
    "import lightning.pytorch as pl\nimport lightning_diloco",
    pytest.param("import lightning_diloco.runtime.tape\nimport lightning.pytorch as pl", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("imports", BOTH_ORDERS)
def test_the_name_is_registered_whichever_is_imported_first(imports):
    code = f"{imports}\nt = pl.Trainer(accelerator='cpu', logger=False, strategy='decoupled_diloco')\nprint(type(t.strategy).__name__)"
    done = run_python(code)
    assert "DecoupledDiLoCoStrategy" in done.stdout, done.stderr


def test_the_import_loads_neither_lightning_nor_torch_and_starts_nothing():
    code = (
        "import sys, threading, lightning_diloco\n"
        "assert not {'lightning', 'torch', 'zmq'} & set(sys.modules)\n"
        "assert threading.active_count() == 1\n"
        "assert 'DecoupledDiLoCoStrategy' in dir(lightning_diloco)\n"
        "assert 'lightning' not in sys.modules"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_finder_leaves_when_it_has_done_its_work():
    code = (
        "import sys, lightning_diloco\n"
        "import lightning.pytorch.strategies as s\n"
        "names = [f.name for f in sys.meta_path if type(f).__name__ == '_WaitingFinder']\n"
        "assert names == ['pytorch_lightning.strategies'], names\n"
        "assert type(s.__spec__.loader).__name__ == 'SourceFileLoader', s.__spec__\n"
        "assert s.__loader__ is s.__spec__.loader\n"
        "import importlib; importlib.reload(lightning_diloco)"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "strategy", ["'decoupled_diloco'", pytest.param("lightning_diloco.DecoupledDiLoCoStrategy()", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "first", [pytest.param("import lightning_diloco; lightning_diloco.DecoupledDiLoCoStrategy", marks=pytest.mark.slow), "pass"]
)
def test_a_trainer_of_the_other_package_gets_a_sentence(strategy, first):
    code = (
        f"{first}\nimport pytorch_lightning, lightning_diloco\n"
        f"try:\n    pytorch_lightning.Trainer(accelerator='cpu', logger=False, strategy={strategy})\n"
        "except lightning_diloco.ConfigurationError as error:\n    print(error)"
    )
    done = run_python(code)
    assert "from lightning.pytorch import Trainer" in done.stdout, done.stderr


class Holder:
    def __init__(self):
        self.handles = {"first": threading.Lock()}


def test_a_module_that_cannot_be_sent_is_named_by_its_attribute(tmp_path):
    model = TinyModel()
    model.head.lock = threading.Lock()
    trainer = Trainer(**quiet(devices=2, max_steps=1, strategy=DecoupledDiLoCoStrategy(run_dir=tmp_path / "run")))
    with pytest.raises(ConfigurationError, match=r"model\.head\.lock \(type _thread\.lock\) cannot be sent to the learner processes"):
        trainer.fit(model, loader())


def test_a_container_in_an_attribute_is_named_down_to_its_key(tmp_path):
    model = TinyModel()
    model.holder = Holder()
    trainer = Trainer(**quiet(devices=2, max_steps=1, strategy=DecoupledDiLoCoStrategy(run_dir=tmp_path / "run")))
    with pytest.raises(ConfigurationError, match=r"model\.holder\.handles\['first'\] \(type _thread\.lock\)"):
        trainer.fit(model, loader())


def test_data_that_cannot_be_sent_is_named_too(tmp_path):
    data = loader()
    data.dataset.lock = threading.Lock()
    trainer = Trainer(**quiet(devices=2, max_steps=1, strategy=DecoupledDiLoCoStrategy(run_dir=tmp_path / "run")))
    with pytest.raises(ConfigurationError, match=r"train_dataloaders\.dataset\.lock"):
        trainer.fit(TinyModel(), data)


class WithoutLog(TinyModel):
    """`self.log` inside a compiled step fails in dynamo with every strategy."""

    def training_step(self, batch, batch_idx):
        return self(batch[0]).pow(2).mean()


def test_a_compiled_module_trains_inline(tmp_path):
    strategy = DecoupledDiLoCoStrategy(run_dir=tmp_path / "run", launch="inline")
    trainer = Trainer(**quiet(devices=1, max_steps=3, strategy=strategy))
    trainer.fit(torch.compile(WithoutLog(), backend="eager"), loader())
    assert strategy.summary["learners"][0]["inner_steps"] == 3


def test_how_a_module_was_compiled_travels_and_the_callers_stays_compiled(tmp_path):
    module = from_compiled(torch.compile(WithoutLog(), backend="eager", fullgraph=True, dynamic=True))
    step, context = module.training_step, module._compiler_ctx
    payload = Payload(trainer=None, function=id, args=(module,), kwargs={}, state=InterpreterState.capture())
    save_payload(payload, tmp_path / "payload.pkl")
    assert module.training_step is step and module._compiler_ctx is context
    again = load_payload(tmp_path / "payload.pkl").args[0]
    assert again._compiler_ctx["dynamo_ctx"].fullgraph and again._compiler_ctx["dynamo_ctx"]._dynamic
    batch = [torch.ones(2, 8)]
    assert torch.equal(again.training_step(batch, 0), module.training_step(batch, 0))
    assert to_uncompiled(again).training_step.__func__ is WithoutLog.training_step


def test_a_compiled_module_whose_backend_cannot_be_read_gets_a_sentence(tmp_path):
    module = from_compiled(torch.compile(WithoutLog(), backend="eager"))
    module._compiler_ctx = {**module._compiler_ctx, "dynamo_ctx": object()}
    payload = Payload(trainer=None, function=id, args=(module,), kwargs={}, state=InterpreterState.capture())
    with pytest.raises(ConfigurationError, match=r"WithoutLog was compiled as a whole.*Compile its parts in configure_model"):
        save_payload(payload, tmp_path / "payload.pkl")


def test_a_method_that_was_set_on_the_instance_travels_with_a_compiled_module(tmp_path):
    def doubled(self, batch, batch_idx):
        return 2 * self(batch[0]).pow(2).mean()

    module = WithoutLog()
    batch = [torch.ones(2, 8)]
    plain = module.training_step(batch, 0)
    module.training_step = MethodType(doubled, module)
    module = from_compiled(torch.compile(module, backend="eager"))
    save_payload(Payload(trainer=None, function=id, args=(module,), kwargs={}, state=InterpreterState.capture()), tmp_path / "payload.pkl")
    assert torch.equal(load_payload(tmp_path / "payload.pkl").args[0].training_step(batch, 0), 2 * plain)


@pytest.mark.slow
@pytest.mark.process
def test_a_compiled_module_trains_on_two_learners(tmp_path):
    strategy = DecoupledDiLoCoStrategy(run_dir=tmp_path / "run", num_fragments=2, sync_interval_steps=4)
    trainer = Trainer(**quiet(devices=2, max_steps=12, strategy=strategy))
    trainer.fit(torch.compile(WithoutLog(), backend="eager"), loader())
    assert [row["inner_steps"] for row in strategy.summary["learners"]] == [12, 12]
    assert strategy.summary["merges"] > 0


@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder])
def test_a_finder_in_a_job_of_processes_is_refused_with_the_remedy(finder, tmp_path):
    trainer = Trainer(**quiet(devices=2, strategy=DecoupledDiLoCoStrategy(run_dir=tmp_path / "run"), callbacks=[finder()]))
    with pytest.raises(ConfigurationError, match=rf"{finder.__name__} trains before the fit.*Tuner\(Trainer\(devices=1\)\)"):
        trainer.fit(TinyModel(), loader())
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_finder_works_inline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Found(TinyModel):
        lr = 0.5

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    def run(strategy):
        seed_everything(2, verbose=False)
        trainer = Trainer(**quiet(devices=1, max_steps=4, strategy=strategy, callbacks=[LearningRateFinder(num_training_steps=30)]))
        model = Found()
        trainer.fit(model, loader(256))
        return model.lr

    assert run(DecoupledDiLoCoStrategy(launch="inline")) == run("auto")
