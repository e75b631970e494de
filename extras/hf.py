"""Read Hugging Face folders of LLaMA and CLIP as if they were in the official layouts.

A folder has config.json and either model.safetensors or pytorch_model.bin. A large model has
several such files and an index. Two things differ from Meta's and OpenAI's files. The tensors have
other names, which the two tables below translate. And the rows of each head in wq and wk have
another order: their RoPE pairs channel i with i + D/2, ours pairs channel 2i with 2i + 1. We read
two architectures: LLaMA's (LLaMA 1 to 3, Vicuna, TinyLlama, SmolLM2), and Qwen2's, which is LLaMA's
with biases in q, k and v. Anything else (another architecture or RoPE, other biases) is refused,
and the error names the setting.
"""

import os
import re
from pathlib import Path

import torch

from extras.values import Kind, LLAMA_PARAMS, check_supported, check_values, meta_name, short
from files import (LavinError, check_regular, check_tensor, read_checkpoint, read_json,
                   tensors_of)

# Hugging Face's name -> Meta's. In a layer, they begin with "model.layers.N." and "layers.N.".
LLAMA_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Hugging Face's name for a field of LLaMAConfig -> ours.
LLAMA_FIELDS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tied_embeddings",
}
OPTIONAL = ("num_key_value_heads", "head_dim", "tie_word_embeddings")
# The same for scaled RoPE. Its settings are in a separate JSON object.
ROPE_FIELDS = {
    "factor": "rope_factor",
    "low_freq_factor": "rope_low",
    "high_freq_factor": "rope_high",
    "original_max_position_embeddings": "rope_context",
}
# Hugging Face's name -> OpenAI's. OpenAI keeps q, k and v in one matrix, in_proj.
CLIP_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",                               # Hugging Face's own spelling
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


# A folder's files


def weight_files(folder):
    """A folder's files with tensors. Raises LavinError if there are none, or if one is missing."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise LavinError(f"{folder}: holds neither model*.safetensors nor pytorch_model*.bin")
    found = {file.name for file in files}
    for index in folder.glob("*.index.json"):
        try:
            names = sorted(read_json(index).get("weight_map", {}).values())     # {tensor: file}
            # A folder may have an index for each of the two formats. We read only one format.
            names = [name for name in names if name.endswith(files[0].suffix)]
        except (AttributeError, TypeError) as error:
            raise LavinError(f"{index}: not an index of files; it must name a file for each tensor"
                             ) from error
        for name in names:
            if name not in found:
                raise LavinError(f"{folder}: {name} is missing, but the index names it")
    return files


def read_safetensors(file):
    """{name: tensor} of one file, memory-mapped."""
    check_regular(file)
    try:
        from safetensors.torch import load_file             # an optional package
    except ImportError as error:
        raise LavinError(f"{file}: pip install safetensors to read such files") from error
    try:
        return load_file(file)
    except PermissionError as error:
        raise LavinError(f"{file}: cannot be read ({error.strerror or error})") from error
    except Exception as error:                              # damaged bytes may raise any exception
        reason = "not a readable safetensors file; truncated? fetch it again"
        raise LavinError(f"{file}: {reason}") from error


def read_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a folder's files, memory-mapped: bytes stay on disk until they are used."""
    tensors = {}
    for file in weight_files(Path(folder)):
        if file.suffix == ".bin":
            found = tensors_of(read_checkpoint(file, mmap=True), file)
        else:
            found = read_safetensors(file)
        twice = tensors.keys() & found.keys()
        if twice:
            raise LavinError(f"{file}: {min(twice)} is in another file of this folder too; "
                             "move away the file that is not part of the model")
        tensors |= found
    return tensors


