"""Hugging Face's folders: with our loader, our model computes the same as transformers.

These comparisons need transformers and safetensors (pip install transformers safetensors). Nothing
else does: the tests of what is refused run without them.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch

import checkpoints
import generate
import train
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, VIT, difference, flags
from extras import hf
from extras.flags import generate_parser
from fast.fold import fold
from files import LavinError, tokenizer_path
from helpers import FAULTS, ask, change_config
from hf_layout import clip_folder, qwen_tensors, to_hf, write_golden_folder
from model import rope_frequencies
from vit import VisionTransformer


@pytest.fixture(scope="session")
def transformers():
    return pytest.importorskip("transformers", reason="the comparison with Hugging Face needs "
                               "pip install transformers safetensors")


def save_random_model(transformers, folder, kind="Llama", **changes):
    """Save a tiny random LLaMA or Qwen2 with grouped queries, as in TinyLlama -> the model."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False}
    config = getattr(transformers, f"{kind}Config")(**sizes | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):                       # they are initialized to zero
            torch.nn.init.normal_(p)
    model.save_pretrained(folder)
    shutil.copy(tokenizer_path(LLAMA), folder)
    return model


@pytest.fixture
def llama_folder(tmp_path, transformers):
    """A tiny random LLaMA -> (its folder, the model)."""
    folder = tmp_path / "llama"
    return folder, save_random_model(transformers, folder)


@pytest.fixture
def golden_folder(tmp_path):
    """LLAMA in Hugging Face's layout, with its tokenizer -> (its folder, its tensors)."""
    folder = tmp_path / "golden"
    tensors = write_golden_folder(folder)
    shutil.copy(tokenizer_path(LLAMA), folder)
    return folder, tensors


# LLaMA


def test_both_layouts_are_the_same_model(golden_folder):
    folder, _ = golden_folder
    ours = checkpoints.load(folder, VIT).llama.state_dict()
    expected = checkpoints.load(LLAMA, VIT).llama.state_dict()
    for name, tensor in expected.items():
        if "adapter" not in name:
            assert torch.equal(ours[name], tensor), name


def test_a_delta_needs_no_config(golden_folder):
    """Only tensors are read from a delta. Here the delta equals the base, so the sum is doubled."""
    folder, _ = golden_folder
    (folder / "config.json").unlink()
    doubled = checkpoints.load(LLAMA, VIT, delta=folder).llama
    expected = checkpoints.frozen_parameters(checkpoints.load(LLAMA, VIT).llama)
    for name, p in checkpoints.frozen_parameters(doubled).items():
        assert torch.equal(p, 2 * expected[name]), name


@pytest.mark.parametrize("stored", ["safetensors", "bin", "shards"])
@torch.no_grad()
def test_llama_gives_the_same_logits(llama_folder, stored):
    folder, hf_llama = llama_folder
    if stored == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(hf_llama.state_dict(), folder / "pytorch_model.bin")
    elif stored == "shards":
        (folder / "model.safetensors").unlink()
        hf_llama.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert_same_logits(checkpoints.load(folder, VIT).llama, hf_llama)


@torch.no_grad()
def assert_same_logits(llama, hf_llama):
    tokens = torch.randint(3, 500, (2, 17))
    w = torch.full((3, 2, 1, 2), 0.5)                   # fresh adapters are the identity
    logits = llama.output(llama(llama.tok_embeddings(tokens), w))
    assert difference(logits, hf_llama(tokens).logits) < 1e-5


SCALED = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("kind, changes", [
    ("Llama", {"tie_word_embeddings": True}),           # SmolLM2
    ("Llama", {"head_dim": 32}),
    ("Llama", {"rope_parameters": SCALED, "tie_word_embeddings": True}),        # Llama-3.2-1B
    ("Qwen2", {"tie_word_embeddings": True}),
    ("Qwen2", {"num_key_value_heads": 4}),
], ids=["tied", "wide heads", "scaled RoPE", "Qwen2, tied", "Qwen2"])
def test_other_architectures_give_the_same_logits(transformers, tmp_path, kind, changes):
    model = save_random_model(transformers, tmp_path, kind, **changes)
    assert_same_logits(checkpoints.load(tmp_path, VIT).llama, model)


