"""The table of `lightning-diloco status`, for a status that is written down here."""

from __future__ import annotations

import msgspec

from lightning_diloco.cli.status import _show
from lightning_diloco.cli.status_table import status_text
from lightning_diloco.protocol.observer_messages import Fault, LearnerStatus, Status

ACTIVE = LearnerStatus(
    learner_id=0,
    incarnation=0,
    device="NVIDIA H100",
    state="active",
    heard_age_s=0.21,
    inner_step=12_345,
    tokens=9_876_543,
    version_min=510,
    version_max=512,
    participation=0.987,
    staleness_versions=0.25,
    steps_per_s=2.5,
    tokens_per_s=20_480.4,
    bytes_up=1_234_567,
    bytes_down=999,
)
GONE = LearnerStatus(
    learner_id=7,
    incarnation=3,
    device="cpu",
    state="gone",
    heard_age_s=None,
    inner_step=80,
    tokens=640,
    version_min=None,
    version_max=None,
    participation=None,
    staleness_versions=None,
    steps_per_s=None,
    tokens_per_s=None,
    bytes_up=0,
    bytes_down=12_000_000_000,
    fault=Fault(what="life 2 ended: died", age_s=75.0),
)
STATUS = Status(
    job_id="0123abcd",
    epoch=1,
    status="running",
    wall_s=7_384.0,
    merges=1_200,
    mean_members=1.75,
    num_members=1,
    num_active=1,
    num_fragments=24,
    version_min=512,
    version_max=512,
    open_rounds=2,
    tokens=9_877_183,
    tokens_merged=9_800_000,
    tokens_pending=77_000,
    tokens_discarded=183,
    bytes_up=1_234_567,
    bytes_down=12_000_000_999,
    goodput=0.5,
    uptime=1.0,
    num_learners=2,
    learners=(ACTIVE, GONE),
)

TEXT = """\
job 0123abcd, epoch 1: running for 2 h 3 min
learners   1 joined, 1 active
merges     1,200, 1.75 members each; 24 fragments at versions 512, 2 rounds open
tokens     9,877,183: merged 9,800,000, pending 77,000, discarded 183
payloads   1.2 MB up, 12.0 GB down
so far     uptime 100.0 %, goodput 50.0 %

learner  life  device       state   heard    step     tokens  versions   part.  stale  steps/s  tokens/s      up     down  last error
      0     0  NVIDIA H100  active  0.2 s  12,345  9,876,543  510..512  98.7 %   0.25     2.50    20,480  1.2 MB    999 B
      7     3  cpu          gone        -      80        640         -       -      -        -         -     0 B  12.0 GB  1 min 15 s ago: life 2 ended: died
"""  # noqa: E501


def test_a_status_becomes_this_text():
    assert status_text(STATUS) == TEXT


def test_a_job_that_has_not_begun_has_a_table_too():
    fields = {name: None for name in ("wall_s", "mean_members", "version_min", "version_max", "goodput", "uptime")}
    empty = msgspec.structs.replace(STATUS, status="waiting", learners=(), num_learners=0, num_fragments=0, **fields)
    text = status_text(empty)
    assert "job 0123abcd, epoch 1: waiting\n" in text and "None" not in text and "0 fragments at versions -" in text


def test_a_peer_cannot_move_the_cursor_or_break_a_row():
    evil = "\x1b[2J\x1b]0;owned\x07\nlearner\r\u202e\u200b"
    learner = msgspec.structs.replace(ACTIVE, device=evil, fault=Fault(what=evil, age_s=1.0))
    status = msgspec.structs.replace(STATUS, job_id=evil, learners=(learner,), num_learners=1, refused_join=Fault(what=evil, age_s=2.0))
    text = status_text(status)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert len(text.splitlines()) == len(text.split("\n")) - 1 == 10


def test_learners_that_are_not_told_of_are_counted():
    assert status_text(msgspec.structs.replace(STATUS, num_learners=302)).endswith("\n... and 300 more learners\n")


def test_json_is_the_message_and_reads_back_and_cannot_move_the_cursor(capsys):
    evil = msgspec.structs.replace(STATUS, job_id="\x1b[2J\n\x9b2J\x7f\u202e")
    for status in (STATUS, evil):
        _show(status, is_json=True, is_live=False)
        said = capsys.readouterr().out
        assert said.isascii() and said[:-1].isprintable() and msgspec.json.decode(said, type=Status) == status
