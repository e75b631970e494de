"""Hugging Face's folders: our loader and model compute from them what transformers computes.

Needs transformers and safetensors (pip install transformers safetensors), as nothing else does.
"""

import json
import shutil

import pytest
import torch

import checkpoints
from adapters import AdapterConfig
from conftest import LLAMA, VIT, difference
from extras import hf
from files import LavinError, tokenizer_path
from vit import VisionTransformer

transformers = pytest.importorskip(
    "transformers", reason="parity with Hugging Face needs pip install transformers safetensors")


@pytest.fixture
def llama_folder(tmp_path):
    """A tiny random LLaMA with grouped queries, as in TinyLlama -> (its folder, the model)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    shutil.copy(tokenizer_path(LLAMA), folder)
    return folder, model


def frozen_parameters(module):
    return {name: p for name, p in module.named_parameters() if "adapter" not in name}


# LLaMA


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
    llama = checkpoints.load(folder, VIT).llama
    tokens = torch.randint(3, 500, (2, 17))
    w = torch.full((3, 2, 1, 2), 0.5)                   # fresh adapters are the identity
    logits = llama.output(llama(llama.tok_embeddings(tokens), w))
    assert difference(logits, hf_llama(tokens).logits) < 1e-5


def save_in_metas_layout(llama, folder, tokenizer):
    """The frozen weights of the LLaMA of llama_folder as one shard."""
    folder.mkdir()
    state = {name: p.clone() for name, p in frozen_parameters(llama).items()}
    torch.save(state, folder / "consolidated.00.pth")
    params = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16,
              "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(tokenizer, folder)


@torch.no_grad()
def test_a_delta_is_added_in_the_right_order_of_rows(llama_folder, tmp_path):
    """The base is in Meta's layout and the delta in Hugging Face's, as Vicuna's are given out."""
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
    expected = frozen_parameters(checkpoints.load(folder, VIT).llama)
    for name, p in frozen_parameters(summed).items():
        assert difference(p, expected[name]) < 1e-6, name


# CLIP


@pytest.mark.parametrize("patch, resolution, layers", [(14, 56, 8), (16, 48, 4), (32, 64, 4)])
@pytest.mark.parametrize("is_whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@torch.no_grad()
def test_clip_gives_the_same_hidden_states(tmp_path, patch, resolution, layers, is_whole):
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": layers,
              "num_attention_heads": 2, "patch_size": patch, "image_size": resolution}
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
    vit = VisionTransformer(config, AdapterConfig())
    parameters = frozen_parameters(vit)
    assert parameters.keys() == state.keys()
    for name, p in parameters.items():
        p.copy_(state[name])
    pixels = torch.randn(2, 3, resolution, resolution)
    hf_vit = getattr(hf_clip, "vision_model", hf_clip)
    hidden = hf_vit(pixels, output_hidden_states=True).hidden_states    # [0]: before any block
    class_tokens = [hidden[i][:, 0] for i in range(4, layers + 1, 4)]
    assert difference(vit(pixels), torch.stack(class_tokens, dim=1)) < 1e-5


# What is refused


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


@pytest.mark.parametrize("changes, reason", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None},
     "rope_scaling"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"tie_word_embeddings": True}, "tie_word"),
    ({"model_type": "mistral"}, "model_type 'mistral'"),
    ({"head_dim": 99}, "head_dim"),
    ({"hidden_size": None}, "configuration"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"vocab_size": 5}, "5 tokens"),
])
def test_what_is_not_supported_is_named(llama_folder, changes, reason):
    folder, _ = llama_folder
    change_config(folder, **changes)
    with pytest.raises(LavinError, match=reason):
        checkpoints.load(folder, VIT)


@pytest.mark.parametrize("config, reason", [
    ([], "not CLIP's configuration"),
    ({"model_type": "clip", "vision_config": 3}, "not CLIP's configuration"),
    ({"model_type": "siglip"}, "model_type 'siglip'"),
    ({"model_type": "clip", "vision_config": {"hidden_act": "gelu"}}, "hidden_act"),
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
    with pytest.raises(LavinError, match="which the index names"):
        hf.read_llama(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(LavinError, match="not an index"):
        hf.read_llama(folder)