def test_rope_is_scaled_as_in_older_and_in_newer_files(transformers, tmp_path):
    """The frequencies equal transformers'. Some are kept, some divided, some are in between."""
    model = save_random_model(transformers, tmp_path, rope_parameters=SCALED)
    theirs = model.model.rotary_emb.inv_freq
    config = checkpoints.read_params(tmp_path, 512)
    ours = rope_frequencies(config)
    assert difference(ours, theirs) < 1e-8
    plain = rope_frequencies(dataclasses.replace(config, rope_factor=1.0))
    ratios = (plain / ours).tolist()
    assert ratios[0] == 1 and ratios[-1] == pytest.approx(8) and 1.1 < ratios[1] < 7.9
    older = {name: value for name, value in SCALED.items() if name != "rope_theta"}
    change_config(tmp_path, rope_parameters=None, rope_theta=500000.0, rope_scaling=older)
    assert checkpoints.read_params(tmp_path, 512) == config


def save_in_metas_layout(llama, folder, tokenizer):
    """Write the frozen weights of llama_folder's LLaMA as one shard."""
    folder.mkdir()
    state = {name: p.clone() for name, p in checkpoints.frozen_parameters(llama).items()}
    torch.save(state, folder / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16,
              "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder)


@torch.no_grad()
def test_a_delta_is_added_in_the_right_order_of_rows(llama_folder, tmp_path, transformers):
    """The base is in Meta's layout and the delta in Hugging Face's, as for Vicuna's deltas."""
    folder, base = llama_folder
    meta_folder = tmp_path / "meta"
    llama = checkpoints.load(folder, VIT).llama
    save_in_metas_layout(llama, meta_folder, folder / "tokenizer.model")
    wanted = transformers.LlamaForCausalLM(base.config)
    delta = transformers.LlamaForCausalLM(base.config)
    base_state = base.state_dict()
    delta_state = {}
    for name, tensor in wanted.state_dict().items():
        delta_state[name] = tensor - base_state[name]
    delta.load_state_dict(delta_state)
    delta.save_pretrained(tmp_path / "delta")
    wanted.save_pretrained(folder)
    summed = checkpoints.load(meta_folder, VIT, delta=tmp_path / "delta").llama
    expected = checkpoints.frozen_parameters(checkpoints.load(folder, VIT).llama)
    for name, p in checkpoints.frozen_parameters(summed).items():
        assert difference(p, expected[name]) < 1e-6, name


def test_an_unpermuted_delta_is_added_as_it_stands(golden_folder):
    folder, raw = golden_folder
    base = checkpoints.frozen_parameters(checkpoints.load(LLAMA, VIT).llama)
    permuted = checkpoints.frozen_parameters(checkpoints.load(LLAMA, VIT, delta=folder).llama)
    lavin = checkpoints.load(LLAMA, VIT, delta=folder, delta_unpermuted=True)
    for name, p in checkpoints.frozen_parameters(lavin.llama).items():
        hf_name, _ = to_hf(name, base[name])
        assert torch.equal(p, base[name] + raw[hf_name]), name
        is_equal = torch.equal(p, permuted[name])
        assert is_equal == (not name.endswith(("wq.weight", "wk.weight"))), name


def test_a_checkpoint_remembers_that_its_delta_was_unpermuted(call, golden_folder, sqa, tmp_path):
    """So generate.py and --fold build the same base on which the adapters were trained."""
    folder, _ = golden_folder
    out = tmp_path / "out"
    run = flags(sqa, out, "--delta", folder, "--delta-unpermuted", "--max-steps", 1)
    assert call(train, *run)[0] == 0                # the first step of a warm-up changes no weight
    checkpoint = out / "checkpoint.pth"
    expected = checkpoints.load(LLAMA, VIT, delta=folder, delta_unpermuted=True)
    name = "layers.0.attention.wq.weight"
    wq = expected.llama.get_parameter(name)

    assert call(checkpoints, checkpoint, "--fold", tmp_path / "folded")[0] == 0
    folded = torch.load(tmp_path / "folded/consolidated.00.pth", weights_only=True)
    assert torch.equal(folded[name], wq.half())
    args = generate_parser("").parse_args(["--adapter", str(checkpoint), "--dtype", "fp32"])
    asked = generate.load_model(
        args, *generate.find_model(args), torch.device("cpu"), "fp32")
    assert torch.equal(asked.llama.get_parameter(name), wq)


def test_an_unpermuted_delta_needs_a_delta(fails, sqa, tmp_path):
    says = ["--delta-unpermuted goes with --delta DIR"]
    fails(generate, *ask("--delta-unpermuted"), says=says)
    fails(train, *flags(sqa, tmp_path / "out", "--delta-unpermuted"), says=says)


# CLIP


@pytest.mark.parametrize("patch, resolution, layers, activation", [
    (14, 56, 8, "quick_gelu"), (16, 48, 4, "gelu"), (32, 64, 4, "quick_gelu")])
@pytest.mark.parametrize("is_whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@torch.no_grad()
def test_clip_gives_the_same_hidden_states(
        transformers, tmp_path, patch, resolution, layers, activation, is_whole):
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": layers,
              "num_attention_heads": 2, "patch_size": patch, "image_size": resolution,
              "hidden_act": activation}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 1, "vocab_size": 99}
    if is_whole:
        config = transformers.CLIPConfig(text_config=text, vision_config=vision)
        hf_clip = transformers.CLIPModel(config).eval()
    else:
        config = transformers.CLIPVisionConfig(**vision)
        hf_clip = transformers.CLIPVisionModel(config).eval()
    hf_clip.save_pretrained(tmp_path)
    state, config = checkpoints.read_clip(tmp_path)
    assert config.width == 128 and config.layers == layers
    assert config.patch == patch and config.resolution == resolution
    assert config.quick_gelu == (activation == "quick_gelu")
    vit = VisionTransformer(config, AdapterConfig())
    for name, p in vit.named_parameters():
        p.requires_grad_("adapter" in name)
    parameters = checkpoints.frozen_parameters(vit)
    assert parameters.keys() == state.keys()
    for name, p in parameters.items():
        p.copy_(state[name])
    pixels = torch.randn(2, 3, resolution, resolution)
    hf_vit = getattr(hf_clip, "vision_model", hf_clip)
    hidden = hf_vit(pixels, output_hidden_states=True).hidden_states    # [0] is before any block
    class_tokens = [hidden[i][:, 0] for i in range(4, layers + 1, 4)]
    assert difference(vit(pixels), torch.stack(class_tokens, dim=1)) < 1e-5


