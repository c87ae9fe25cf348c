"""What the system says of a folder becomes a sentence: one that may be over in a while is told from one that is not."""

from __future__ import annotations

import errno

import pytest

from lightning_diloco.errors import ConfigurationError, DiskError
from lightning_diloco.runtime.disk import disk_errors


@pytest.mark.parametrize(
    ("number", "is_for_now"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EACCES, False), (errno.ENOTDIR, False)]
)
def test_only_a_disk_that_may_take_it_later_is_tried_again(tmp_path, number, is_for_now):
    with pytest.raises(ConfigurationError, match=str(tmp_path)) as caught, disk_errors(tmp_path):
        raise OSError(number, "no")
    assert isinstance(caught.value, DiskError) == is_for_now and caught.value.__cause__.errno == number


def test_a_reader_of_our_output_that_goes_is_no_matter_of_the_folder(tmp_path):
    with pytest.raises(BrokenPipeError) as caught, disk_errors(tmp_path):
        raise BrokenPipeError(errno.EPIPE, "no")
    assert caught.value.errno == errno.EPIPE