def read_object(path):
    """{name: value} of a JSON file, without the values that are null."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise LavinError(f"{path}: not a configuration; it must be a JSON object")
    return {name: value for name, value in content.items() if value is not None}


# LLaMA


def read_config(folder: str | Path) -> dict:
    """config.json of a LLaMA -> {field of LLaMAConfig: value}, types and ranges checked.

    Raises LavinError for another architecture, or for a setting that our model does not support.
    """
    path = Path(folder, "config.json")
    config = read_object(path)
    # RoPE's settings: rope_parameters in newer files, rope_scaling and rope_theta in older ones.
    rope_name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(rope_name) or {}
    if not isinstance(rope, dict):
        raise LavinError(f"{path}: {rope_name} {short(rope)} is not supported")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    check_supported(path, config | {rope_name: rope_type}, {
        "model_type": ("llama", "qwen2"),
        "hidden_act": ("silu",),
        rope_name: ("default", "llama3"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_sliding_window": (False,),
    })
    config = {"rms_norm_eps": 1e-6, "rope_theta": rope.get("rope_theta", 10000.0)} | config
    needed = [name for name in LLAMA_FIELDS if name not in OPTIONAL]
    params = read_fields(path, config, LLAMA_FIELDS, needed)
    if rope_type == "llama3":
        params |= read_fields(path, rope, ROPE_FIELDS, ROPE_FIELDS)
    if config.get("model_type") == "qwen2":
        params["attention_bias"] = True
    return params


def read_fields(path, config, fields, needed):
    """config -> {field of LLaMAConfig: value}. fields: {name in config: field of LLaMAConfig}."""
    kinds = {name: LLAMA_PARAMS[field] for name, field in fields.items()}
    check_values(path, config, kinds, needed)
    return {field: config[name] for name, field in fields.items() if name in config}


def read_llama(folder: str | Path) -> dict[str, torch.Tensor]:
    """{Meta's name: tensor}, memory-mapped. wq and wk keep Hugging Face's order of rows."""
    state = {}
    for name, tensor in read_tensors(folder).items():
        if "rotary_emb" in name:                            # RoPE's frequencies: we compute them
            continue
        known = meta_name(name, r"model\.layers\.(\d+)\.(.+)", LLAMA_NAMES)
        if known is None:
            raise LavinError(f"{folder}: {name} is not a tensor of a Hugging Face LLaMA")
        state[known] = tensor
    return state


def to_meta(name: str, tensor: torch.Tensor, config) -> torch.Tensor:
    """The tensor called `name` with its rows in Meta's order. config: the LLaMAConfig.

    In wq and wk, rows i and i + D/2 of a head of D rows become rows 2i and 2i + 1. A bias has
    one number per row.
    """
    if not name.endswith((".wq.weight", ".wk.weight", ".wq.bias", ".wk.bias")):
        return tensor
    heads = tensor.unflatten(0, (-1, 2, config.head_dim // 2))      # (H, 2, D/2, C) or (H, 2, D/2)
    return heads.transpose(1, 2).flatten(0, 2)                      # (H * D, C) or (H * D,)


# CLIP


def read_clip_config(folder: str | Path) -> dict:
    """config.json of CLIP's image encoder. Raises LavinError if our ViT does not support it."""
    path = Path(folder, "config.json")
    if not os.path.exists(path):
        raise LavinError(f"{folder}: a folder without config.json; give CLIP's file ViT-L-14.pt, "
                         "or a Hugging Face folder")
    config = read_object(path)
    check_supported(path, config, {"model_type": ("clip_vision_model", "clip")})
    vision = config.get("vision_config", config)
    if not isinstance(vision, dict):
        raise LavinError(f"{path}: vision_config is {short(vision)}, not a JSON object")
    check_values(path, vision, {"hidden_size": Kind(int, low=64, high=2**14)})
    check_supported(path, vision, {
        "hidden_act": ("quick_gelu", "gelu"),
        "layer_norm_eps": (1e-5,),
        "num_attention_heads": (vision.get("hidden_size", 768) // 64,),     # heads are 64 wide
    })
    return vision


def has_quick_gelu(folder: str | Path) -> bool:
    """Does this CLIP have OpenAI's activation? If not, it has the usual GELU, as OpenCLIP has."""
    return read_clip_config(folder).get("hidden_act", "quick_gelu") == "quick_gelu"


def is_unused(name):
    """Is this a tensor that LaVIN does not use, as in the text tower or after the last block?"""
    unused = ("post_layernorm", "visual_projection", "text_", "logit_scale")
    return name.startswith(unused) or name.endswith("position_ids")


def read_clip(folder: str | Path) -> dict[str, torch.Tensor]:
    """A CLIPVisionModel or CLIPModel -> {OpenAI's name, prefixed with "visual.": tensor}."""
    read_clip_config(folder)
    state = {}
    in_proj = {}                                            # {name: {"q": tensor, "k": …, "v": …}}
    for name, tensor in read_tensors(folder).items():
        name = name.removeprefix("vision_model.")
        if is_unused(name):
            continue
        for hf_name, openai_name in CLIP_NAMES.items():
            name = name.replace(hf_name, openai_name)
        part = re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name)
        if part:
            block, which, kind = part.groups()
            check_tensor(folder, name, tensor)
            in_proj.setdefault(f"visual.{block}.attn.in_proj_{kind}", {})[which] = tensor
        else:
            state[f"visual.{name}"] = tensor
    try:
        for name, parts in in_proj.items():
            stacked = torch.stack([parts["q"], parts["k"], parts["v"]])     # fails if shapes differ
            state[name] = stacked.flatten(0, 1)
    except (KeyError, RuntimeError) as error:
        raise LavinError(f"{folder}: not a CLIP image encoder: a q_proj, k_proj or v_proj is "
                         "missing, or differs in shape from the other two") from error
    return state