# Tied embeddings


@pytest.fixture
def tied_folder(golden_folder):
    """golden_folder with tied embeddings -> (its folder, its tensors)."""
    folder, tensors = golden_folder
    del tensors["lm_head.weight"]
    torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, tie_word_embeddings=True)
    return folder, tensors


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_tied_output_is_one_tensor(tied_folder, samples, bits):
    """This holds for a quantized and a folded model, and if the file has the tensor twice."""
    folder, tensors = tied_folder
    lavin = checkpoints.load(folder, VIT, ADAPTER, bits=bits)
    embeddings = lavin.llama.tok_embeddings.weight
    assert torch.equal(embeddings, tensors["model.embed_tokens.weight"].float())
    assert lavin.llama.output.weight is embeddings
    assert fold(lavin, 1).llama.output.weight is embeddings
    logits = lavin.logits(lavin.batch(samples))
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    torch.save(twice, folder / "pytorch_model.bin")
    again = checkpoints.load(folder, VIT, ADAPTER, bits=bits)
    assert again.llama.output.weight is again.llama.tok_embeddings.weight
    assert torch.equal(again.logits(again.batch(samples)), logits)


def test_a_tied_llama_is_folded_into_a_file_and_trained_on(tied_folder, samples, call, tmp_path):
    folder, tensors = tied_folder
    directory = tmp_path / "folded"
    code, _, stderr = call(checkpoints, ADAPTER, "--llama", folder, "--vit", VIT,
                           "--fold", directory)
    assert (code, stderr) == (0, "")
    state = torch.load(directory / "consolidated.00.pth", weights_only=True)
    assert "output.weight" not in state
    adapted = checkpoints.load(folder, VIT, ADAPTER)
    batch = adapted.batch([sample for sample in samples if sample.image is None])
    alone = checkpoints.load(directory, VIT, max_seq_len=adapted.max_seq_len)
    assert alone.llama.output.weight is alone.llama.tok_embeddings.weight
    assert difference(alone.logits(batch), adapted.logits(batch)) < 2e-2     # the file is in fp16
    adapted(batch).backward()
    assert adapted.llama.output.weight.grad is None


