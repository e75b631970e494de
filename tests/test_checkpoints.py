"""The official files: what is written is what was read, and files that do not fit are refused.

LLaMA's shards, CLIP's archives, LaVIN's adapters, and `python checkpoints.py FILE`.
"""

import argparse
import pickle
import shutil

import pytest
import torch

import checkpoints
import generate
import train
from adapters import AdapterConfig
from bench import peak_memory
from conftest import ADAPTER, LLAMA, VIT, difference
from files import tokenizer_path
from model import LaVIN
from test_errors import ask
from test_train import flags
from vit import ViTConfig


def copy_llama(directory):
    """LLAMA with its tokenizer, to be damaged -> directory."""
    directory.mkdir()
    for path in (LLAMA / "params.json", LLAMA / "consolidated.00.pth", tokenizer_path(LLAMA)):
        shutil.copy(path, directory)
        (directory / path.name).chmod(0o644)
    return directory


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
    """When it is unpickled, it makes the file `target`."""

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
        fails(generate, *ask(adapter=path), says=[path.name, "not"])
        fails(generate, *ask(vit=path), says=[path.name, "not"])
        shutil.copy(path, llama / "consolidated.00.pth")
        fails(generate, *ask(llama=llama), says=["consolidated.00.pth", "not"])
    assert not executed.exists()
    torch.load(zipped, weights_only=False)
    assert executed.exists()                # the trap works


class HostileModule(torch.nn.Module):
    """When torch.jit.load reads it, it makes the file `target`: TorchScript can write tensors."""

    def __init__(self, target):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.target = target

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.target, self.training = state
        torch.save(self.weight, self.target)


def test_torchscript_that_would_run_code_is_not_loaded(fails, tmp_path):
    executed = tmp_path / "executed"
    archive = tmp_path / "ViT.pt"
    torch.jit.script(HostileModule(str(executed))).save(archive)
    fails(generate, *ask(vit=archive), says=["ViT.pt: would run code"])
    assert not executed.exists()
    torch.jit.load(archive)
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
    """LLaMA-1 has them in every layer, LLaMA-2 once; the golden file is of the second kind."""
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
    """The model in its target dtype, one tensor of each shard, and 4 MB for the modules."""
    measured = peak_memory.measure(dtype)
    taken = measured["after"] - measured["before"]
    assert taken < measured["model"] + measured["one tensor of each shard"] + 4, measured


# What params.json holds, and what the message says of it.
PARAMS = [
    ("{", "not JSON"),
    ("[]", "not LLaMA's parameters"),
    ('{"dim": 64, "n_heads": 0}', "not LLaMA's parameters"),
    ('{"dim": 65, "n_layers": 4, "n_heads": 4}', "do not divide"),
    ('{"dim": "wide"}', "not LLaMA's parameters"),
    ('{"dim": 64, "n_layers": 4, "n_heads": 4, "use_scaled_rope": true}', "scaled RoPE"),
    ('{"dim": 64, "n_layers": "4", "n_heads": 4}', "n_layers is '4'"),
    ('{"n_heads": -4}', "n_heads is -4"),
    ('{"dim": 64, "n_layers": 4.0}', "n_layers is 4.0"),
    ('{"norm_eps": true}', "norm_eps is True"),
    ('{"dim": 64, "n_layers": 5, "n_heads": 4, "multiple_of": 32}', "layers.4"),
    ('{"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 32}', "(512, 64) in 1 shard"),
]


def test_params_that_are_not_llamas(fails, tmp_path):
    llama = copy_llama(tmp_path / "llama")
    for params, said in PARAMS:
        (llama / "params.json").write_text(params)
        fails(generate, *ask(llama=llama), says=["llama", said])


# CLIP


def test_clip_as_a_plain_state_dict(tmp_path, lavin):
    plain = tmp_path / "vit.pt"
    torch.save(torch.jit.load(VIT).state_dict(), plain)
    config = ViTConfig(width=64, layers=8, patch=8, resolution=32)
    assert checkpoints.read_clip(plain)[1] == checkpoints.read_clip(VIT)[1] == config
    loaded = checkpoints.load(LLAMA, plain, ADAPTER).state_dict()
    for name, tensor in lavin.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_a_vit_that_is_none(fails, tmp_path):
    state = torch.jit.load(VIT).state_dict()
    del state["visual.transformer.resblocks.7.ln_1.bias"]
    vit = tmp_path / "v.pt"
    torch.save({"visual.conv1.weight": torch.zeros(3)}, vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "not a CLIP ViT"])
    torch.save([], vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "does not hold named tensors"])
    torch.save(state, vit)
    fails(generate, *ask(vit=vit), says=["v.pt", "resblocks.7.ln_1.bias is missing"])


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
        if name == "n_prompt":              # 6 in ViT-L; the golden ViT has 2 features
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
    usual = checkpoints.load(LLAMA, VIT, tau=5.0)
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
    """Official names and shapes, and nothing that torch.load refuses with weights_only."""
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
    lavin(lavin.batch([samples[1]])).backward()             # it has no picture
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
        (model | {name: "text"}, ["does not hold named tensors"]),
        (without, [f"{name} is missing"]),
    ]:
        torch.save(checkpoint | {"model": wrong}, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth", *says])


def test_what_is_no_adapter_checkpoint(fails, tmp_path):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    adapter = tmp_path / "a.pth"
    for args in ({"temperature": 10.0}, argparse.Namespace(temperature="hot"), [3]):
        torch.save(checkpoint | {"args": args}, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth: not a LaVIN checkpoint"])
    for content in ({}, [1], {"model": {}}, {"model": 3}, torch.zeros(3)):
        torch.save(content, adapter)
        fails(generate, *ask(adapter=adapter), says=["a.pth", "not a"])


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


def test_what_is_in_a_checkpoint_of_a_run(call, sqa, tmp_path):
    """It remembers LLaMA's path, so the routing is shown without a flag."""
    assert call(train, *flags(sqa, tmp_path / "run", "--max-steps", 1))[0] == 0
    code, stdout, _ = call(checkpoints, tmp_path / "run" / "checkpoint.pth")
    assert code == 0
    assert "step 1 · epoch 0 · data sqa · format QCM-ALE · epochs 4 · batch_size 8" in stdout
    assert "layer   4   text 0." in stdout


def test_folding_needs_a_llama(fails, tmp_path):
    fails(checkpoints, ADAPTER, "--fold", tmp_path / "folded", says=[
        "--fold needs the LLaMA", "--llama DIR --vit FILE"])
    assert not (tmp_path / "folded").exists()
