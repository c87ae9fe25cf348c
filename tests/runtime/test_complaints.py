"""What a peer says is shown as one line of bounded length, whoever shows it."""

from __future__ import annotations

import logging

import msgspec
import pytest

from lightning_diloco.errors import RemoteProtocolError
from lightning_diloco.protocol.wire import decode_from_learner, decode_from_syncer, decode_learner_header, decode_syncer_header
from lightning_diloco.runtime.complaints import MAX_SHOWN, Complaints, printable

EVIL = "x\n2026-01-01 ERROR forged\r\x1b[2J\x1b]0;owned\x07\x9b\u202e\u200b\ud800"
JOB = ("job", "line", 0, 0)


def with_tag(tag: str) -> bytes:
    return msgspec.msgpack.encode((JOB, {"type": tag, "number": 1}))


def with_field(name: str) -> bytes:
    return msgspec.msgpack.encode((JOB, {"type": "Ping", "number": 1, name: 2}))


def is_one_line(text: str, limit: int = MAX_SHOWN) -> bool:
    return text.isprintable() and len(text) <= limit


def test_printable_words_are_shown_as_they_are():
    assert printable("learner 3 of Ålesund, 日本: naïve") == "learner 3 of Ålesund, 日本: naïve"


def test_words_become_one_line_of_bounded_length():
    assert printable("a\nb\x1b[2J\x9b") == "a?b?[2J?"
    assert is_one_line(printable(EVIL)) and printable("y" * 10**6, 10) == "yyyyyyy..."
    assert printable("y" * MAX_SHOWN) == "y" * MAX_SHOWN and len(printable("y" * 10**6)) == MAX_SHOWN


@pytest.mark.parametrize("make", [with_tag, with_field])
@pytest.mark.parametrize("word", [EVIL[:-1], "z" * 1_000_000], ids=["evil", "long"])
@pytest.mark.parametrize("decode", [decode_from_learner, decode_from_syncer, decode_learner_header, decode_syncer_header])
def test_bytes_that_are_no_message_cannot_forge_a_line_or_fill_a_disk(caplog, decode, word, make):
    with pytest.raises(RemoteProtocolError) as raised:
        decode(make(word))
    Complaints(logging.getLogger("test")).add("A message", raised.value)
    (record,) = caplog.records
    assert is_one_line(record.getMessage(), MAX_SHOWN + 100) and "further ones are not logged" in record.getMessage()
    assert record.getMessage().startswith("A message was dropped: wrong_layout: not a")


def test_the_words_are_refused_by_tag_and_by_field_and_repeated():
    """Otherwise the test above would show nothing."""
    for data in (with_tag("owned"), with_field("owned")):
        with pytest.raises(RemoteProtocolError, match="owned"):
            decode_from_learner(data)
