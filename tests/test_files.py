"""Loading and saving: shards, archives, adapters; what is written is what was read."""

import argparse
import os
import random
import shutil

import pytest
import torch

import adapters
import files
import peak_memory
import train
import vit
from conftest import ADAPTER, GOLDEN, LLAMA, VIT, difference
from model import LaVIN


def shard(directory, n):
    """LLAMA cut into n model-parallel shards, as Meta cuts it."""
    directory.mkdir()
    shutil.copy(LLAMA / "params.json", directory)
    shutil.copy(LLAMA.parent / "tokenizer.model", directory)
    whole = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    for i in range(n):
        pieces = {}
        for name, tensor in whole.items():
            dim = 1 if any(part in name for part in (".wo.", ".w2.", "tok_embeddings")) else 0
            pieces[name] = (tensor if tensor.dim() == 1 else tensor.chunk(n, dim)[i]).clone()
        torch.save(pieces, directory / f"consolidated.{i:02}.pth")
    return directory


@pytest.mark.parametrize("n", [2, 4])
def test_any_number_of_shards(tmp_path, lavin, n):
    sharded = LaVIN.load(shard(tmp_path / "llama", n), VIT, ADAPTER).state_dict()
    for name, tensor in lavin.state_dict().items():
        assert torch.equal(tensor, sharded[name]), name


def test_a_missing_shard_is_named(tmp_path):
    (shard(tmp_path / "llama", 2) / "consolidated.01.pth").unlink()
    with pytest.raises(files.LavinError, match=r"tok_embeddings.weight is \(512, 32\) in 1 shard.*is a consolidated.NN.pth missing"):
        LaVIN.load(tmp_path / "llama", VIT)


def test_the_rope_frequencies_that_metas_files_carry_are_ignored(tmp_path, lavin):
    """LLaMA-1 has them in every layer, LLaMA-2 once; the golden file is of the second kind."""
    llama = shard(tmp_path / "llama", 1)
    tensors = torch.load(llama / "consolidated.00.pth", weights_only=True)
    tensors |= {f"layers.{i}.attention.inner_attention.rope.freqs": tensors["rope.freqs"] for i in range(4)}
    torch.save(tensors, llama / "consolidated.00.pth")
    assert torch.equal(LaVIN.load(llama, VIT).llama.output.weight, lavin.llama.output.weight)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_peak_memory_of_loading(dtype):
    """The model in its target dtype, one tensor of each shard, and 4 MB for the modules themselves."""
    m = peak_memory.measure(dtype)
    assert m["after"] - m["before"] < m["model"] + m["one tensor of each shard"] + 4, m


def test_clip_as_a_plain_state_dict(tmp_path, lavin):
    torch.save(torch.jit.load(VIT).state_dict(), tmp_path / "vit.pt")
    assert vit.read(tmp_path / "vit.pt")[1] == vit.read(VIT)[1] == vit.ViTConfig(width=64, layers=8, patch=8, resolution=32)
    for name, tensor in LaVIN.load(LLAMA, tmp_path / "vit.pt", ADAPTER).state_dict().items():
        assert torch.equal(tensor, lavin.state_dict()[name]), name


@pytest.mark.parametrize("prefix", ["", "module."])
def test_adapters_round_trip_bit_exactly(tmp_path, lavin, prefix):
    released = torch.load(ADAPTER, weights_only=False)
    ours = adapters.official_checkpoint(lavin, "QCM-ALE")
    assert ours["model"].keys() == released["model"].keys()
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, released["model"][name]), name
    args, theirs = vars(ours["args"]), vars(released["args"])
    assert theirs.keys() - args.keys() == {"llm_model"}
    assert all(args[name] == theirs[name] for name in theirs.keys() - {"llm_model", "n_prompt"})     # 2 features here, 6 in ViT-L
    ours["model"] = {prefix + name: tensor for name, tensor in ours["model"].items()}
    torch.save(ours, tmp_path / "ours.pth")
    again = LaVIN.load(LLAMA, VIT, tmp_path / "ours.pth")
    assert again.config == lavin.config and again.max_seq_len == 128
    for name, tensor in adapters.to_official(again).items():
        assert torch.equal(tensor, released["model"][name]), name