# Qwen2


@pytest.fixture
def qwen_folder(golden_folder):
    """golden_folder with biases in q, k and v -> (its folder, {Meta's name: bias})."""
    folder, tensors = golden_folder
    theirs, biases = qwen_tensors()
    tensors |= theirs
    torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, model_type="qwen2")
    return folder, biases


def test_biases_are_read_in_metas_order(qwen_folder):
    folder, biases = qwen_folder
    llama = checkpoints.load(folder, VIT).llama
    for name, bias in biases.items():
        assert torch.equal(llama.get_parameter(name), bias), name


def test_a_llama_with_biases_of_its_own_takes_adapters_and_is_folded(qwen_folder, samples):
    folder, _ = qwen_folder
    lavin = checkpoints.load(folder, VIT, ADAPTER)
    batch = lavin.batch([sample for sample in samples if sample.image is None])
    logits = lavin.logits(batch)
    folded = fold(lavin, 0)
    assert difference(folded.logits(batch), logits) < 1e-4
    assert folded.llama.config.folded and not lavin.llama.config.folded
    quantized = checkpoints.load(folder, VIT, ADAPTER, bits=8)
    assert difference(fold(quantized, 0).logits(batch), quantized.logits(batch)) < 1e-4


@pytest.mark.parametrize("model_type, fault", [("llama", "has no place"), ("qwen2", "is missing")])
def test_biases_where_there_should_be_none_and_none_where_they_should_be(
        golden_folder, qwen_folder, model_type, fault):
    folder, tensors = golden_folder
    if model_type == "qwen2":
        tensors = {name: tensor for name, tensor in tensors.items() if "bias" not in name}
        torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, model_type=model_type)
    with pytest.raises(LavinError, match=f"layers.0.attention.w..bias {fault}"):
        checkpoints.load(folder, VIT)


# What is refused


@pytest.mark.parametrize("changes, reason", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
    ({"rope_scaling": SCALED | {"factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": SCALED | {"high_freq_factor": 1.0}}, "from 1 to 1 turns"),
    ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling 'linear'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters 'yarn'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling 'yarn'"),
    ({"rope_scaling": 3}, "rope_scaling 3"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window True"),
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"head_dim": 99}, "a head is 99 wide"),
    ({"head_dim": "16"}, "head_dim is '16'"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_size": None}, "hidden_size is missing"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": 10**400}, "hidden_size is 1000"),
    ({"hidden_size": 60}, "a head is 15 wide"),
    ({"hidden_size": 65}, "must divide"),
    ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
    ({"num_hidden_layers": 4.0}, "num_hidden_layers is 4.0"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    ({"num_key_value_heads": 3}, "must divide"),
    ({"intermediate_size": -1}, "intermediate_size is -1"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"rope_theta": None, "rope_parameters": {"rope_theta": "x"}}, "rope_theta is 'x'"),
    ({"vocab_size": 5}, "5 tokens"),
    ({"vocab_size": -1}, "vocab_size is -1"),
])
def test_what_is_not_supported_is_named(golden_folder, changes, reason):
    folder, _ = golden_folder
    change_config(folder, **changes)
    with pytest.raises(LavinError, match=f"config.json: .*{reason}"):
        checkpoints.load(folder, VIT)


