"""What schedulers put into the environment is no business of a learner's, whatever Lightning would make of it."""

from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lightning_diloco import DecoupledDiLoCoStrategy
from lightning_diloco.errors import ConfigurationError
from lightning_diloco.strategy.island_environment import IslandEnvironment
from tests.strategy.kit import quiet

ONE_OF_TWO_TASKS = {"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "diloco", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
LEARNER = {"syncer": "tcp://127.0.0.1:5555", "learner_id": 1, "num_learners": 2}


@pytest.fixture
def variables(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    def set_all(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    "more", [{}, {"SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1"}, {"SLURM_NNODES": "2"}], ids=["ntasks", "per node", "nodes"]
)
def test_one_of_several_tasks_of_slurm_is_a_learner_of_its_own(variables, more):
    variables({**ONE_OF_TWO_TASKS, **more})
    assert SLURMEnvironment.detect()
    strategy = DecoupledDiLoCoStrategy(**LEARNER)
    trainer = Trainer(**quiet(devices=1, strategy=strategy))
    assert isinstance(trainer._accelerator_connector.cluster_environment, IslandEnvironment)
    assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.is_global_zero) == (1, 1, 0, False)


def test_a_torchrun_of_one_process_is_a_learner(variables):
    variables(TORCHRUN)
    assert TorchElasticEnvironment.detect()
    trainer = Trainer(**quiet(devices=1, strategy=DecoupledDiLoCoStrategy(**LEARNER)))
    assert (trainer.world_size, trainer.global_rank) == (1, 1)


def test_one_of_several_processes_of_torchrun_is_refused(variables):
    variables({**TORCHRUN, "WORLD_SIZE": "2", "RANK": "1"})
    with pytest.raises(
        ConfigurationError, match=r"one of 2 processes of torchrun: .* is not there yet\. Start one torchrun --nproc-per-node 1"
    ):
        Trainer(**quiet(devices=1, strategy=DecoupledDiLoCoStrategy(**LEARNER)))


def test_an_environment_that_was_given_stays(variables):
    variables({**ONE_OF_TWO_TASKS, "SLURM_NTASKS": "1"})
    given = SLURMEnvironment(auto_requeue=False)
    strategy = DecoupledDiLoCoStrategy(**LEARNER, cluster_environment=given)
    assert Trainer(**quiet(devices=1, strategy=strategy)).strategy.cluster_environment is given
    assert DecoupledDiLoCoStrategy().cluster_environment is None
