"""Reading damaged files, and writing without leaving half of one."""

import os
import random

import pytest

import checkpoints
import files
from conftest import ADAPTER, GOLDEN, VIT


def damage(original, i, generator):
    """The i-th of many ways to cut a file's bytes, overwrite some of them, or both."""
    damaged = bytearray(original)
    if i % 3 == 0:
        damaged = damaged[:generator.randrange(len(original) + 1)]
    n_overwritten = generator.choice((0, 1, 30)) if damaged else 0
    for _ in range(n_overwritten):
        reach = len(damaged)
        if i % 2 == 0:                      # at the end, where a zip file has its directory
            reach = min(reach, 4000)
        from_the_end = generator.randrange(reach)
        damaged[-1 - from_the_end] = generator.randrange(256)
    return damaged


@pytest.mark.parametrize("read, path", [
    (checkpoints.read_adapter, ADAPTER),
    (checkpoints.read_clip, VIT),
    (files.read_json, GOLDEN / "samples.json"),
    (files.read_checkpoint, ADAPTER),
], ids=["read_adapter", "read_clip", "read_json", "read_checkpoint"])
def test_damaged_bytes_end_in_one_kind_of_error(tmp_path, read, path):
    """Cut, overwritten and empty files: each is read, or refused by a LavinError."""
    generator = random.Random(0)
    original = path.read_bytes()
    damaged = tmp_path / "damaged"
    n_refused = 0
    for i in range(150):
        damaged.write_bytes(damage(original, i, generator))
        try:
            read(damaged)
        except files.LavinError as error:
            n_refused += 1
            assert "damaged" in str(error)          # the file's name
    assert n_refused > 50


def test_writing_is_atomic(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half of the n")
        raise OSError("No space left on device")

    with pytest.raises(files.LavinError, match="cannot be written.*No space left"):
        files.write_atomically(target, fail)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def write_after(path):
    path.write_text("after")


def test_what_is_no_file_is_not_replaced(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(files.LavinError, match="no regular file"):
        files.write_atomically(fifo, write_after)
    with pytest.raises(files.LavinError, match="no regular file"):
        files.check_writable(fifo, "--x")
    assert fifo.is_fifo()


def test_of_a_link_the_target_is_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("before")
    link = tmp_path / "link"
    link.symlink_to(file)
    files.write_atomically(link, write_after)
    assert link.is_symlink()
    assert file.read_text() == "after"