@pytest.mark.filterwarnings("ignore")           # quantized and nested tensors are deprecated
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor(golden_folder, fault):
    """It is refused in a model and in a delta."""
    change, said = FAULTS[fault]
    folder, tensors = golden_folder
    for name in ("model.layers.2.self_attn.k_proj.weight", "model.norm.weight"):
        torch.save(tensors | {name: change(tensors[name])}, folder / "pytorch_model.bin")
        with pytest.raises(LavinError, match=f"golden.*({said})"):
            checkpoints.load(folder, VIT)
        with pytest.raises(LavinError, match=f"golden.*({said})"):
            checkpoints.load(LLAMA, VIT, delta=folder)


@pytest.mark.parametrize("fault", [
    "NaN", "infinity", "int8", "bool", "0-d", "another shape", "one dimension more"])
def test_a_wrong_tensor_in_safetensors(golden_folder, fault):
    safetensors = pytest.importorskip("safetensors.torch")
    change, said = FAULTS[fault]
    folder, tensors = golden_folder
    name = "model.layers.2.self_attn.k_proj.weight"
    wrong = tensors | {name: change(tensors[name])}
    safetensors.save_file(wrong, folder / "model.safetensors")
    with pytest.raises(LavinError, match=f"golden.*({said})"):
        checkpoints.load(folder, VIT)


def test_clip_in_both_layouts_is_the_same(tmp_path):
    ours = checkpoints.read_clip(clip_folder(tmp_path, torch.clone, "mlp.fc1"))
    expected = checkpoints.read_clip(VIT)
    assert ours[1] == expected[1] and ours[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(ours[0][name], tensor), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tensor_of_clip(tmp_path, fault):
    change, said = FAULTS[fault]
    for part in ("mlp.fc1", "self_attn.k_proj"):
        folder = clip_folder(tmp_path, change, part)
        with pytest.raises(LavinError, match=f"{said}|not a CLIP image encoder"):
            checkpoints.load(LLAMA, folder)


def test_a_sum_that_is_too_large_for_the_dtype(golden_folder):
    folder, tensors = golden_folder
    name = "model.layers.2.self_attn.k_proj.weight"
    tensors[name] = torch.full_like(tensors[name], 65_500)          # fp16 goes up to 65,504
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoints.load(LLAMA, VIT, delta=folder)
    tensors[name] = tensors[name].float() + 1000
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(LavinError, match="wk.weight .* not finite in torch.float16"):
        checkpoints.load(LLAMA, VIT, delta=folder, dtype=torch.float16)


@pytest.mark.parametrize("name", [
    "layers.0.attention.wq.weight",         # Meta's name: rows would be permuted again
    "tok_embeddings.weight", "model.layers.0.attention.wq.weight", "model.layers.0.self_attn",
    "layers.x.self_attn.q_proj.weight", "weight"])
def test_an_unknown_name_is_refused(fails, golden_folder, name):
    folder, tensors = golden_folder
    tensors[name] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    torch.save(tensors, folder / "pytorch_model.bin")
    fails(generate, *ask(llama=folder), says=[f"{folder}: {name} is not a tensor of a"])
    fails(generate, *ask("--delta", folder), says=[f"{folder}: {name} is not a tensor of a"])


def test_more_tokens_than_the_tokenizer_has(call, fails, golden_folder, tmp_path):
    """Some models are padded. They run, and --fold keeps the padding."""
    folder, tensors = golden_folder
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(64, 64)])
    torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, vocab_size=576)
    assert checkpoints.load(folder, VIT).llama.output.weight.shape == (576, 64)
    folded = tmp_path / "folded"
    args = (ADAPTER, "--llama", folder, "--vit", VIT, "--fold", folded)
    assert call(checkpoints, *args)[0] == 0
    params = json.loads((folded / "params.json").read_text())
    assert params["vocab_size"] == 576
    assert checkpoints.load(folded, VIT).llama.output.weight.shape == (576, 64)
    (folded / "params.json").write_text(json.dumps(params | {"vocab_size": 511}))
    fails(generate, *ask(adapter="none", llama=folded), says=[
        "511 tokens, but its tokenizer has 512"])


