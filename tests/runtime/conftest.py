"""What tests of links with keys share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.key_helpers import Keys


@pytest.fixture
def keys(tmp_path) -> Keys:
    return Keys(tmp_path / "keys")


@pytest.fixture
def run_dir(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder
