"""What the network of `gpt_text` computes and how it learns."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_diloco.errors import ConfigurationError
from recipes.byte_model import warmup_cosine
from recipes.gpt_text.data import TextData
from recipes.gpt_text.model import GPT, GPTText, rotary_table, rotate

CONTEXT = 16


@pytest.fixture
def module():
    torch.manual_seed(0)
    return GPTText(num_layers=2, num_heads=2, channels=32, context=CONTEXT)


def windows(batch_size, length=CONTEXT + 1):
    return torch.randint(0, 256, (batch_size, length), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", [1, 7, CONTEXT])
def test_each_byte_gets_one_distribution_over_bytes(module, length):
    assert module(windows(3, length).long()).shape == (3, length, 256)


@pytest.mark.parametrize("changed", range(CONTEXT))
def test_a_byte_changes_its_own_logits_and_later_ones_but_never_earlier_ones(module, changed):
    tokens = windows(1, CONTEXT).long()
    other = tokens.clone()
    other[0, changed] = (other[0, changed] + 1) % 256
    difference = (module(tokens) - module(other)).abs().amax(dim=(0, 2))
    assert (difference[:changed] == 0).all()
    assert (difference[changed:] > 0).all()


def test_the_order_of_earlier_bytes_matters(module):
    tokens = windows(1, CONTEXT).long()
    swapped = tokens.clone()
    swapped[0, [2, 5]] = tokens[0, [5, 2]]
    assert (module(tokens)[0, -1] - module(swapped)[0, -1]).abs().max() > 1e-5


def test_rotated_products_depend_on_the_distance_alone():
    cos, sin = rotary_table(CONTEXT, 8)
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    queries = rotate(query.expand(1, 1, CONTEXT, 8), cos, sin)[0, 0]
    keys = rotate(key.expand(1, 1, CONTEXT, 8), cos, sin)[0, 0]
    products = queries @ keys.T
    for distance in range(CONTEXT):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(products[0, 0], query @ key)


def test_an_untrained_model_is_about_as_good_as_guessing(module):
    loss = module._predict(windows(8))[0]
    assert abs(loss.item() - math.log(256)) < 0.1


def test_the_recipes_model_has_close_to_a_million_parameters_and_a_head_of_its_own():
    module = GPTText()
    assert 800_000 <= sum(p.numel() for p in module.parameters()) <= 1_000_000
    names = dict(module.named_parameters())
    assert "gpt.lm_head.weight" in names
    assert names["gpt.lm_head.weight"] is not names["gpt.embedding.weight"]


def test_the_tokens_of_a_batch_are_the_bytes_that_it_predicts(module):
    assert module.diloco_tokens(windows(5)) == 5 * CONTEXT


def test_heads_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ConfigurationError, match=r"channels=30.*num_heads=4"):
        GPT(num_layers=1, num_heads=4, channels=30, context=8)


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    def share(step):
        return warmup_cosine(step, warmup_steps=10, max_steps=110, floor=0.1)

    assert [share(s) for s in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert share(60) == pytest.approx(0.55)
    assert share(110) == share(10_000) == pytest.approx(0.1)
    falling = [share(s) for s in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


@pytest.fixture
def trained(tmp_path, module):
    """A short run on a text of one sentence, in this process."""
    (tmp_path / "text.txt").write_text("all work and no play makes a dull text. " * 100, "utf-8")
    data = TextData(path=str(tmp_path / "text.txt"), context=CONTEXT, batch_size=8)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=60,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    module.hparams.update(warmup_steps=10, learning_rate=1e-2)
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
    return trainer, metrics


def test_training_learns_a_repeated_sentence_and_logs_its_loss_and_perplexity(trained):
    trainer, metrics = trained
    assert metrics["val_loss"] < 1.5
    # Two routes to one figure: the mean of cross entropies, and torchmetrics' own sum over all bytes.
    assert metrics["val_perplexity"] == pytest.approx(math.exp(metrics["val_loss"]), rel=1e-4)
    assert trainer.global_step == 60


def test_norms_are_not_decayed_and_every_parameter_is_trained_once(trained):
    trainer, _ = trained
    decayed, plain = trainer.optimizers[0].param_groups
    assert decayed["weight_decay"] > 0 and plain["weight_decay"] == 0
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(trainer.lightning_module.parameters()))
    assert decayed["lr"] == pytest.approx(1e-2 * 0.1)


def test_a_run_without_an_end_is_refused(module):
    module.trainer = Trainer(accelerator="cpu", max_steps=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ConfigurationError, match=r"max_steps=-1"):
        module.configure_optimizers()


def test_a_generated_text_continues_the_prompt_and_follows_the_seed(module):
    text = module.generate(b"def ", 30, seed=3)
    assert text.startswith(b"def ") and len(text) == 34
    assert text == module.generate(b"def ", 30, seed=3)
    assert text != module.generate(b"def ", 30, seed=4)


def test_generating_leaves_the_module_in_training_mode(module):
    module.train()
    module.generate(b"x", 1)
    assert module.training


def test_an_empty_prompt_is_refused(module):
    with pytest.raises(ConfigurationError, match="at least one byte"):
        module.generate(b"", 5)
