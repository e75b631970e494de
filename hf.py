"""Hugging Face's folders read as if they were in the official layouts: LLaMA (Vicuna, TinyLlama, …) and CLIP.

A folder has config.json and model.safetensors or pytorch_model.bin, or several of them and an index. Names differ from
Meta's and OpenAI's, and the rows of q and k: there a head's channel i is paired with i + D/2 by RoPE, here 2i with 2i + 1.
What our model does not do (biases, scaled RoPE, tied embeddings, another architecture) is refused by name.
"""

import re
from pathlib import Path

import torch

from files import LavinError, read_checkpoint, read_json, tensors_of

LLAMA_NAMES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output",
               "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
               "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
               "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
CLIP_NAMES = {"embeddings.class_embedding": "class_embedding", "embeddings.patch_embedding.weight": "conv1.weight",
              "embeddings.position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre",
              "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
              "self_attn.out_proj": "attn.out_proj"}


def read_tensors(folder):
    """{name: tensor} of all the files in a folder, mapped, not read."""
    folder = Path(folder)
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if files := sorted(folder.glob(pattern)):
            break
    else:
        raise LavinError(f"{folder}: holds neither model*.safetensors nor pytorch_model*.bin")
    wanted = {name for index in folder.glob("*.index.json") for name in read_json(index).get("weight_map", {}).values()
              if Path(name).suffix == files[0].suffix}
    if missing := sorted(wanted - {file.name for file in files}):
        raise LavinError(f"{folder}: {missing[0]} is missing, which the index names")
    tensors = {}
    for file in files:
        if file.suffix == ".bin":
            tensors |= tensors_of(read_checkpoint(file, mmap=True), file)
            continue
        try:
            from safetensors.torch import load_file     # needed for these files alone
        except ImportError as error:
            raise LavinError(f"{file}: pip install safetensors, which reads such files") from error
        try:
            tensors |= load_file(file)
        except Exception as error:      # damaged bytes make the reader raise anything
            raise LavinError(f"{file}: not a readable safetensors file; truncated? fetch it again") from error
    return tensors


def refuse(path, config, wanted):
    """LavinError for the first setting that is not as wanted: {name: (allowed values)}."""
    for name, allowed in wanted.items():
        if config.get(name, allowed[0]) not in allowed:
            raise LavinError(f"{path}: {name} {config[name]!r} is not supported, only {' or '.join(map(repr, allowed))}")


def read_config(folder):
    """config.json -> {field of LLaMAConfig: value}."""
    path = Path(folder, "config.json")
    config = read_json(path)
    try:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        plain = {"rope_theta": config.get("rope_theta", rope.get("rope_theta", 10000.0)),
                 "rope_scaling": None if rope.get("rope_type", rope.get("type", "default")) == "default" else rope}
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        refuse(path, config | plain | {"head_dim": config.get("head_dim") or head_dim}, {
            "model_type": ("llama",), "hidden_act": ("silu",), "rope_scaling": (None,), "attention_bias": (False, None),
            "mlp_bias": (False, None), "tie_word_embeddings": (False, None), "head_dim": (head_dim,)})
        return {"dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"],
                "n_kv_heads": config.get("num_key_value_heads"), "hidden_dim": config["intermediate_size"],
                "norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": plain["rope_theta"], "vocab_size": config["vocab_size"]}
    except (AttributeError, KeyError, TypeError, ZeroDivisionError) as error:
        raise LavinError(f"{path}: not LLaMA's configuration ({error!r})") from error


def read_llama(folder):
    """{Meta's name: tensor}, mapped; the rows of wq and wk still in Hugging Face's order."""
    renamed = {}
    for name, tensor in read_tensors(folder).items():
        stem, _, kind = name.rpartition(".")
        layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        if "rotary_emb" not in name:
            ours = LLAMA_NAMES.get(layer[2] if layer else stem, stem)
            renamed[f"layers.{layer[1]}.{ours}.{kind}" if layer else f"{ours}.{kind}"] = tensor
    return renamed


def to_meta(name, tensor, config):
    """The tensor of that name in Meta's order: in wq and wk, rows i and i + D/2 of a head become 2i and 2i + 1."""
    if name.endswith(("wq.weight", "wk.weight")):
        return tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return tensor


def read_clip(folder):
    """A CLIPVisionModel or CLIPModel -> {OpenAI's name, "visual." in front: tensor}."""
    path = Path(folder, "config.json")
    config = read_json(path)
    vision = config.get("vision_config", config) if isinstance(config, dict) else {}
    refuse(path, config, {"model_type": ("clip_vision_model", "clip")})
    heads = vision.get("hidden_size", 768) // 64
    refuse(path, vision, {"hidden_act": ("quick_gelu",), "num_attention_heads": (heads,)})
    state, attention = {}, {}
    for name, tensor in read_tensors(folder).items():
        name = name.removeprefix("vision_model.")
        if name.startswith(("post_layernorm", "visual_projection", "text_", "logit_scale")) or name.endswith("position_ids"):
            continue
        name = re.sub(r"^encoder\.layers\.", "transformer.resblocks.", name)
        for theirs, ours in CLIP_NAMES.items():
            name = name.replace(theirs, ours)
        part = re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part:
            attention.setdefault(f"visual.{part[1]}.attn.in_proj_{part[3]}", {})[part[2]] = tensor
        else:
            state[f"visual.{name}"] = tensor
    try:
        return state | {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in attention.items()}
    except (KeyError, RuntimeError) as error:
        raise LavinError(f"{folder}: not a CLIP image encoder ({error!r})") from error
