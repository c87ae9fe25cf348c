"""What `gpt_text` trains on and what it holds out."""

from __future__ import annotations

import pickle
import sysconfig
from pathlib import Path

import pytest
import torch

from lightning_diloco.errors import ConfigurationError
from recipes.gpt_text.data import TextData, is_held_out, library_files, load_corpus, text_files, validation_starts

CONTEXT = 64


@pytest.fixture(scope="module")
def library():
    data = TextData(context=CONTEXT)
    data.setup()
    return data


@pytest.fixture
def folder(tmp_path):
    """Sixty text files of different content, of which the hash holds some out."""
    for number in range(60):
        path = tmp_path / f"part{number % 3}" / f"file{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{number}>" * 100, "utf-8")
    return tmp_path


def as_bytes(tensor):
    return bytes(tensor.numpy())


def test_the_same_files_are_held_out_every_time(library):
    again = load_corpus(None, min_bytes=1)
    assert torch.equal(again.train, library.corpus.train)
    assert torch.equal(again.val, library.corpus.val)


def test_a_files_part_depends_on_its_path_alone():
    # Fixed values: a change of the rule would change every recorded validation loss.
    assert is_held_out("operator.py")
    assert is_held_out("runpy.py")
    assert not is_held_out("ast.py")
    assert not is_held_out("json/decoder.py")


def test_about_one_file_in_twenty_is_held_out():
    assert 0.04 < sum(is_held_out(f"module{n}.py") for n in range(10_000)) / 10_000 < 0.06


def test_the_library_is_split_into_whole_files_without_overlap(library):
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = list(library_files(root))
    train, val = as_bytes(library.corpus.train), as_bytes(library.corpus.val)
    for path in paths:
        part, other = (val, train) if is_held_out(path.relative_to(root).as_posix()) else (train, val)
        text = path.read_bytes()
        assert text in part
        # Short files (a package's comment) may be repeated inside others.
        assert len(text) < 500 or text not in other
    assert len(train) + len(val) == sum(p.stat().st_size for p in paths) + len(paths) - 2


def test_library_files_leave_out_tests_and_what_was_installed():
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = {part for path in library_files(root) for part in path.relative_to(root).parts[:-1]}
    assert parts.isdisjoint({"test", "tests", "site-packages", "dist-packages", "lib2to3", "idlelib", "encodings", "__pycache__"})
    assert "asyncio" in parts


def test_windows_are_pieces_of_the_training_text_at_quarters_of_the_context(library):
    windows = library.train_windows()
    text = library.corpus.train
    assert torch.equal(windows.starts[:3], torch.tensor([0, CONTEXT // 4, CONTEXT // 2]))
    last = windows[len(windows) - 1]
    assert last.dtype == torch.uint8
    for index in (0, 1, 1000, len(windows) - 1):
        start = int(windows.starts[index])
        assert torch.equal(windows[index], text[start : start + CONTEXT + 1])
        assert len(windows[index]) == CONTEXT + 1
    assert len(text) - (int(windows.starts[-1]) + CONTEXT + 1) < CONTEXT // 4


def test_a_training_batch_holds_windows_with_one_byte_more_than_the_context(library):
    batch = next(iter(library.train_dataloader()))
    assert batch.shape == (library.batch_size, CONTEXT + 1)
    assert batch.dtype == torch.uint8


def test_validation_windows_predict_no_byte_twice_and_are_always_the_same(library):
    windows = library.val_windows()
    assert len(windows) == library.val_bytes // CONTEXT
    gaps = windows.starts.diff()
    assert int(gaps.min()) >= CONTEXT
    assert int(gaps.max()) - int(gaps.min()) <= 1
    assert int(windows.starts[-1]) + CONTEXT + 1 == len(library.corpus.val)
    first, second = (torch.cat(list(library.val_dataloader())) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("num_bytes", [65, 66, 128, 129, 130, 1000])
def test_validation_windows_fit_short_texts(num_bytes):
    starts = validation_starts(num_bytes, CONTEXT, 10_000)
    assert len(starts) == (num_bytes - 1) // CONTEXT
    assert int(starts[0]) == 0
    assert int(starts[-1]) + CONTEXT + 1 <= num_bytes
    assert (starts.diff() >= CONTEXT).all()


def test_an_unused_data_module_pickles_without_its_text(library):
    assert len(pickle.dumps(library)) < 2000
    copy = pickle.loads(pickle.dumps(library))
    assert torch.equal(copy.train_windows()[7], library.train_windows()[7])


def test_of_one_file_the_last_twentieth_is_held_out(tmp_path):
    text = bytes(range(32, 127)) * 100
    (tmp_path / "mine.txt").write_bytes(text)
    corpus = load_corpus(str(tmp_path / "mine.txt"), min_bytes=1)
    assert as_bytes(corpus.train) + as_bytes(corpus.val) == text
    assert len(corpus.val) == len(text) // 20


def test_of_a_folder_whole_files_are_held_out(folder):
    corpus = load_corpus(str(folder), min_bytes=1)
    train, val = as_bytes(corpus.train).split(b"\n"), as_bytes(corpus.val).split(b"\n")
    assert not set(train) & set(val)
    assert set(train) | set(val) == {p.read_bytes() for p in folder.rglob("*.txt")}
    assert set(val) == {p.read_bytes() for p in folder.rglob("*.txt") if is_held_out(p.relative_to(folder).as_posix())}


def test_of_a_few_files_that_the_hash_keeps_together_the_last_is_held_out(tmp_path):
    for name in ("ast.py", "b", "c"):
        assert not is_held_out(name)
        (tmp_path / name).write_text(name * 100, "utf-8")
    assert as_bytes(load_corpus(str(tmp_path), min_bytes=1).val) == b"c" * 100


def test_hidden_empty_and_binary_files_are_no_text(tmp_path):
    (tmp_path / "text").write_text("text", "utf-8")
    (tmp_path / ".hidden").write_text("hidden", "utf-8")
    (tmp_path / "empty").touch()
    (tmp_path / "binary").write_bytes(b"ab\0cd")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("config", "utf-8")
    assert [p.name for p in text_files(tmp_path)] == ["text"]


def test_a_path_stays_the_same_file_when_the_working_directory_changes(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("abcdefghij" * 1000, "utf-8")
    monkeypatch.chdir(tmp_path)
    data = TextData(path="mine.txt")
    monkeypatch.chdir("/")
    data.setup()
    assert len(data.corpus.train) == 9500


def test_too_little_text_is_refused_with_the_length_that_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("short", "utf-8")
    data = TextData(path=str(tmp_path / "short.txt"))
    with pytest.raises(ConfigurationError, match=r"short\.txt.*at least 1300 bytes"):
        data.setup()


def test_a_text_of_fewer_windows_than_a_batch_still_gives_a_batch(tmp_path):
    (tmp_path / "small.txt").write_text("x" * 1320, "utf-8")
    data = TextData(path=str(tmp_path / "small.txt"), batch_size=1000)
    (batch,) = data.train_dataloader()
    assert len(batch) == len(data.train_windows())
