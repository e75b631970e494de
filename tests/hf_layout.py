"""The golden LLaMA and CLIP in Hugging Face's layout."""

import json
import re

import torch

import checkpoints
from conftest import LLAMA, VIT
from extras import hf

CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 192,
    "num_hidden_layers": 4, "num_attention_heads": 4, "rms_norm_eps": 1e-6, "vocab_size": 512,
    "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False}


def to_hf(name, tensor):
    """(name, tensor) in Meta's layout, with heads 16 wide -> the same in Hugging Face's layout."""
    if name.endswith(("wq.weight", "wk.weight")):
        heads = tensor.unflatten(0, (-1, 8, 2))                     # (H, D/2, 2, C)
        tensor = heads.transpose(1, 2).flatten(0, 2)
    for theirs, ours in hf.LLAMA_NAMES.items():
        name = re.sub(rf"(^|\d\.){ours}\.weight", rf"\1{theirs}.weight", name)
    if name.startswith("layers."):
        name = f"model.{name}"
    return name, tensor


def write_golden_folder(folder):
    """Write LLAMA in Hugging Face's layout, as a .bin without a tokenizer -> its tensors."""
    folder.mkdir()
    tensors = {}
    for name, tensor in torch.load(LLAMA / "consolidated.00.pth", weights_only=True).items():
        if name != "rope.freqs":
            name, tensor = to_hf(name, tensor)
            tensors[name] = tensor.clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors


def clip_folder(folder, change, part):
    """VIT in Hugging Face's layout. One matrix is changed: that of q_proj, k_proj or fc1."""
    tensors = {}
    for name, tensor in checkpoints.read_clip_state(VIT).items():
        name = name.removeprefix("visual.")
        for theirs, ours in hf.CLIP_NAMES.items():
            name = name.replace(ours, theirs)
        split = re.fullmatch(r"(.+)\.attn\.in_proj_(weight|bias)", name)
        if split:
            for which, third in zip("qkv", tensor.chunk(3)):
                tensors[f"{split[1]}.self_attn.{which}_proj.{split[2]}"] = third.clone()
        elif name not in ("proj", "ln_post.weight", "ln_post.bias"):
            tensors[name] = tensor
    for name in tensors:
        if name.endswith(f"layers.3.{part}.weight"):
            tensors[name] = change(tensors[name])
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_text('{"model_type": "clip_vision_model", "hidden_size": 64}')
    return folder


def qwen_tensors():
    """LLAMA's new biases in q, k, v -> ({Hugging Face's name: tensor}, {Meta's name: tensor})."""
    theirs = {}
    biases = {}
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        for which in "qkv":
            bias = torch.randn(64, generator=generator)
            biases[f"layers.{i}.attention.w{which}.bias"] = bias
            if which != "v":
                bias = bias.unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten()
            theirs[f"model.layers.{i}.self_attn.{which}_proj.bias"] = bias.clone()
    return theirs, biases
