"""Damaged files are read or refused, and no write leaves half a file."""

import math
import os
import random
import zipfile

import pytest
import torch

import checkpoints
import files
from conftest import ADAPTER, GOLDEN, VIT
from helpers import list_again, read_entries


def damage(original, i, generator):
    """The i-th of many ways to cut a file's bytes, overwrite some of them, or both."""
    damaged = bytearray(original)
    if i % 3 == 0:
        damaged = damaged[:generator.randrange(len(original) + 1)]
    n_overwritten = generator.choice((0, 1, 30)) if damaged else 0
    for _ in range(n_overwritten):
        reach = len(damaged)
        if i % 2 == 0:                      # near the end, where a zip file has its directory
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
    """Cut, overwritten and empty files are either read or refused by a LavinError."""
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
            assert str(error).startswith(f"{damaged}:")
    assert n_refused > 50


def test_only_temporaries_of_our_own_are_removed(tmp_path):
    """write_atomically's names end in the process id and .tmp."""
    (tmp_path / "checkpoint.pth.123.tmp").write_text("left by a killed process")
    (tmp_path / "notes.tmp").write_text("a user's own")
    (tmp_path / "folder.123.tmp").mkdir()
    files.remove_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.123.tmp", "notes.tmp"]


# Files that torch did not write


def test_compressed_entries_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in read_entries(ADAPTER).items():
            archive.writestr(name, content)
    with pytest.raises(files.LavinError, match="a.pth: its entry .* is compressed"):
        files.read_checkpoint(path)


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    """torch.load would read the same bytes again and again, each time into new memory."""
    path = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(2**16)}, path)
    list_again(path, "a/data/0", [f"a/data/{i}" for i in range(1, 10)])
    with pytest.raises(files.LavinError, match="a.pth: .* more bytes than the file"):
        files.read_checkpoint(path)


def test_a_torchscript_archive_is_called_by_its_name():
    with pytest.raises(files.LavinError, match="ViT-tiny.pt: a TorchScript archive"):
        files.read_checkpoint(VIT)


def test_the_old_format_is_read_but_cannot_be_mapped(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(files.read_checkpoint(path)["a"], torch.ones(3))
    with pytest.raises(files.LavinError, match="a.pth: .*load and save it with torch"):
        files.read_checkpoint(path, mmap=True)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, said in [(tmp_path, "a folder"), (tmp_path / "fifo", "a pipe or a device"),
                       ("/dev/zero", "a pipe or a device"), (tmp_path / "none", "no such file"),
                       (tmp_path / "a\0b", "cannot be read"),
                       (tmp_path / ("x" * 300), "cannot be read")]:
        for read in (files.read_checkpoint, checkpoints.read_adapter, files.read_json):
            with pytest.raises(files.LavinError, match=said):
                read(path)


def test_a_file_that_one_may_not_read(tmp_path, monkeypatch):
    """The error does not call it truncated. (If root runs the tests, it can read everything.)"""
    path = tmp_path / "a.pth"
    path.write_bytes(ADAPTER.read_bytes())

    def refuse(*args, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "is_zip", refuse)
    with pytest.raises(files.LavinError, match=r"a.pth: cannot be read \(Permission denied\)"):
        files.read_checkpoint(path)


@pytest.mark.parametrize("dtype", [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_finite_numbers(dtype):
    numbers = torch.tensor([[1.0, -2.0], [3.0, 0.0]]).to(dtype)
    assert files.is_finite(numbers)
    assert files.is_finite(numbers[:0]) and files.is_finite(numbers[0, 0])
    assert files.is_finite(numbers.T.requires_grad_())
    for wrong in (math.nan, math.inf, -math.inf):
        damaged = numbers.detach().clone()
        damaged[1, 0] = wrong
        assert not files.is_finite(damaged)


def test_numbers_that_another_dtype_cannot_hold():
    numbers = torch.tensor([1.0, -70_000.0])
    assert files.is_finite(numbers) and files.is_finite(numbers, torch.bfloat16)
    assert not files.is_finite(numbers, torch.float16)


# Writing


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
    with pytest.raises(files.LavinError, match="not a regular file"):
        files.write_atomically(fifo, write_after)
    with pytest.raises(files.LavinError, match="not a regular file"):
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
