"""The official files survive a round trip, and files that do not fit are refused.

LLaMA's shards, CLIP's archives, LaVIN's adapters, and `python checkpoints.py FILE`.
"""

import argparse
import math
import os
import pickle
import re
import shutil

import pytest
import torch

import checkpoints
import data
import generate
import train
from adapters import AdapterConfig
from bench import peak_memory
from conftest import ADAPTER, LLAMA, VIT, difference
from files import LavinError, read_checkpoint, tokenizer_path
from helpers import FAULTS, ask, copy_llama, with_one
from model import LaVIN, LLaMAConfig
from vit import ViTConfig


def truncate(source, target):
    """Write the first half of a file -> target."""
    content = source.read_bytes()
    target.write_bytes(content[:len(content) // 2])
    return target


def test_truncated_files(fails, tmp_path):
    vit = truncate(VIT, tmp_path / "ViT.pt")
    fails(generate, *ask(vit=vit), says=["ViT.pt", "truncated"])
    adapter = truncate(ADAPTER, tmp_path / "adapter.pth")
    fails(generate, *ask(adapter=adapter), says=["adapter.pth", "truncated"])
    llama = copy_llama(tmp_path / "llama")
    truncate(LLAMA / "consolidated.00.pth", llama / "consolidated.00.pth")
    fails(generate, *ask(llama=llama), says=["consolidated.00.pth", "truncated"])
    (llama / "tokenizer.model").write_bytes(b"not a tokenizer")
    fails(generate, *ask(llama=llama), says=["tokenizer.model", "not a sentencepiece tokenizer"])


# Files that would run code


class Hostile:
    """Creates the file `target` when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_a_pickle_is_never_executed(fails, tmp_path):
    executed = tmp_path / "executed"
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Hostile(executed)))
    zipped = tmp_path / "zipped.pth"
    torch.save({"model": Hostile(executed)}, zipped)
    llama = copy_llama(tmp_path / "llama")
    for path in (plain, zipped):
        fails(generate, *ask(adapter=path), says=[f"{path}: not a"])
        fails(generate, *ask(vit=path), says=[f"{path}: not a"])
        shutil.copy(path, llama / "consolidated.00.pth")
        fails(generate, *ask(llama=llama), says=["consolidated.00.pth: not "])
    assert not executed.exists()
    torch.load(zipped, weights_only=False)
    assert executed.exists()                # the trap works


# LLaMA


def shard_of(name, tensor, n, i):
    """The i-th of n model-parallel slices of a tensor, as Meta cuts it."""
    if tensor.dim() == 1:                   # norms are whole in every shard
        return tensor.clone()
    dim = 0
    for part in (".wo.", ".w2.", "tok_embeddings"):
        if part in name:
            dim = 1
    return tensor.chunk(n, dim)[i].clone()


def write_shards(directory, n):
    """LLAMA in n shards -> directory."""
    copy_llama(directory)
    whole = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    for i in range(n):
        shard = {name: shard_of(name, tensor, n, i) for name, tensor in whole.items()}
        torch.save(shard, directory / f"consolidated.{i:02}.pth")
    return directory


@pytest.mark.parametrize("n", [2, 4])
def test_any_number_of_shards(tmp_path, lavin, n):
    sharded = checkpoints.load(write_shards(tmp_path / "llama", n), VIT, ADAPTER).state_dict()
    for name, tensor in lavin.state_dict().items():
        assert torch.equal(tensor, sharded[name]), name


def shapes_of(parts):
    return [tuple(part.shape) for part in parts]


def test_slots():
    whole = torch.arange(24).reshape(4, 6)
    rows = [torch.empty(1, 6), torch.empty(3, 6)]
    top, bottom = checkpoints.slots(whole, rows)
    assert torch.equal(top, whole[:1]) and torch.equal(bottom, whole[1:])
    columns = [torch.empty(4, 2), torch.empty(4, 4)]
    left, right = checkpoints.slots(whole, columns)
    assert torch.equal(left, whole[:, :2]) and torch.equal(right, whole[:, 2:])
    assert left.data_ptr() == whole.data_ptr()          # a view, to be written to
    for n in (1, 3):                                    # a norm, whole in every shard
        assert checkpoints.slots(whole, [torch.empty(4, 6)] * n)[0] is whole


@pytest.mark.parametrize("shapes", [
    [(1, 6)],
    [(1, 6), (2, 6)],
    [(1, 6), (4, 6)],
    [(2, 5), (2, 5)],
    [(2, 6), (4, 3)],
    [(6, 4)],
    [(24,)],
    [(4,), (4, 6)],
    [()],
], ids=str)
def test_slices_that_do_not_fill_the_whole(shapes):
    slices = [torch.empty(shape) for shape in shapes]
    assert checkpoints.slots(torch.empty(4, 6), slices) is None


@pytest.mark.parametrize("n, left, shapes", [
    (2, 1, "(512, 32) in 1 shard(s)"),
    (4, 3, "(512, 16) + (512, 16) + (512, 16) in 3 shard(s)"),
])
def test_a_missing_shard_is_noticed(fails, tmp_path, n, left, shapes):
    llama = write_shards(tmp_path / "llama", n)
    (llama / f"consolidated.{left:02}.pth").unlink()
    fails(generate, *ask(llama=llama), says=[
        f"{llama}: tok_embeddings.weight is {shapes}",
        "params.json and tokenizer ask for (512, 64)",
        "is a consolidated.NN.pth missing?"])


@pytest.mark.parametrize("name, slice_shape, shapes, expected", [
    ("layers.1.attention.wq.weight", (31, 64), "(32, 64) + (31, 64)", "(64, 64)"),
    ("layers.2.attention.wo.weight", (32, 64), "(64, 32) + (32, 64)", "(64, 64)"),
    ("layers.3.ffn_norm.weight", (63,), "(64,) + (63,)", "(64,)"),
    ("output.weight", (), "(256, 64) + ()", "(512, 64)"),
])
def test_a_slice_of_the_wrong_shape_is_named(
        fails, tmp_path, name, slice_shape, shapes, expected):
    llama = write_shards(tmp_path / "llama", 2)
    shard = torch.load(llama / "consolidated.01.pth", weights_only=True)
    shard[name] = torch.zeros(slice_shape)
    torch.save(shard, llama / "consolidated.01.pth")
    fails(generate, *ask(llama=llama), says=[
        f"{llama}: {name} is {shapes} in 2 shard(s)", f"ask for {expected}"])


def test_a_name_that_one_shard_lacks_or_has_too_many(fails, tmp_path):
    llama = write_shards(tmp_path / "llama", 2)
    shard = torch.load(llama / "consolidated.01.pth", weights_only=True)
    norm = shard.pop("layers.1.ffn_norm.weight")
    torch.save(shard, llama / "consolidated.01.pth")
    fails(generate, *ask(llama=llama), says=[
        f"{llama / 'consolidated.01.pth'}: layers.1.ffn_norm.weight is missing"])
    shard["layers.1.ffn_norm.weight"] = norm
    shard["layers.4.ffn_norm.weight"] = norm
    torch.save(shard, llama / "consolidated.01.pth")
    fails(generate, *ask(llama=llama), says=[
        f"{llama / 'consolidated.01.pth'}: layers.4.ffn_norm.weight has no place"])


def test_the_rope_frequencies_that_metas_files_carry_are_ignored(tmp_path, lavin):
    """LLaMA-1 has them in every layer, LLaMA-2 has them once. The golden file is like LLaMA-2's."""
    llama = copy_llama(tmp_path / "llama")
    tensors = torch.load(llama / "consolidated.00.pth", weights_only=True)
    for i in range(4):
        name = f"layers.{i}.attention.inner_attention.rope.freqs"
        tensors[name] = tensors["rope.freqs"]
    torch.save(tensors, llama / "consolidated.00.pth")
    loaded = checkpoints.load(llama, VIT)
    assert torch.equal(loaded.llama.output.weight, lavin.llama.output.weight)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_peak_memory_of_loading(dtype):
    """It is the model in its dtype, one tensor of each shard, and 6 MB for modules and kernels."""
    measured = peak_memory.measure(dtype)
    taken = measured["after"] - measured["before"]
    assert taken < measured["model"] + measured["one tensor of each shard"] + 6, measured


def test_shards_are_numbered_without_gaps(fails, tmp_path):
    llama = write_shards(tmp_path / "llama", 2)
    shard = llama / "consolidated.01.pth"
    for name in ("consolidated.backup.pth", "consolidated.02.old.pth", "consolidated.3.pth"):
        stray = shutil.copy(shard, llama / name)
        fails(generate, *ask(llama=llama), says=[f"{stray}: there is no consolidated.02.pth"])
        stray.unlink()
    shard.rename(llama / "consolidated.02.pth")
    fails(generate, *ask(llama=llama), says=["consolidated.02.pth: there is no consolidated.01"])
    (llama / "consolidated.00.pth").unlink()
    (llama / "consolidated.02.pth").unlink()
    with pytest.raises(LavinError, match="holds no consolidated.00.pth"):
        checkpoints.load(llama, VIT)


@pytest.mark.parametrize("n, copied", [(2, 0), (4, 0), (4, 2)])
def test_a_shard_that_is_a_copy_of_another(fails, tmp_path, n, copied):
    llama = write_shards(tmp_path / "llama", n)
    last = llama / f"consolidated.{n - 1:02}.pth"
    shutil.copy(llama / f"consolidated.{copied:02}.pth", last)
    fails(generate, *ask(llama=llama), says=[
        f"{last}: a copy of", f"consolidated.{copied:02}.pth"])


# (content of params.json, what the error says about it). SIZES are the required sizes.
SIZES = '"dim": 64, "n_layers": 4, "n_heads": 4, "multiple_of": 32'
PARAMS = [
    ("{", "not JSON"),
    ("[]", "not LLaMA's parameters"),
    ('{"n_layers": 4, "n_heads": 4}', "dim is missing"),
    ('{"dim": 64, "n_layers": null, "n_heads": 4}', "n_layers is missing"),
    ('{"dim": 64, "n_layers": 4, "n_heads": 0}', "n_heads is 0"),
    ('{"dim": 65, "n_layers": 4, "n_heads": 4}', "must divide"),
    ('{"dim": 64, "n_layers": 4, "n_heads": 128}', "must divide"),
    ('{"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 3}', "must divide"),
    ('{"dim": 64, "n_layers": 4, "n_heads": 4, "n_kv_heads": 8}', "must divide"),
    ('{"dim": 60, "n_layers": 4, "n_heads": 4}', "a head is 15 wide"),
    ('{"dim": "wide", "n_layers": 4, "n_heads": 4}', "dim is 'wide'"),
    ('{"dim": [64], "n_layers": 4, "n_heads": 4}', "dim is [64]"),
    ('{"dim": 64, "n_layers": "4", "n_heads": 4}', "n_layers is '4'"),
    ('{"dim": 64, "n_layers": 4.0, "n_heads": 4}', "n_layers is 4.0"),
    ('{"dim": 64, "n_layers": 1000000, "n_heads": 4}', "n_layers is 1000000"),
    ('{"dim": 1' + "0" * 400 + ', "n_layers": 4, "n_heads": 4}', "dim is 1000"),
    ('{"dim": 1' + "0" * 5000 + ', "n_layers": 4, "n_heads": 4}', "not JSON"),
    ("{" + SIZES + ', "use_scaled_rope": true, "rope_scaling_factor": "x"}', "rope_factor is 'x'"),
    ("{" + SIZES + ', "rope_low": 4, "rope_high": 4}', "from 4 to 4 turns"),
    ("{" + SIZES + ', "head_dim": 15}', "a head is 15 wide"),
    ("{" + SIZES + ', "tied_embeddings": 1}', "tied_embeddings is 1"),
    ("{" + SIZES + ', "norm_eps": true}', "norm_eps is True"),
    ("{" + SIZES + ', "norm_eps": NaN}', "norm_eps is nan"),
    ("{" + SIZES + ', "rope_theta": Infinity}', "rope_theta is inf"),
    ("{" + SIZES + ', "rope_theta": 0.5}', "rope_theta is 0.5"),
    ("{" + SIZES + ', "ffn_dim_multiplier": 1e-300}', "hidden_dim is 0"),
    ("{" + SIZES + ', "ffn_dim_multiplier": 1e300}', "ffn_dim_multiplier is 1e+300"),
    ('{"dim": 131072, "n_layers": 4, "n_heads": 4, "ffn_dim_multiplier": 100}', "hidden_dim is"),
    ("{" + SIZES + ', "hidden_dim": 0}', "hidden_dim is 0"),
    ("{" + SIZES + ', "multiple_of": 0}', "multiple_of is 0"),
    ("{" + SIZES + ', "attention_bias": 1}', "attention_bias is 1"),
    ("{" + SIZES + ', "vocab_size": 511}', "511 tokens, but its tokenizer has 512"),
    ("{" + SIZES + ', "vocab_size": -2}', "vocab_size is -2"),
    ("{" + SIZES + ', "vocab_size": 600}', "600 tokens, but its tokenizer has 512"),
    ('{"dim": 64, "n_layers": 5, "n_heads": 4, "multiple_of": 32}', "layers.4"),
    ('{"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 32}', "(512, 64) in 1 shard"),
]


def test_params_that_are_not_llamas(fails, tmp_path):
    llama = copy_llama(tmp_path / "llama")
    for params, said in PARAMS:
        (llama / "params.json").write_text(params)
        fails(generate, *ask(llama=llama), says=["llama", said])


@pytest.mark.parametrize("more", [
    '"vocab_size": -1', '"vocab_size": 512', '"vocab_size": null', '"n_kv_heads": null',
    '"use_scaled_rope": false, "rope_theta": 500000.0', '"anything": {"else": []}'])
def test_params_that_are(tmp_path, more):
    (tmp_path / "params.json").write_text("{" + SIZES + ", " + more + "}")
    assert checkpoints.read_params(tmp_path, 512).vocab_size == 512


@pytest.mark.parametrize("more, factor", [
    ('"use_scaled_rope": false', 1), ('"use_scaled_rope": true', 8),
    ('"use_scaled_rope": true, "rope_scaling_factor": 32', 32)])
def test_metas_scaled_rope(tmp_path, more, factor):
    """LLaMA 3.1's file does not state the factor. Meta's code uses 8."""
    (tmp_path / "params.json").write_text("{" + SIZES + ", " + more + "}")
    assert checkpoints.read_params(tmp_path, 512).rope_factor == factor


def test_a_folded_llama_of_an_older_checkpoint_is_known_by_its_biases(tmp_path):
    (tmp_path / "params.json").write_text("{" + SIZES + ', "attention_bias": true}')
    assert checkpoints.read_params(tmp_path, 512).folded


def test_a_model_that_is_larger_than_the_memory(monkeypatch, lavin):
    """It is refused before it is built. The error proposes 8 or 4 bits if these would fit."""
    cpu = torch.device("cpu")
    size = checkpoints.weights_size(lavin, torch.float32, 16, 1)
    assert size == sum(p.nbytes for p in lavin.parameters())
    size_8 = checkpoints.weights_size(lavin, torch.float32, 8, 1)
    size_4 = checkpoints.weights_size(lavin, torch.float32, 4, 1)
    halved = checkpoints.weights_size(lavin, torch.float32, 16, 2)

    def not_built(*args):
        raise AssertionError("it was built")

    monkeypatch.setattr(checkpoints, "allocate", not_built)
    for there, advice in [(size - 1, "with --bits 8"), (size_8, "with --bits 8"),
                          (size_8 - 1, "with --bits 4"), (size_4 - 1, "0.00215 GB$")]:
        monkeypatch.setattr(checkpoints, "memory", lambda device: there)
        with pytest.raises(LavinError, match=f"take 0.0029 GB, but cpu has .*{advice}"):
            checkpoints.load(LLAMA, VIT, ADAPTER)
    monkeypatch.setattr(checkpoints, "memory", lambda device: halved)
    checkpoints.check_fits(lavin, cpu, torch.float32, 16, n_parts=2)        # two ranks
    with pytest.raises(LavinError, match="GB$"):
        checkpoints.check_fits(lavin, cpu, torch.float32, 16, n_parts=1)


def test_a_model_for_no_machine(fails, tmp_path):
    """The largest sizes that params.json may state are refused at once."""
    llama = copy_llama(tmp_path / "llama")
    (llama / "params.json").write_text(
        '{"dim": 131072, "n_layers": 1000, "n_heads": 64, "hidden_dim": 1048576}')
    fails(generate, *ask(llama=llama), says=["the weights of this model take", "GB, but cpu has"])


# CLIP


def test_clip_as_a_plain_state_dict(tmp_path, lavin):
    plain = tmp_path / "vit.pt"
    torch.save(checkpoints.read_clip_state(VIT), plain)
    config = ViTConfig(width=64, layers=8, patch=8, resolution=32)
    assert checkpoints.read_clip(plain)[1] == checkpoints.read_clip(VIT)[1] == config
    loaded = checkpoints.load(LLAMA, plain, ADAPTER).state_dict()
    for name, tensor in lavin.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("patch, resolution, width, layers, n_features", [
    (32, 224, 768, 12, 3), (16, 224, 768, 12, 3), (14, 224, 1024, 24, 6), (14, 336, 1024, 24, 6)],
    ids=["ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336"])
def test_openais_vits(tmp_path, patch, resolution, width, layers, n_features):
    """Their sizes are read off the tensors, and the adapter of each block has an official name."""
    state = {
        "visual.conv1.weight": torch.zeros(width, 3, patch, patch),
        "visual.positional_embedding": torch.zeros((resolution // patch) ** 2 + 1, width)}
    for i in range(layers):
        state[f"visual.transformer.resblocks.{i}.ln_1.bias"] = torch.zeros(width)
    torch.save(state, tmp_path / "vit.pt")
    _, config = checkpoints.read_clip(tmp_path / "vit.pt")
    assert config == ViTConfig(width, layers, patch, resolution)
    assert config.n_features == n_features
    with torch.device("meta"):
        small = LLaMAConfig(dim=64, n_layers=1, n_heads=1)
        lavin = LaVIN(small, config, AdapterConfig(), None, 512)
        names = checkpoints.to_official(lavin)
    for i in range(layers):
        name = f"backbone.visual.transformer.resblocks.{i}.adapter_attn.conv_A.weight"
        assert names[name].shape == (8, width, 1)
    assert f"backbone.visual.transformer.resblocks.{layers}.adapter_attn.conv_A.weight" not in names


def test_a_file_that_is_not_a_vit(fails, tmp_path):
    state = checkpoints.read_clip_state(VIT)
    del state["visual.transformer.resblocks.7.ln_1.bias"]
    vit = tmp_path / "v.pt"
    torch.save({"visual.conv1.weight": torch.zeros(3)}, vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "not a CLIP ViT"])
    torch.save([], vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "does not hold named tensors"])
    torch.save(state, vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "resblocks.7.ln_1.bias is missing"])


@pytest.mark.parametrize("name, shape, said", [
    ("conv1.weight", (63, 3, 8, 8), "width is 63"),
    ("conv1.weight", (96, 3, 8, 8), "17 positions of width 96"),
    ("conv1.weight", (64, 3, 0, 0), "patch is 0"),
    ("conv1.weight", (64, 3), "not a CLIP ViT"),
    ("positional_embedding", (16, 64), "16 positions"),
    ("positional_embedding", (1, 64), "resolution is 0"),
    ("positional_embedding", (0, 64), "resolution is 0"),
    ("positional_embedding", (64,), "not a CLIP ViT"),
    ("positional_embedding", (), "not a CLIP ViT"),
    ("positional_embedding", (2 ** 20 + 1, 0), "resolution is 8192"),
    ("class_embedding", (), "class_embedding is (), but this model's is (64,)"),
])
def test_sizes_that_no_clip_has(fails, tmp_path, name, shape, said):
    vit = tmp_path / "v.pt"
    state = checkpoints.read_clip_state(VIT)
    torch.save(state | {f"visual.{name}": torch.zeros(shape)}, vit)
    fails(generate, *ask(vit=vit), says=["v.pt", said])


def test_a_clip_of_too_few_blocks(fails, tmp_path):
    state = {name: tensor for name, tensor in checkpoints.read_clip_state(VIT).items()
             if not re.search(r"resblocks\.[3-7]", name)}
    torch.save(state, tmp_path / "v.pt")
    fails(generate, *ask(vit=tmp_path / "v.pt"), says=["v.pt: layers is 3"])


def test_a_path_that_is_no_file_of_clip(fails, tmp_path):
    fails(generate, *ask(vit=tmp_path), says=[f"{tmp_path}: a folder without config.json"])
    os.mkfifo(tmp_path / "fifo")
    fails(generate, *ask(vit=tmp_path / "fifo"), says=["fifo: a pipe or a device"])
    fails(generate, *ask(vit="/dev/zero"), says=["/dev/zero: a pipe or a device"])


# The tokenizer


def test_a_file_that_is_not_a_tokenizer(fails, tmp_path):
    llama = copy_llama(tmp_path / "llama")
    path = llama / "tokenizer.model"
    path.unlink()
    with pytest.raises(LavinError, match="tokenizer.model: no such file"):
        checkpoints.load(llama, VIT)
    path.mkdir()
    fails(generate, *ask(llama=llama), says=[f"{path}: a folder"])
    path.rmdir()
    os.mkfifo(path)
    fails(generate, *ask(llama=llama), says=[f"{path}: a pipe or a device"])
    path.unlink()
    for content in (b"", b"not a tokenizer", tokenizer_path(LLAMA).read_bytes()[:1000]):
        path.write_bytes(content)
        fails(generate, *ask(llama=llama), says=[f"{path}: not a sentencepiece tokenizer"])


def test_a_folder_whose_name_is_no_unicode(tmp_path):
    llama = copy_llama(tmp_path / os.fsdecode(b"llama\xff"))
    assert data.load_sentencepiece(llama).vocab_size() == 512
    with pytest.raises(LavinError, match="consolidated.00.pth: .*rename it"):
        checkpoints.load(llama, VIT)


# LaVIN's adapters


@pytest.mark.parametrize("prefix", ["", "module."])
def test_adapters_round_trip_bit_exactly(tmp_path, lavin, prefix):
    released = torch.load(ADAPTER, weights_only=False)
    ours = checkpoints.official_checkpoint(lavin, "QCM-ALE")
    assert ours["model"].keys() == released["model"].keys()
    for name, tensor in ours["model"].items():
        assert torch.equal(tensor, released["model"][name]), name
    our_args = vars(ours["args"])
    for name, value in vars(released["args"]).items():
        if name == "n_prompt":              # 6 for ViT-L; the golden ViT has 2 features
            assert "n_prompt" in our_args
        elif name == "llm_model":           # the one name that we do not write
            assert "llm_model" not in our_args
        else:
            assert our_args[name] == value, name

    ours["model"] = {prefix + name: tensor for name, tensor in ours["model"].items()}
    torch.save(ours, tmp_path / "ours.pth")
    again = checkpoints.load(LLAMA, VIT, tmp_path / "ours.pth")
    assert again.adapter_config == lavin.adapter_config
    assert again.max_seq_len == 128
    for name, tensor in checkpoints.to_official(again).items():
        assert torch.equal(tensor, released["model"][name]), name


def test_rank_and_tau_come_from_the_file(tmp_path):
    torch.manual_seed(0)
    usual = checkpoints.load(LLAMA, VIT)
    vit_config = checkpoints.read_clip(VIT)[1]
    config = AdapterConfig(rank=4, projector_dim=32, tau=5.0)
    with torch.device("meta"):
        lavin = LaVIN(usual.llama.config, vit_config, config, None, 77)
    lavin = lavin.to_empty(device="cpu")
    lavin.init_trained()
    torch.save(checkpoints.official_checkpoint(lavin, "QCM-A"), tmp_path / "rank4.pth")
    loaded = checkpoints.load(LLAMA, VIT, tmp_path / "rank4.pth")
    assert loaded.adapter_config.rank == 4
    assert loaded.adapter_config.projector_dim == 32
    assert loaded.adapter_config.tau == 5.0
    assert loaded.max_seq_len == 77
    assert loaded.llama.layers[0].adapter.router.tau == 5.0
    assert loaded.vit.resblocks[0].adapter.router.tau == 5.0
    torch.save({"model": checkpoints.to_official(lavin)}, tmp_path / "bare.pth")
    assert checkpoints.load(LLAMA, VIT, tmp_path / "bare.pth").adapter_config.tau == 10.0


def test_a_file_that_train_wrote_is_one_the_authors_code_reads(tmp_path, lavin):
    """It has official names and shapes, and torch.load with weights_only accepts it."""
    settings = train.Settings(out=str(tmp_path), lr=1e-3)
    optimizer = train.make_optimizer(lavin, settings)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.save(lavin, optimizer, scaler, 7, 3, settings)
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        released = torch.load(ADAPTER, weights_only=True)
    assert released.keys() <= checkpoint.keys()
    assert checkpoint["model"].keys() == released["model"].keys()
    for name, tensor in checkpoint["model"].items():
        assert tensor.shape == released["model"][name].shape, name
    assert checkpoint["epoch"] == 2
    assert checkpoint["args"].temperature == 10.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


def test_a_gradient_that_never_flowed_is_zero(lavin, samples):
    lavin(lavin.batch([samples[1]])).backward()             # without a picture
    gradients = checkpoints.to_official(lavin, grad=True)
    assert difference(gradients["adapter_proj.conv_A.weight"], 0) == 0
    assert difference(gradients["layers.0.adapter_attn.conv_A.weight"], 0) > 0


def test_adapters_that_do_not_fit(fails, tmp_path):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    model = checkpoint["model"]
    name = "layers.2.adapter_attn.conv_A.weight"
    too_many = "layers.4.adapter_attn.conv_A.weight"
    without = dict(model)
    del without[name]
    adapter = tmp_path / "a.pth"
    for wrong, says in [
        (model | {name: torch.zeros(8, 4096, 1)}, [name, "(8, 4096, 1)", "(8, 64, 1)"]),
        (model | {too_many: model[name]}, [f"{too_many} has no place"]),
        (model | {name: "text"}, [f"{name} is str, not a tensor"]),
        ([model], ["does not hold named tensors"]),
        (without, [f"{name} is missing"]),
    ]:
        torch.save(checkpoint | {"model": wrong}, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth", *says])


def test_what_is_no_adapter_checkpoint(fails, tmp_path):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    adapter = tmp_path / "a.pth"
    for wrong in ({"temperature": 10.0}, [3], "text", torch.zeros(2), {}, 0):
        torch.save(checkpoint | {"args": wrong}, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth: not a LaVIN checkpoint: its args"])
    for wrong in ([("lr", 1.0)], "text", torch.zeros(2), None, argparse.Namespace()):
        torch.save(checkpoint | {"config": wrong}, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth: not a LaVIN checkpoint: its args"])
    for content in ({}, [1], {"model": {}}, {"model": 3}, {"model": None}, torch.zeros(3)):
        torch.save(content, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth", "not a"])
    fails(generate, *ask(adapter=VIT), says=["ViT-tiny.pt: a TorchScript archive"])
    fails(generate, *ask(adapter=tmp_path), says=[f"{tmp_path}: a folder"])


WRONG_SETTINGS = [
    ("args", "temperature", 0.0),
    ("args", "temperature", "hot"),
    ("args", "temperature", None),
    ("args", "temperature", torch.tensor(10.0)),
    ("args", "adapter_scale", math.inf),
    ("args", "dropout", math.nan),
    ("args", "dropout", 1.0),
    ("args", "max_seq_len", 10 ** 400),
    ("args", "prompt_format", "QCM"),
    ("config", "lr", [1]),
    ("config", "llama", 3),
    ("config", "vit", "v\0.pt"),
    ("config", "data", "s\0"),
    ("config", "bits", 5),
    ("config", "seed", torch.zeros(3)),
    (None, "step", -1),
    (None, "step", 10 ** 600),
    (None, "epoch", 0.5),
]


def test_settings_that_no_run_has(fails, tmp_path):
    adapter = tmp_path / "a.pth"
    for where, name, wrong in WRONG_SETTINGS:
        checkpoint = torch.load(ADAPTER, weights_only=False)
        if where == "args":
            setattr(checkpoint["args"], name, wrong)
        elif where == "config":
            checkpoint["config"] = {name: wrong}
        else:
            checkpoint[name] = wrong
        torch.save(checkpoint, adapter)
        fails(generate, *ask(adapter=adapter), says=[f"a.pth: {name} "])
        fails(checkpoints, adapter, says=[f"a.pth: {name} "])


@pytest.mark.parametrize("name, shape, said", [
    ("layers.0.adapter_attn.conv_A.weight", (7, 64, 1), "rank 7 is odd"),
    ("layers.0.adapter_attn.conv_A.weight", (0, 64, 1), "rank is 0"),
    ("layers.0.adapter_attn.conv_A.weight", (2 ** 20, 0), "rank is 1048576"),
    ("layers.0.adapter_attn.conv_A.weight", (), "not a LaVIN checkpoint"),
    ("adapter_proj.conv_A.weight", (0, 64), "projector_dim is 0"),
    ("adapter_proj.conv_A.weight", (), "not a LaVIN checkpoint"),
])
def test_sizes_that_no_adapter_has(fails, tmp_path, name, shape, said):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    checkpoint["model"][name] = torch.zeros(shape)
    adapter = tmp_path / "a.pth"
    torch.save(checkpoint, adapter)
    fails(checkpoints, adapter, says=["a.pth", said])


# Faulty tensors in any file


@pytest.mark.filterwarnings("ignore")           # quantized and nested tensors are deprecated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_in_any_file(tmp_path, fault):
    change, said = FAULTS[fault]
    llama = copy_llama(tmp_path / "llama")
    shard = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    for name in ("layers.2.attention.wk.weight", "norm.weight"):
        torch.save(shard | {name: change(shard[name])}, llama / "consolidated.00.pth")
        with pytest.raises(LavinError, match=f"{name} .*({said})"):
            checkpoints.load(llama, VIT)

    vit = tmp_path / "v.pt"
    state = checkpoints.read_clip_state(VIT)
    for name in ("transformer.resblocks.3.attn.in_proj_weight", "ln_pre.bias"):
        name = f"visual.{name}"
        torch.save(state | {name: change(state[name])}, vit)
        with pytest.raises(LavinError, match=f"v.pt: .*({said})"):
            checkpoints.load(LLAMA, vit)

    adapter = tmp_path / "a.pth"
    checkpoint = torch.load(ADAPTER, weights_only=False)
    model = checkpoint["model"]
    for name in ("layers.2.adapter_attn.conv_B.weight", "adapter_proj.conv_B.bias"):
        torch.save(checkpoint | {"model": model | {name: change(model[name])}}, adapter)
        with pytest.raises(LavinError, match=f"a.pth: {name} .*({said})"):
            checkpoints.load(LLAMA, VIT, adapter)


def test_numbers_that_are_too_large_for_the_dtype(fails, tmp_path):
    llama = copy_llama(tmp_path / "llama")
    shard = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    name = "layers.2.attention.wk.weight"
    torch.save(shard | {name: with_one(1e5)(shard[name])}, llama / "consolidated.00.pth")
    fails(generate, *ask("--dtype", "fp16", llama=llama), says=[
        f"{name} holds values that are not finite in torch.float16"])
    checkpoints.load(llama, VIT, dtype=torch.bfloat16)
    fails(checkpoints, ADAPTER, "--llama", llama, "--vit", VIT, "--fold", tmp_path / "folded",
          says=["--fold:", "too large for fp16"])
    assert not list((tmp_path / "folded").iterdir())


# python checkpoints.py FILE


def test_what_is_in_a_released_checkpoint(call, lavin):
    code, stdout, stderr = call(checkpoints, ADAPTER)
    assert (code, stderr) == (0, "")
    assert f"{ADAPTER}: 32,184 trained parameters" in stdout
    assert "LLaMA of 4 blocks, 64 wide" in stdout
    assert "ViT of 8 blocks, 64 wide" in stdout
    assert "rank 8 · projector's hidden size 128 · τ 10 · scale 1 · dropout 0.1" in stdout
    assert "format QCM-ALE" in stdout
    assert "max_seq_len 128" in stdout
    assert "routing  depends on LLaMA too" in stdout

    code, stdout, _ = call(checkpoints, ADAPTER, "--llama", LLAMA, "--vit", VIT)
    assert code == 0
    lines = [line for line in stdout.splitlines() if line.startswith("layer ")]
    for line, (text, picture) in zip(lines, lavin.route().tolist(), strict=True):
        shown = line.split()
        assert shown[3:5] == [f"{weight:.3f}" for weight in text]
        assert shown[6:8] == [f"{weight:.3f}" for weight in picture]


def test_what_is_in_a_checkpoint_of_a_run(call, trained):
    """The checkpoint stores LLaMA's path, so no flag is needed to show the routing."""
    code, stdout, _ = call(checkpoints, trained(1) / "checkpoint.pth")
    assert code == 0
    assert "step 1 · epoch 0 · data sqa · format QCM-ALE · epochs 4 · batch_size 8" in stdout
    assert "layer   4   text 0." in stdout


def test_a_checkpoint_whose_delta_is_gone_is_still_described(call, fails, trained, tmp_path):
    checkpoint = read_checkpoint(trained(1) / "checkpoint.pth")
    checkpoint["config"]["delta"] = str(tmp_path / "gone")
    path = tmp_path / "vicuna.pth"
    torch.save(checkpoint, path)
    code, stdout, _ = call(checkpoints, path)
    assert code == 0 and "add --llama DIR --vit FILE --delta DIR" in stdout
    fails(checkpoints, path, "--fold", tmp_path / "folded", says=["--delta DIR"])
    fails(checkpoints, path, "--delta", tmp_path / "gone", says=["gone: no such file"])


def test_only_three_widths_of_numbers():
    with pytest.raises(ValueError, match="bits=6"):
        checkpoints.load(LLAMA, VIT, bits=6)
    with pytest.raises(ValueError, match="fsdp=True"):
        checkpoints.load(LLAMA, VIT, bits=8, fsdp=True)


def test_folding_needs_a_llama(fails, tmp_path):
    fails(checkpoints, ADAPTER, "--fold", tmp_path / "folded", says=[
        "--fold needs the LLaMA", "--llama DIR --vit FILE"])
    assert not (tmp_path / "folded").exists()


def test_paths_that_are_not_there(fails, tmp_path):
    nowhere = tmp_path / "nowhere"
    fails(checkpoints, ADAPTER, "--llama", nowhere, "--vit", VIT, says=[f"{nowhere}: no such"])
    fails(checkpoints, ADAPTER, "--llama", LLAMA, "--vit", nowhere, says=[f"{nowhere}: no such"])
    fails(checkpoints, nowhere, says=[f"{nowhere}: no such file"])
    fails(checkpoints, tmp_path, says=[f"{tmp_path}: a folder, where a file is needed"])


def test_a_place_that_a_model_cannot_be_folded_to(fails, tmp_path, monkeypatch):
    """The error comes before LLaMA is read."""
    def not_read(*args, **more):
        raise AssertionError("LLaMA was read")

    monkeypatch.setattr(checkpoints, "load", not_read)
    file = tmp_path / "file"
    file.write_text("untouched")
    os.mkfifo(tmp_path / "fifo")
    model = ("--llama", LLAMA, "--vit", VIT)
    for place in (file, file / "below", tmp_path / "fifo", "/proc/folded", "/dev/null"):
        fails(checkpoints, ADAPTER, *model, "--fold", place, says=["--fold", place, "cannot be"])
    assert file.read_text() == "untouched"


def test_odd_but_valid_values_are_shown(call, tmp_path):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    name = "layers.1.adapter_attn.conv_A.weight"
    checkpoint["model"][name] = checkpoint["model"][name].flatten()
    checkpoint["model"]["\x1b[2J"] = torch.zeros(1)
    checkpoint["args"].temperature = 7          # an integer
    checkpoint["args"].max_seq_len = None
    checkpoint["args"].unknown = torch.zeros(2)
    checkpoint |= {"step": 10 ** 12, "epoch": 0, "config": {
        "data": "sqa", "weights": None, "lr": 1, "llama": "\x1b[31m", "vit": "x" * 4096,
        "delta": None, "unknown": [10 ** 400], 7: "seven",
        "step": [1]}}                           # the true step stands outside of the config
    torch.save(checkpoint, tmp_path / "a.pth")
    code, stdout, stderr = call(checkpoints, tmp_path / "a.pth")
    assert (code, stderr) == (0, "")
    assert "LLaMA of 4 blocks, 64 wide" in stdout and "τ 7" in stdout
    assert "step 1000000000000 · epoch 0 · data sqa" in stdout
    assert "\x1b" not in stdout
