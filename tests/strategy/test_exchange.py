"""The two folders through which the processes of one fit hand files to each other: which file is taken, and from whom."""

from __future__ import annotations

import pytest

from lightning_diloco.strategy.assignment import Assignment
from lightning_diloco.strategy.exchange import Exchange, first_that_takes, spare_file


@pytest.fixture
def exchange(tmp_path):
    exchange = Exchange.make(tmp_path)
    yield exchange
    exchange.remove()


def refuse(path):
    raise OSError(28, "No space left on device", str(path))


def test_what_the_usual_place_takes_replaces_what_an_earlier_life_has_left_in_the_other_one(exchange):
    usual, spare = exchange.launch_dir / "fit.ckpt", exchange.spare_dir / "fit.ckpt"
    spare.write_text("of the first life")
    assert exchange.found("fit.ckpt", exchange.launch_dir) == exchange.spare_dir
    assert first_that_takes(lambda path: path.write_text("of the second"), usual, exchange.spare_dir) is None
    assert exchange.found("fit.ckpt", exchange.launch_dir) == exchange.launch_dir and not spare.exists()


def test_the_other_place_takes_what_the_usual_one_refuses(exchange):
    usual = exchange.launch_dir / "fit.ckpt"
    write = lambda path: refuse(path) if path == usual else path.write_text("here")  # noqa: E731
    assert first_that_takes(write, usual, exchange.spare_dir) is None
    assert spare_file(exchange.spare_dir, "fit.ckpt").read_text() == "here"


def test_a_folder_that_others_may_write_to_or_that_is_a_link_is_not_taken_from(exchange, tmp_path):
    (exchange.spare_dir / "fit.ckpt").write_text("here")
    exchange.spare_dir.chmod(0o777)
    assert spare_file(exchange.spare_dir, "fit.ckpt") is None
    exchange.spare_dir.chmod(0o700)
    assert spare_file(exchange.spare_dir, "fit.ckpt") is not None
    link = tmp_path / "link"
    link.symlink_to(exchange.spare_dir)
    assert spare_file(link, "fit.ckpt") is None


def test_only_a_supervised_learner_waits_long_for_a_syncer_that_is_looked_after():
    roles = ("learner", "inline", "island")
    assert [Assignment(role=role, endpoint="tcp://127.0.0.1:1").join_timeout_s for role in roles] == [3600.0, None, None]