def test_a_name_in_two_files(golden_folder):
    folder, _ = golden_folder
    shutil.copy(folder / "pytorch_model.bin", folder / "pytorch_model.backup.bin")
    with pytest.raises(LavinError, match="lm_head.weight is in another file of this folder too"):
        checkpoints.load(folder, VIT)


def test_weights_that_cannot_be_read(fails, golden_folder):
    folder, _ = golden_folder
    weights = folder / "pytorch_model.bin"
    weights.unlink()
    os.mkfifo(weights)
    fails(generate, *ask(llama=folder), says=[f"{weights}: a pipe or a device"])
    weights.unlink()
    weights.write_bytes(b"nonsense")
    fails(generate, *ask(llama=folder), says=[f"{weights}: not in the format of torch"])
    safetensors = folder / "model.safetensors"
    safetensors.mkdir()
    fails(generate, *ask(llama=folder), says=[f"{safetensors}: a folder, where a file is needed"])


@pytest.mark.parametrize("content, fault", [
    ("[]", "index.json: not an index of files"),
    ('{"weight_map": 3}', "index.json: not an index of files"),
    ('{"weight_map": {"a": 3}}', "index.json: not an index of files"),
    ('{"weight_map": {"a": []}}', "index.json: not an index of files"),
    ('{"weight_map": {"a": 3, "b": "pytorch_model.bin"}}', "index.json: not an index of files"),
    ('{"weight_map": {"a": "pytorch_model-2.bin"}}', "pytorch_model-2.bin is missing, but the"),
    ("x", "index.json: not JSON"),
])
def test_an_index_that_is_wrong_beside_weights_that_are_right(
        fails, golden_folder, content, fault):
    folder, _ = golden_folder
    checkpoints.load(folder, VIT)
    (folder / "pytorch_model.bin.index.json").write_text(content)
    fails(generate, *ask(llama=folder), says=[folder, fault])


@pytest.mark.parametrize("config, reason", [
    ([], "not a configuration"),
    ({"model_type": "clip", "vision_config": {"hidden_size": "64"}}, "hidden_size is '64'"),
    ({"model_type": "clip", "vision_config": {"hidden_size": 10**400}}, "hidden_size is 1000"),
    ({"model_type": "clip", "vision_config": 3}, "vision_config is 3"),
    ({"model_type": "siglip"}, "model_type 'siglip'"),
    ({"model_type": "clip", "vision_config": {"hidden_act": "gelu_new"}}, "hidden_act"),
    ({"model_type": "clip", "vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
    ({"model_type": "clip", "vision_config": {"num_attention_heads": 3}}, "num_attention_heads"),
])
def test_a_clip_that_is_not_supported_is_named(tmp_path, config, reason):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LavinError, match=reason):
        hf.read_clip(tmp_path)


def test_missing_and_damaged_files_are_named(llama_folder):
    folder, hf_llama = llama_folder
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LavinError, match="truncated"):
        checkpoints.load(folder, VIT)
    path.unlink()
    with pytest.raises(LavinError, match="neither"):
        checkpoints.load(folder, VIT)
    hf_llama.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[0].unlink()
    with pytest.raises(LavinError, match="but the index names it"):
        hf.read_llama(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LavinError, match="not an index"):
        hf.read_llama(folder)