def test_rank_and_tau_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    wide = LaVIN.load(LLAMA, VIT, tau=5.0)
    with torch.device("meta"):
        other = LaVIN(wide.llama.config, vit.read(VIT)[1], adapters.AdapterConfig(rank=4, hidden=32, tau=5.0), None, 77)
    other = other.to_empty(device="cpu")
    other.init_trained()
    torch.save(adapters.official_checkpoint(other, "QCM-A"), tmp_path / "rank4.pth")
    loaded = LaVIN.load(LLAMA, VIT, tmp_path / "rank4.pth")
    assert (loaded.config.rank, loaded.config.hidden, loaded.config.tau, loaded.max_seq_len) == (4, 32, 5.0, 77)
    assert loaded.llama.layers[0].adapter.router.tau == loaded.vit.resblocks[0].adapter.router.tau == 5.0
    torch.save({"model": adapters.to_official(other)}, tmp_path / "bare.pth")
    assert LaVIN.load(LLAMA, VIT, tmp_path / "bare.pth").config.tau == 10.0


def test_a_file_that_train_wrote_is_one_the_reference_reads(tmp_path, lavin):
    """Official names and shapes, args in a Namespace, and nothing that a plain weights_only load refuses."""
    config = argparse.Namespace(format="QCM-ALE", bits=16, out=str(tmp_path), lr=1e-3)
    optimizer = train.make_optimizer(lavin)
    train.save(lavin, optimizer, torch.amp.GradScaler("cpu", enabled=False), 7, 3, config)
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        released = torch.load(ADAPTER, weights_only=True)
    assert released.keys() <= checkpoint.keys()
    assert {n: t.shape for n, t in checkpoint["model"].items()} == {n: t.shape for n, t in released["model"].items()}
    assert checkpoint["epoch"] == 2 and checkpoint["args"].temperature == 10.0
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pth"]


@pytest.mark.parametrize("read", [adapters.read, vit.read, files.read_json, files.read_checkpoint])
def test_damaged_bytes_end_in_one_kind_of_error(tmp_path, read):
    """Cut, flipped, overwritten and empty files: each is read, or refused by a LavinError."""
    generator, refused = random.Random(0), 0
    original = {adapters.read: ADAPTER, vit.read: VIT, files.read_json: GOLDEN / "samples.json"}.get(read, ADAPTER).read_bytes()
    for i in range(150):
        damaged = bytearray(original[:generator.randrange(len(original) + 1)] if i % 3 == 0 else original)
        for _ in range(generator.choice((0, 1, 30)) if damaged else 0):
            # half of the damage at the end, where a zip file has its directory
            at = generator.randrange(len(damaged) if i % 2 else min(len(damaged), 4000))
            damaged[-1 - at] = generator.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            read(tmp_path / "damaged")
        except files.LavinError as error:
            refused += 1
            assert "damaged" in str(error)
    assert refused > 50


def test_writing_is_atomic(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")

    def fail(path):
        path.write_text("half of the n")
        raise OSError("No space left on device")

    with pytest.raises(files.LavinError, match="cannot be written.*No space left"):
        files.write_atomically(target, fail)
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_gradient_that_never_flowed_is_zero(lavin, samples):
    lavin(lavin.batch([samples[1]])).backward()             # no picture
    gradients = adapters.to_official(lavin, grad=True)
    assert difference(gradients["adapter_proj.conv_A.weight"], 0) == 0
    assert difference(gradients["layers.0.adapter_attn.conv_A.weight"], 0) > 0


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("before")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for check in (lambda: files.write_atomically(tmp_path / "fifo", lambda path: path.write_text("x")),
                  lambda: files.check_writable(tmp_path / "fifo", "--x")):
        with pytest.raises(files.LavinError, match="no regular file"):
            check()
    files.write_atomically(tmp_path / "link", lambda path: path.write_text("after"))
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "after"
