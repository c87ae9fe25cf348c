"""The strategy's parts, each on its own with the real thing around it."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import signal
import sys
import threading
import time
import types
import warnings

import psutil
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_diloco import DecoupledDiLoCoStrategy, LearnerFailedError
from lightning_diloco.runtime.children import child_environment, start_child
from lightning_diloco.strategy import payload
from lightning_diloco.strategy.csv_logs import keep_csv_logs
from lightning_diloco.strategy.healing import reset_nonfinite_moments
from lightning_diloco.strategy.job_clock import JobClock
from lightning_diloco.strategy.life_line import read_assignment
from lightning_diloco.strategy.payload import InterpreterState, Payload, load_payload, save_payload
from lightning_diloco.strategy.results import LearnerResult, as_exception, failure, read_result, write_result
from lightning_diloco.strategy.seeding import reseed_learner
from lightning_diloco.strategy.step_watch import StepWatch
from tests.strategy.kit import TinyModel, loader, quiet, wait_until


class Scheduled(TinyModel):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
        steps = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class LateStart(Callback):
    """Starts a plain Trainer at the step of a job, as OuterSync does after a join."""

    def __init__(self, job_step: int) -> None:
        self.job_step = job_step
        self.batches: list[int] = []
        self.epochs: list[int] = []
        self.first_lr = 0.0

    def on_train_start(self, trainer, pl_module):
        self.clock = JobClock(trainer)
        self.clock.advance(self.job_step)
        self.first_lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.clock.on_first_batch()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches.append(batch_idx)

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.epochs.append(trainer.current_epoch)


def late(job_step: int, **options) -> tuple[LateStart, Trainer]:
    start = LateStart(job_step)
    trainer = Trainer(**quiet(devices=1, callbacks=[start], **options))
    trainer.fit(Scheduled(), loader(64), loader(4))
    return start, trainer


def test_a_late_learner_ends_at_the_jobs_step_with_the_jobs_learning_rate():
    start, trainer = late(37, max_steps=50)
    assert trainer.global_step == 50
    assert len(start.batches) == 13
    assert start.first_lr == pytest.approx(1 / 38)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1 / 51)


def test_a_late_learner_does_the_rest_of_the_epochs_and_validates_at_their_ends():
    # 16 batches an epoch: 37 steps are two epochs and five batches.
    start, trainer = late(37, max_epochs=4)
    assert len(start.batches) == 4 * 16 - 37
    assert start.epochs == [2, 3]
    assert trainer.current_epoch == 4


def test_accumulated_batches_are_counted_in_the_position():
    # 16 batches, two a step: 8 steps an epoch; 11 steps are one epoch and six batches.
    start, trainer = late(11, max_epochs=2, accumulate_grad_batches=2)
    assert len(start.batches) == 10
    assert trainer.global_step == 16


def test_a_learner_that_comes_after_the_end_does_nothing():
    start, trainer = late(80, max_steps=50)
    assert start.batches == []


def test_a_job_step_of_zero_changes_nothing():
    start, trainer = late(0, max_steps=5)
    assert len(start.batches) == 5
    assert start.first_lr == 1.0


def skipped(optimizer: torch.optim.Optimizer, gradient: float) -> bool:
    watch, scaler = StepWatch(), torch.amp.GradScaler("cpu", init_scale=4.0)
    watch.attach([optimizer])
    watch.on_batch_start(scaler)
    parameter = optimizer.param_groups[0]["params"][0]
    scaler.scale(parameter.sum() * gradient).backward()
    scaler.step(optimizer)
    scaler.update()
    return not watch.has_stepped(scaler)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_no_step(fused):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    assert skipped(optimizer, float("inf"))
    assert torch.equal(parameter.detach(), torch.ones(3))
    optimizer.zero_grad()
    assert not skipped(optimizer, 1.0)


def test_a_watch_that_was_taken_off_sees_nothing():
    parameter = nn.Parameter(torch.ones(1))
    optimizer, watch = torch.optim.SGD([parameter], lr=0.1), StepWatch()
    watch.attach([optimizer])
    optimizer.step()
    assert watch.has_stepped(None)
    assert not watch.has_stepped(None)
    watch.detach()
    optimizer.step()
    assert not watch.has_stepped(None)


def test_only_moments_that_are_not_finite_are_reset():
    good, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([good, bad], lr=0.1)
    good.grad, bad.grad = torch.ones(2), torch.tensor([1.0, float("nan")])
    optimizer.step()
    reset_nonfinite_moments([optimizer], [bad, good])
    assert torch.equal(optimizer.state[bad]["exp_avg"], torch.zeros(2))
    assert optimizer.state[good]["exp_avg"].abs().sum() > 0
    assert optimizer.state[bad]["step"] == 1


def test_learners_draw_different_numbers_and_the_first_draws_the_users(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")

    def draw(learner_id: int, life: int) -> float:
        torch.manual_seed(5)
        reseed_learner(learner_id, life)
        return float(torch.rand(()))

    torch.manual_seed(5)
    plain = float(torch.rand(()))
    assert draw(0, 0) == plain
    assert len({draw(0, 0), draw(1, 0), draw(2, 0), draw(1, 1), draw(0, 1)}) == 5
    assert draw(1, 0) == draw(1, 0)
    assert os.environ["PL_GLOBAL_SEED"] == "5"


def make_payload(*args, **kwargs) -> Payload:
    trainer = Trainer(**quiet(devices=1))
    return Payload(trainer=trainer, function=trainer._fit_impl, args=args, kwargs=kwargs, state=InterpreterState.capture())


def test_settings_of_the_interpreter_travel(tmp_path):
    before = InterpreterState.capture()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("high")
        warnings.filterwarnings("ignore", message="of this test")
        logging.getLogger("a.logger.of.this.test").setLevel(17)
        torch.manual_seed(9)
        save_payload(make_payload(TinyModel()), tmp_path / "payload")
        number = torch.rand(())
        before.restore()
        logging.getLogger("a.logger.of.this.test").setLevel(0)
        assert torch.get_default_dtype() == torch.float32
        load_payload(tmp_path / "payload").state.restore()
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_float32_matmul_precision() == "high"
        assert any(entry[1] is not None and entry[1].pattern == "of this test" for entry in warnings.filters)
        assert logging.getLogger("a.logger.of.this.test").level == 17
        assert torch.equal(torch.rand(()), number)
    finally:
        before.restore()


def test_code_that_a_new_interpreter_could_not_import_travels_by_value(tmp_path):
    path = tmp_path / "nowhere_to_be_found.py"
    path.write_text("class Marker:\n    value = 42\n")
    module = types.ModuleType("nowhere_to_be_found")
    module.__file__ = str(path)
    exec(path.read_text(), module.__dict__)
    sys.modules["nowhere_to_be_found"] = module
    try:
        model = TinyModel()
        model.marker = module.Marker()
        save_payload(make_payload(model), tmp_path / "payload")
    finally:
        del sys.modules["nowhere_to_be_found"]
    assert load_payload(tmp_path / "payload").args[0].marker.value == 42


def test_a_loader_in_use_travels_without_its_worker_processes(tmp_path):
    data = loader(num_workers=1, persistent_workers=True)
    iterator = iter(data)
    next(iterator)
    try:
        save_payload(make_payload(TinyModel(), data), tmp_path / "payload")
        copy = load_payload(tmp_path / "payload").args[1]
        assert copy._iterator is None
        assert copy.batch_size == 4
        assert torch.equal(copy.dataset.tensors[0], data.dataset.tensors[0])
        assert data._iterator is iterator
    finally:
        iterator._shutdown_workers()


def test_the_model_in_the_call_and_in_the_strategy_stays_one_object(tmp_path):
    model = TinyModel()
    payload = make_payload(model)
    payload.trainer.strategy._lightning_module = model
    save_payload(payload, tmp_path / "payload")
    loaded = load_payload(tmp_path / "payload")
    assert loaded.trainer.strategy._lightning_module is loaded.args[0]


def test_a_strategy_travels_without_what_is_one_processs_own(tmp_path):
    strategy = DecoupledDiLoCoStrategy(run_dir=tmp_path)
    strategy.is_saving_blocked = True
    strategy.summary = {"status": "running"}
    state = strategy.__getstate__()
    assert (state["is_saving_blocked"], state["summary"], state["assignment"], state["_outer_sync"]) == (False, None, None, None)


class Awkward(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first, second):
        super().__init__("awkward")
        self.lock = threading.Lock()


def raised(error: BaseException) -> LearnerResult:
    try:
        raise error
    except BaseException as caught:
        return failure(caught)


def test_an_exception_comes_back_with_its_type_and_the_remote_traceback(tmp_path):
    write_result(raised(KeyError("mine")), tmp_path / "result.pkl")
    result = read_result(tmp_path / "result.pkl")
    error = as_exception(3, result)
    assert isinstance(error, KeyError)
    assert isinstance(error.__cause__, LearnerFailedError)
    assert "learner 3 raised" in str(error.__cause__)
    assert "in raised" in str(error.__cause__)


def test_an_exception_that_cannot_travel_comes_back_as_text():
    error = as_exception(1, raised(Awkward(1, 2)))
    assert isinstance(error, LearnerFailedError)
    assert "Awkward" in str(error)


def test_a_result_that_was_not_written_is_none(tmp_path):
    assert read_result(tmp_path / "nothing.pkl") is None


@pytest.mark.parametrize("data", [b"", b'{"a": 1', b"[1]\n", b"no json\n"])
def test_an_assignment_that_is_cut_or_no_object_is_refused(data):
    reading, writing = os.pipe()
    try:
        os.write(writing, data)
        os.close(writing)
        with pytest.raises(ValueError):
            read_assignment(reading)
    finally:
        os.close(reading)


CHILD = """
import os, subprocess, sys, time
from lightning_diloco.strategy.life_line import hold_life_line, read_assignment
assigned = read_assignment(0)
hold_life_line(0)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(assigned["ready"], "w").close()
time.sleep(assigned["sleep_s"])
os._exit(5)
"""


def start(tmp_path, monkeypatch, sleep_s: float):
    (tmp_path / "a_child.py").write_text(CHILD)
    monkeypatch.syspath_prepend(str(tmp_path))
    child = start_child("a_child", [], log=tmp_path / "log.txt", environment=child_environment(2))
    child.send_line({"ready": str(tmp_path / "ready"), "sleep_s": sleep_s})
    wait_until((tmp_path / "ready").exists, "the child's start")
    return child, psutil.Process(child.pid).children()


@pytest.mark.process
def test_what_a_child_leaves_behind_is_ended_with_it(tmp_path, monkeypatch):
    child, grandchildren = start(tmp_path, monkeypatch, sleep_s=0.0)
    wait_until(lambda: child.poll() is not None, "the child's end")
    assert (child.poll().code, str(child.poll())) == (5, "exit code 5")
    wait_until(lambda: not any(p.is_running() for p in grandchildren), "the grandchild's end", timeout_s=5)


@pytest.mark.process
def test_a_closed_life_line_ends_the_childs_whole_group(tmp_path, monkeypatch):
    child, grandchildren = start(tmp_path, monkeypatch, sleep_s=60.0)
    assert child.poll() is None
    assert len(grandchildren) == 1
    child.close_line()
    wait_until(lambda: child.poll() is not None, "the child's end", timeout_s=5)
    assert str(child.poll()) == "signal SIGKILL"
    wait_until(lambda: not any(p.is_running() for p in grandchildren), "the grandchild's end", timeout_s=5)


def test_a_childs_share_of_the_cores_is_the_users_if_it_was_given(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(2)["OMP_NUM_THREADS"] == "7"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert child_environment(1)["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))
    assert child_environment(1000)["OMP_NUM_THREADS"] == "1"


def test_csv_logs_of_an_earlier_process_are_kept(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    first = CSVLogger(tmp_path, version=0)
    first.log_metrics({"a": 1.0}, step=0)
    first.save()
    second = CSVLogger(tmp_path, version=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_csv_logs([second, object()])
    second.log_metrics({"b": 2.0}, step=1)
    second.save()
    text = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    assert text.split() == ["a,b,step", "1.0,,0", ",2.0,1"]


def test_sigterm_before_the_join_ends_an_inline_fit_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Slow(TinyModel):
        def on_fit_start(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)

    handler = signal.getsignal(signal.SIGTERM)
    trainer = Trainer(**quiet(devices=1, max_steps=5, strategy=DecoupledDiLoCoStrategy(launch="inline")))
    began_s = time.monotonic()
    with pytest.raises(SystemExit) as caught:
        trainer.fit(Slow(), loader())
    assert caught.value.code == 143
    assert time.monotonic() - began_s < 15
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_module_that_an_editable_install_finds_is_imported_in_the_learners(tmp_path, monkeypatch):
    """pip's editable installs add a finder beside the path; carrying their modules by value would drag whole packages along."""
    source = tmp_path / "found_by_a_finder.py"
    source.write_text("VALUE = 1\n", "utf-8")

    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            return importlib.util.spec_from_file_location(name, source) if name == source.stem else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    module = importlib.import_module(source.stem)
    monkeypatch.setitem(sys.modules, source.stem, module)
    assert payload._is_importable(module)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not Finder])
    assert not payload._is_importable(module)
