"""Recipes with packages of their own: what a wrong value or a missing package gets. Training them is no unit test."""

from __future__ import annotations

import importlib.util

import pytest
from hydra import compose, initialize_config_dir

from lightning_diloco import ConfigurationError
from recipes.extras import require
from tests.recipes.test_entry_point import ROOT

NEEDED = ("transformers", "peft", "sklearn")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
with_extras = pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} not installed: make extras")


def build(*options: str):
    import importlib

    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", [*options])
    return cfg, importlib.import_module(f"recipes.{cfg.name}").build(cfg)


def test_a_missing_package_is_named_with_the_remedy():
    with pytest.raises(ConfigurationError, match=r"recipe=mine needs no_such_package, .*make extras"):
        require("mine", "torch", "no_such_package")
    require("mine", "torch")


@pytest.mark.parametrize("recipe", ["hf_causal_lm", "moe_text", "lora_text", "digits"])
def test_every_recipe_composes(recipe):
    with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
        cfg = compose("config", [f"recipe={recipe}"])
    assert cfg.trainer.devices == 2 and cfg.strategy.name == "decoupled_diloco"


@pytest.mark.extras
@with_extras
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["recipe=hf_causal_lm", "model.architecture=nonsense"], "model.architecture='nonsense'"),
        (["recipe=hf_causal_lm", "+model.config.hidden_sizes=3"], "model.config.hidden_sizes: a llama has no such field"),
        (["recipe=hf_causal_lm", "model.weights=/no/such/file"], "model.weights='/no/such/file': there is no such file"),
        (["recipe=lora_text", "+model.lora.rank=3"], "model.lora: .*rank"),
        (["recipe=digits", "data.val_share=2"], "data.val_share=2.*must lie between"),
    ],
)
def test_a_wrong_value_gets_a_sentence(options, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        build(*options)


@pytest.mark.extras
@with_extras
def test_adapters_alone_are_trained_and_continue_a_text():
    cfg, (module, _) = build("recipe=lora_text", "data.context=16")
    module.configure_model()
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert len(module.generate(b"def ", 3)) == 7 and module.context == 16
