"""Hugging Face's folders: what transformers computes from them, our loader and model compute as well.

Needs transformers and safetensors (pip install transformers safetensors), which nothing else here does.
"""

import json
import shutil

import pytest
import torch

import adapters
import hf
import vit as clip
from conftest import LLAMA, VIT, difference
from files import LavinError
from model import LaVIN

transformers = pytest.importorskip("transformers", reason="parity with Hugging Face needs pip install transformers safetensors")


@pytest.fixture
def llama_folder(tmp_path):
    """A tiny random LLaMA with grouped queries, as TinyLlama has."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    shutil.copy(LLAMA.parent / "tokenizer.model" if not (LLAMA / "tokenizer.model").exists() else LLAMA / "tokenizer.model",
                tmp_path / "llama")
    return tmp_path / "llama", model


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("stored", ["safetensors", "bin", "shards"])
@torch.no_grad()
def test_llama_gives_the_same_logits(llama_folder, stored):
    folder, theirs = llama_folder
    if stored == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    elif stored == "shards":
        (folder / "model.safetensors").unlink()
        theirs.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    ours = LaVIN.load(folder, VIT)
    tokens = torch.randint(3, 500, (2, 17))
    w = torch.full((3, 2, 1, 2), 0.5)                              # fresh adapters are the identity
    logits = ours.llama.output(ours.llama(ours.llama.tok_embeddings(tokens), w))
    assert difference(logits, theirs(tokens).logits) < 1e-5


@torch.no_grad()
def test_a_delta_is_added_in_the_right_order_of_rows(llama_folder, tmp_path):
    """Base in Meta's layout, delta in Hugging Face's, as Vicuna's are given out."""
    folder, theirs = llama_folder
    base = LaVIN.load(folder, VIT)
    meta = tmp_path / "meta"
    meta.mkdir()
    torch.save({name: p.clone() for name, p in base.llama.named_parameters() if not p.requires_grad}, meta / "consolidated.00.pth")
    (meta / "params.json").write_text(json.dumps({
        "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}))
    shutil.copy(folder / "tokenizer.model", meta)
    other = transformers.LlamaForCausalLM(theirs.config)
    delta = transformers.LlamaForCausalLM(theirs.config)
    delta.load_state_dict({name: t - theirs.state_dict()[name] for name, t in other.state_dict().items()})
    delta.save_pretrained(tmp_path / "delta")
    summed = LaVIN.load(meta, VIT, delta=tmp_path / "delta")
    other.save_pretrained(folder)
    wanted = LaVIN.load(folder, VIT)
    for (name, p), q in zip(summed.llama.named_parameters(), wanted.llama.parameters()):
        if not p.requires_grad:
            assert difference(p, q) < 1e-6, name


@pytest.mark.parametrize("patch, resolution, layers", [(14, 56, 8), (16, 48, 4), (32, 64, 4)])
@pytest.mark.parametrize("whole", [True, False], ids=["CLIPModel", "CLIPVisionModel"])
@torch.no_grad()
def test_clip_gives_the_same_hidden_states(tmp_path, patch, resolution, layers, whole):
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": layers, "num_attention_heads": 2,
              "patch_size": patch, "image_size": resolution}
    if whole:
        text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 99}
        theirs = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    else:
        theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)).eval()
    theirs.save_pretrained(tmp_path)
    state, config = clip.read(tmp_path)
    assert (config.patch, config.resolution, config.layers, config.width) == (patch, resolution, layers, 128)
    ours = clip.VisionTransformer(config, adapters.AdapterConfig())
    frozen = {name: p for name, p in ours.named_parameters() if "adapter" not in name}
    assert frozen.keys() == state.keys()
    for name, p in frozen.items():
        p.copy_(state[name])
    pixels = torch.randn(2, 3, resolution, resolution)
    hidden = getattr(theirs, "vision_model", theirs)(pixels, output_hidden_states=True).hidden_states
    assert difference(ours(pixels), torch.stack([hidden[i][:, 0] for i in range(4, layers + 1, 4)], dim=1)) < 1e-5


@pytest.mark.parametrize("changes, says", [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": None}, "rope_scaling"),
    ({"attention_bias": True}, "attention_bias"), ({"mlp_bias": True}, "mlp_bias"), ({"tie_word_embeddings": True}, "tie_word"),
    ({"model_type": "mistral"}, "model_type 'mistral'"), ({"head_dim": 99}, "head_dim"), ({"hidden_size": None}, "configuration"),
    ({"hidden_act": "gelu"}, "hidden_act"), ({"vocab_size": 5}, "5 tokens")])
def test_what_is_not_supported_is_named(llama_folder, changes, says):
    folder, _ = llama_folder
    edit(folder, **changes)
    with pytest.raises(LavinError, match=says):
        LaVIN.load(folder, VIT)


def test_missing_and_damaged_files_are_named(llama_folder):
    folder, theirs = llama_folder
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(LavinError, match="truncated"):
        LaVIN.load(folder, VIT)
    path.unlink()
    with pytest.raises(LavinError, match="neither"):
        LaVIN.load(folder, VIT)
    theirs.save_pretrained(folder, max_shard_size="100KB")
    sorted(folder.glob("model-*.safetensors"))[0].unlink()
    with pytest.raises(LavinError, match="which the index names"):
        hf.read_llama(folder)
