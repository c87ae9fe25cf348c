"""Names and values that a recipe cannot take: one sentence each, whoever finds them."""

from __future__ import annotations

import importlib

import pytest
from hydra import compose, initialize_config_dir

from lightning_diloco.errors import ConfigurationError
from recipes.job import build_trainer
from recipes.values import check_devices
from tests.recipes.test_entry_point import ROOT

WRONG = [
    ("data.batch_size=0", "data.batch_size=0: must be a whole number of at least 1."),
    ("data.num_workers=x", "data.num_workers='x': must be a whole number of at least 0; this is text, an int is needed."),
    ("+data.pth=x", "data.pth: there is no such value; did you mean data.path?"),
    ("+model.chanels=8", "model.chanels: there is no such value; did you mean model.channels?"),
    ("model.num_heads=0", "model.num_heads=0: must be a whole number of at least 1."),
    ("+trainer.foo=1", "trainer.foo: there is no such value; leave it out; trainer takes accelerator, "),
    ("+trainer.logger=true", "trainer.logger: a recipe sets this itself. Leave it out."),
    ("trainer.accelerator=abacus", "A value of trainer is refused by Lightning: "),
    ("+trainer.max_epochs=-5", "A value of trainer is refused by Lightning: "),
    ("+strategy.run_dir=x", "strategy.run_dir: a recipe sets this itself."),
    ("+strategy.min_quorums=2", "Unknown option 'min_quorums': did you mean 'min_quorum'?"),
    ("strategy.min_quorum=3", "min_quorum=3 with devices=2: "),
]


@pytest.mark.parametrize(("option", "sentence"), WRONG)
def test_a_wrong_name_or_value_gets_a_sentence(option, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", ["recipe=gpt_text", option])
    with pytest.raises(ConfigurationError) as caught:
        importlib.import_module(f"recipes.{cfg.name}").build(cfg)
        build_trainer(cfg, tmp_path / "run")
    assert str(caught.value).startswith(sentence)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("devices", ["zwei", "auto", 0, -1, 1.5, True, None])
def test_the_number_of_learners_is_a_whole_number(devices):
    with pytest.raises(ConfigurationError, match=r"^trainer\.devices=.*: must be a whole number of at least 1, the number of learners"):
        check_devices(devices)
    check_devices(2)
