"""The official files: LLaMA, CLIP and LaVIN's adapters, read and written. `load` builds a LaVIN.

    python checkpoints.py FILE                  what is in a LaVIN checkpoint, released or ours
    python checkpoints.py FILE --fold DIR       its adapters merged into LLaMA, for text only

    LLaMA    Meta's layout (DIR/params.json, DIR/consolidated.00.pth, .01.pth, …) or a Hugging
             Face folder (extras/hf.py), with tokenizer.model or tokenizer.json; or a GGUF file
             (extras/gguf.py)
    CLIP     ViT-L-14.pt: OpenAI's TorchScript archive, or a plain state dict with the same names;
             or a Hugging Face folder (extras/hf.py)
    LaVIN    checkpoint-19.pth: {"model": {name: tensor}, "args": argparse.Namespace}

Everything is read strictly. A missing or unknown name or a wrong shape raises a LavinError, which
names the file and the tensor.
"""

import dataclasses
import json
import math
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn

import data
from adapters import AdapterConfig
from extras import gguf, hf, tokenizers, torchscript
from extras.terminal import Parser, run
from extras.values import ADAPTER_ARGS, LLAMA_PARAMS, PROGRESS, SETTINGS, Kind, check_values
from fast import ranks
from fast.fold import fold
from fast.quantize import n_quantized, quantize
from files import (LavinError, check_names, check_tensor, check_writable, fill, is_finite,
                   is_gguf, is_hf_folder, read_checkpoint, read_json, tensors_of, tokenizer_path,
                   write_atomically)
from model import LaVIN, LLaMA, LLaMAConfig
from vit import ViTConfig

# The allowed sizes of CLIP and of the adapters. The sizes are read from tensor shapes.
VIT_SIZES = {
    "width": Kind(int, low=64, high=2**14),
    "layers": Kind(int, low=4, high=1000),      # the features are taken after every fourth
    "patch": Kind(int, low=1, high=2**10),
    "resolution": Kind(int, low=1, high=2**12),
}
ADAPTER_SIZES = {
    "rank": Kind(int, low=2, high=2**14),
    "projector_dim": Kind(int, low=1, high=2**17),
}

# LLaMA


def open_llama(llama: str | Path) -> str | Path | gguf.File:
    """Open a GGUF file, so that its header is read only once. Return a folder's path as it is."""
    if is_gguf(llama):
        return gguf.File(llama)
    return llama


def load_tokenizer(source: str | Path | gguf.File) -> data.Tokenizer:
    """The tokenizer of a LLaMA. source: what open_llama returned. Raises LavinError."""
    if isinstance(source, gguf.File):
        return source.tokenizer()
    path = tokenizer_path(source)
    if path.name == "tokenizer.model" and tokenizers.is_tiktoken(path):
        path = Path(source, "tokenizer.json")
        if not os.path.exists(path):
            raise LavinError(f"{tokenizer_path(source)}: LLaMA 3's own format, not supported; take "
                             "tokenizer.json and tokenizer_config.json of its Hugging Face folder")
    if path.name == "tokenizer.json":
        return tokenizers.load_json(path)
    return data.load_sentencepiece(source)


def read_params(source: str | Path | gguf.File, vocab_size: int) -> LLaMAConfig:
    """params.json, Hugging Face's config.json or a GGUF file -> LLaMAConfig. Raises LavinError.

    vocab_size is the tokenizer's. Meta's models have exactly this many tokens; -1 in params.json
    means the same. Other models may have more, and so may a model that --fold wrote.
    """
    if isinstance(source, gguf.File):
        path = source.path
        params = source.params()
        fits = params["vocab_size"] >= vocab_size
    elif is_hf_folder(source):
        path = Path(source, "config.json")
        params = hf.read_config(source)
        fits = params["vocab_size"] >= vocab_size
    else:
        path = Path(source, "params.json")
        params = read_meta_params(path, vocab_size)
        fits = params["vocab_size"] == vocab_size
        if params.get("folded"):
            fits = params["vocab_size"] >= vocab_size
    if not fits:
        raise LavinError(f"{path}: {params['vocab_size']} tokens, "
                         f"but its tokenizer has {vocab_size}")
    config = LLaMAConfig(**params)
    divides = params.get("head_dim") is not None or config.dim % config.n_heads == 0
    if not divides or config.n_heads % config.n_kv_heads:
        raise LavinError(f"{path}: heads {config.n_heads} must divide dim {config.dim}, and "
                         f"key heads {config.n_kv_heads} must divide heads")
    check_values(path, vars(config), LLAMA_PARAMS)      # hidden_dim may have been computed
    if config.head_dim % 2:
        raise LavinError(f"{path}: a head is {config.head_dim} wide, which RoPE cannot halve")
    if config.rope_low >= config.rope_high:
        raise LavinError(f"{path}: scaled RoPE goes from {config.rope_low:g} to "
                         f"{config.rope_high:g} turns; the second must be greater")
    return config


def read_meta_params(path: Path, vocab_size: int) -> dict:
    """params.json -> {field of LLaMAConfig: value}. Types and ranges are checked."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise LavinError(f"{path}: not LLaMA's parameters, which are a JSON object")
    params = {}
    if content.get("use_scaled_rope"):                  # LLaMA 3.1 and later
        params["rope_factor"] = content.get("rope_scaling_factor") or 8.0
    for name in LLAMA_PARAMS:
        if content.get(name) is not None:
            params[name] = content[name]
    if params.get("vocab_size", -1) == -1:
        params["vocab_size"] = vocab_size
    if params.get("attention_bias"):        # in this layout, only --fold writes biases
        params["folded"] = True
    check_values(path, params, LLAMA_PARAMS, needed=("dim", "n_layers", "n_heads"))
    return params


def allocate(modules: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Allocate the parameters of modules on the meta device: trained ones fp32, others `dtype`.

    They stay uninitialized. Parameters that modules share stay shared.
    """
    allocated = {}                          # {parameter on the meta device: the allocated one}
    for module in modules:
        for name, p in list(module.named_parameters(recurse=False)):
            if p not in allocated:
                p_dtype = torch.float32 if p.requires_grad else dtype
                empty = torch.empty(p.shape, device=device, dtype=p_dtype)
                allocated[p] = nn.Parameter(empty, requires_grad=p.requires_grad)
            setattr(module, name, allocated[p])


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that LLaMA's or CLIP's files hold: all but the adapters."""
    return {name: p for name, p in module.named_parameters() if not p.requires_grad}


def slots(whole: torch.Tensor,
          slices: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The views of `whole` into which to copy model-parallel slices, or None if they do not fit.

    Meta splits wq, wk, wv, w1, w3 and output along dim 0, wo and w2 along dim 1, and tok_embeddings
    along one or the other. The norms are whole in every shard. The shapes show which case it is.
    """
    if all(s.shape == whole.shape for s in slices):
        return [whole]
    for dim in range(whole.dim()):
        if all(differ_only_in(dim, s, whole) for s in slices):
            sizes = [s.shape[dim] for s in slices]
            if sum(sizes) == whole.shape[dim]:
                return list(whole.split(sizes, dim))
    return None


def differ_only_in(dim: int, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Do two tensors have the same shape, apart from dimension `dim`?"""
    if a.dim() != b.dim():
        return False
    return a.shape[:dim] == b.shape[:dim] and a.shape[dim + 1:] == b.shape[dim + 1:]


def shard_files(directory: str | Path) -> list[Path]:
    """consolidated.00.pth, .01.pth, …. Raises LavinError if one is missing or wrongly named."""
    files = sorted(Path(directory).glob("consolidated.*.pth"))
    if not files:
        raise LavinError(f"{directory}: holds no consolidated.00.pth")
    for i, file in enumerate(files):
        expected = f"consolidated.{i:02}.pth"
        if file.name != expected:
            raise LavinError(f"{file}: there is no {expected} before it; fetch that, "
                             "or move this file away if it is not part of the model")
    return files


class MappedShards:
    """The files of a LLaMA, memory-mapped: a tensor stays on disk until it is read.

    Pages that were read count as memory until their map is dropped. So the files are mapped anew
    before these pages exceed a budget: the size of a shard's largest tensor, at least 16 MB.
    """

    def __init__(self, directory: str | Path, names: list[str], is_hf: bool):
        """Raises LavinError unless every shard holds exactly the tensors with these names."""
        self.directory = directory
        self.is_hf = is_hf
        self.files = [Path(directory)] if is_hf else shard_files(directory)
        self.open()
        for file, shard in zip(self.files, self.shards):
            found = []
            for name in shard:
                is_copy = name == "output.weight" and name not in names     # tied embeddings
                if not name.endswith("rope.freqs") and not is_copy:         # we compute rope.freqs
                    found.append(name)
            check_names(file, names, found)
        self.check_different()
        largest = max(tensor.nbytes for tensor in self.shards[0].values())
        self.budget = max(2**24, largest)

    def open(self) -> None:
        """Map the files again, with no page read."""
        self.shards = []                # drop the old maps before making new ones
        self.touched = 0
        if self.is_hf:
            self.shards = [hf.read_llama(self.directory)]
        else:
            self.shards = [tensors_of(read_checkpoint(file, mmap=True), file)
                           for file in self.files]

    def slices(self, name: str, target: torch.Tensor) -> list[torch.Tensor]:
        """The slices of one tensor, one from each shard, checked. Their shapes may still be wrong.

        The caller must not keep them longer than needed.
        """
        size = self.shards[0][name].nbytes
        if self.touched + size > self.budget:
            self.open()
        self.touched += size
        shape = target.shape if self.is_hf else None        # Hugging Face splits no tensor
        slices = [shard[name] for shard in self.shards]
        for file, piece in zip(self.files, slices):
            check_tensor(file, name, piece, shape, target.dtype)
        return slices

    def check_different(self) -> None:
        """Raises LavinError if two shards hold the same part of the embeddings: one is a copy."""
        pieces = [shard["tok_embeddings.weight"] for shard in self.shards]
        for i in range(len(pieces)):
            for j in range(i):
                if pieces[j].equal(pieces[i]) and pieces[i].any():      # not if all are 0
                    raise LavinError(f"{self.files[i]}: a copy of {self.files[j]}; fetch it again")


def open_weights(source: str | Path | gguf.File, names: list[str]) -> MappedShards | gguf.File:
    """The weights of a LLaMA (see open_llama). They must have exactly these names."""
    if isinstance(source, gguf.File):
        check_names(source.path, names, source.names())
        return source
    return MappedShards(source, names, is_hf_folder(source))


def copy_tensor(shards: MappedShards | gguf.File, name: str, target: torch.Tensor,
                config: LLaMAConfig, permute: bool = True) -> None:
    """Copy a tensor from the files into `target`: its slices joined, its rows in Meta's order.

    permute=False leaves the rows of a Hugging Face file in their own order.
    """
    slices = shards.slices(name, target)
    if shards.is_hf and permute:
        slices = [hf.to_meta(name, slices[0], config)]
    parts = slots(target, slices)
    if parts is None:
        found = " + ".join(str(tuple(s.shape)) for s in slices)
        wanted = tuple(target.shape)
        raise LavinError(f"{shards.directory}: {name} is {found} in "
                         f"{len(shards.files)} shard(s), but params.json and tokenizer "
                         f"ask for {wanted}; is a consolidated.NN.pth missing?")
    for part, piece in zip(parts, slices):      # of a tensor whole in every shard, only the first
        part.copy_(piece)


@torch.no_grad()
def load_llama(llama: LLaMA, source: str | Path | gguf.File, device: torch.device,
               dtype: torch.dtype, delta: str | Path | None = None,
               delta_unpermuted: bool = False) -> Iterator[nn.Module]:
    """Copy LLaMA's files (see open_llama) into the frozen weights of `llama`, tensor by tensor.

    The blocks must be on the meta device, and all other modules must have their memory. Each block
    is allocated, filled and then yielded. So the caller can quantize or shard it before the next
    one is allocated. For delta, see `load`.
    """
    names = list(frozen_parameters(llama))
    shards = open_weights(source, names)
    deltas = MappedShards(delta, names, is_hf=True) if delta else None

    def copy(name):
        parameter = llama.get_parameter(name)
        if not delta:
            copy_tensor(shards, name, parameter, llama.config)
            return
        total = torch.empty_like(parameter, dtype=torch.float32)
        copy_tensor(shards, name, total, llama.config)
        added = torch.empty_like(total)
        # The authors add a delta without permuting it, so q and k get rows that belong to other
        # channels. Adapters that they trained on such a base need the same base again.
        copy_tensor(deltas, name, added, llama.config, permute=not delta_unpermuted)
        total += added
        check_tensor(delta, name, total, dtype=parameter.dtype)
        parameter.copy_(total)

    for name in names:
        if not name.startswith("layers."):
            copy(name)
    for i, block in enumerate(llama.layers):
        allocate(block.modules(), device, dtype)
        for name in names:
            if name.startswith(f"layers.{i}."):
                copy(name)
        yield block


def save_folded(lavin: LaVIN, directory: str | Path) -> None:
    """Write the LLaMA of a LaVIN that is folded for text, in Meta's layout.

    params.json says "attention_bias": true. So a reader without support for biases rejects the
    files instead of ignoring the biases. The vocab_size in params.json may be larger than the
    tokenizer's. Raises ValueError if it is not folded for text or if it is quantized. Raises
    LavinError if a number is too large for fp16, or if the folder holds a model already.
    """
    if lavin.folded_for != 0:
        raise ValueError("fold for modality 0 first: Meta's layout has no place for the "
                         "ViT and the projector that pictures need")
    if n_quantized(lavin.llama):
        raise ValueError("quantized matrices have no place in Meta's layout")
    directory = Path(directory)
    if any(directory.glob("consolidated.*.pth")):
        raise LavinError(f"--fold {directory}: holds a model already; "
                         "choose another folder")
    params = {}
    for field in dataclasses.fields(LLaMAConfig):
        value = getattr(lavin.llama.config, field.name)
        if value is not None:
            params[field.name] = value
    state = {}
    for name, p in frozen_parameters(lavin.llama).items():      # a tied output is not listed
        p = p.detach()
        state[name] = p.to(torch.float16) if p.dtype == torch.float32 else p
        if not is_finite(state[name]):
            raise LavinError(f"--fold: {name} would hold numbers that are too large for fp16")
    tokenizers.save(lavin.tokenizer, directory)
    write_atomically(directory / "params.json",
                     lambda path: path.write_text(json.dumps(params)))
    write_atomically(directory / "consolidated.00.pth",
                     lambda path: torch.save(state, path))


# CLIP


def read_clip_state(path: str | Path) -> dict:
    """{OpenAI's name: tensor} from an archive, a state dict or a Hugging Face folder."""
    if os.path.isdir(path):
        return hf.read_clip(path)
    state = torchscript.read_tensors(path, "visual.")
    if state is None:                   # not an archive
        state = tensors_of(read_checkpoint(path), path)
    return state


def read_clip(path: str | Path) -> tuple[dict, ViTConfig]:
    """CLIP's image encoder -> ({our name: tensor}, ViTConfig). Sizes come from the tensor shapes.

    Raises LavinError if it is not a CLIP ViT.
    """
    unused = ("visual.ln_post.", "visual.proj")
    state = {}
    for name, tensor in read_clip_state(path).items():
        if name.startswith("visual.") and not name.startswith(unused):
            name = name.removeprefix("visual.").removeprefix("transformer.")
            state[name] = tensor
    try:
        width, _, patch, _ = state["conv1.weight"].shape
        n_positions, _ = state["positional_embedding"].shape
    except (KeyError, ValueError) as error:
        raise LavinError(f"{path}: not a CLIP ViT: conv1.weight or positional_embedding is "
                         "missing or has a wrong shape; take ViT-L-14.pt") from error
    side = math.isqrt(max(n_positions - 1, 0))          # in patches; the class token comes first
    blocks = {name.split(".")[1] for name in state if name.startswith("resblocks.")}
    sizes = {"width": width, "layers": len(blocks), "patch": patch, "resolution": side * patch}
    check_values(path, sizes, VIT_SIZES)
    if width % 64 or n_positions != 1 + side ** 2:
        raise LavinError(f"{path}: {n_positions} positions of width {width}; the width must be "
                         "a multiple of 64, the number of positions a square plus one")
    quick_gelu = True               # files with OpenAI's names do not say
    if os.path.isdir(path):
        quick_gelu = hf.has_quick_gelu(path)
    return state, ViTConfig(**sizes, quick_gelu=quick_gelu)


# LaVIN's adapters


def official_table(lavin: LaVIN) -> dict[str, tuple]:
    """{official name: (our parameter, an expert's number or None, is_convolution)}.

    is_convolution: in the authors' code, this is a convolution's kernel. Only this function knows
    both names. The authors call the down-projection conv_A, the experts' up-projections conv_B and
    conv_D, and the router expert_weights. (The projector's two layers are conv_A and conv_B too.)
    A checkpoint holds the tensors of this table, and no others.
    """
    table = {"adapter_modality_embedding.weight": (lavin.modality_embedding, None, False)}
    for name, p in lavin.projector.named_parameters():
        table[f"adapter_proj.{name}"] = (p, None, False)
    adapters = {}
    for i, block in enumerate(lavin.llama.layers):
        adapters[f"layers.{i}.adapter_attn"] = block.adapter
    for i, block in enumerate(lavin.vit.resblocks):
        adapters[f"backbone.visual.transformer.resblocks.{i}.adapter_attn"] = block.adapter
    for prefix, adapter in adapters.items():
        table[f"{prefix}.conv_A.weight"] = (adapter.down.weight, None, True)
        table[f"{prefix}.conv_A.bias"] = (adapter.down.bias, None, False)
        for e in range(len(adapter.up)):
            name = ("conv_B", "conv_D")[e]
            table[f"{prefix}.{name}.weight"] = (adapter.up, e, True)
            table[f"{prefix}.{name}.bias"] = (adapter.up_bias, e, False)
        for kind, p in adapter.router.named_parameters():       # none with one expert
            table[f"{prefix}.expert_weights.{kind}"] = (p, None, False)
    return table


def to_official(lavin: LaVIN, grad: bool = False) -> dict[str, torch.Tensor]:
    """{official name: trained tensor in the official shape}. They share memory with the model.

    grad: gradients instead of values; zeros where a parameter has none.
    """
    official = {}
    for name, (p, expert, is_convolution) in official_table(lavin).items():
        tensor = p.detach()
        if grad:
            tensor = torch.zeros_like(p) if p.grad is None else p.grad
        if expert is not None:
            tensor = tensor[expert]
        if is_convolution:
            tensor = tensor[..., None]      # a kernel of length 1
        official[name] = tensor
    return official


def official_checkpoint(lavin: LaVIN, format: str, bits: int = 16) -> dict:
    """{"model", "args"} as in the authors' checkpoints, with the tensors on the CPU."""
    config = lavin.adapter_config
    args = Namespace(
        adapter_type="attn",
        visual_adapter_type="router" if config.experts > 1 else "normal",
        adapter_dim=config.rank,
        adapter_scale=config.scale,
        temperature=config.tau,
        hidden_proj=config.projector_dim,
        dropout=config.dropout,
        n_prompt=lavin.n_features,
        max_seq_len=lavin.max_seq_len,
        prompt_format=format,
        bits=f"{bits}bit")
    model = {}
    for name, tensor in to_official(lavin).items():
        model[name] = tensor.cpu().clone()
    return {"model": model, "args": args}


def read_adapter(path: str | Path) -> tuple[dict, AdapterConfig, dict]:
    """A LaVIN checkpoint, released or ours -> ({official name: tensor}, AdapterConfig, settings).

    Rank and the projector's size come from the shapes. τ, scale and dropout come from `args` in the
    file, or are the defaults. The settings are the training run's: our files store all of them
    ("config"), the authors' files only the context and the prompt format.
    Raises LavinError if the file is not a LaVIN checkpoint.
    """
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise LavinError(f'{path}: not a LaVIN checkpoint: it has no "model"')
    state = {}
    for name, tensor in tensors_of(checkpoint["model"], path).items():
        check_tensor(path, name, tensor)
        state[name.removeprefix("module.")] = tensor        # DistributedDataParallel adds it
    args, remembered = read_settings(path, checkpoint)
    try:
        rank = len(state["layers.0.adapter_attn.conv_A.weight"])
        projector_dim = len(state["adapter_proj.conv_A.weight"])
    except (KeyError, TypeError) as error:                  # TypeError: len of a 0-d tensor
        raise LavinError(f"{path}: not a LaVIN checkpoint: conv_A.weight of its first adapter or "
                         "of its projector is missing or is a single number") from error
    check_values(path, {"rank": rank, "projector_dim": projector_dim}, ADAPTER_SIZES)
    if rank % 2:
        raise LavinError(f"{path}: rank {rank} is odd, but an expert splits it into two groups")
    config = AdapterConfig(
        rank=rank,
        projector_dim=projector_dim,
        tau=float(args.get("temperature", AdapterConfig.tau)),
        scale=float(args.get("adapter_scale", AdapterConfig.scale)),
        dropout=float(args.get("dropout", AdapterConfig.dropout)),
        experts=2 if "layers.0.adapter_attn.conv_D.weight" in state else 1)
    settings = {
        "max_seq_len": args.get("max_seq_len"),
        "format": args.get("prompt_format"),
        "step": checkpoint.get("step"),
        "epoch": checkpoint.get("epoch")}
    return state, config, settings | remembered


def read_settings(path: str | Path, checkpoint: dict) -> tuple[dict, dict]:
    """A checkpoint's (args, config), with checked values. The released files have no config."""
    args = checkpoint.get("args")
    if args is None:
        args = Namespace()
    config = checkpoint.get("config", {})
    if not isinstance(args, Namespace) or not isinstance(config, dict):
        raise LavinError(f"{path}: not a LaVIN checkpoint: its args must be a Namespace, "
                         "its config a dictionary")
    config = dict(config)
    if isinstance(config.get("data"), str):         # older checkpoints have one source
        config["data"] = [config["data"]]
    check_values(path, vars(args), ADAPTER_ARGS)
    check_values(path, checkpoint, PROGRESS)
    check_values(path, config, SETTINGS)
    known = {name: value for name, value in config.items() if name in SETTINGS}
    return vars(args), known


# The whole model


def check_not_folded(llama: str | Path, config: LLaMAConfig) -> None:
    """Raises LavinError if this LLaMA already has adapters folded into it."""
    if config.folded:
        raise LavinError(f"{llama}: adapters are folded into it already; take the LLaMA "
                         "that they were trained with, or --adapter none")


def memory(device: torch.device) -> int:
    """The bytes of memory of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def weights_size(lavin: LaVIN, dtype: torch.dtype, bits: int, n_parts: int) -> int:
    """Bytes of the weights on one device: only 1/n_parts of LLaMA's matrices.

    These have 8 or 4 bits per number, or with bits=16 the same dtype as the other frozen weights.
    """
    size = 0
    for name, p in lavin.named_parameters():
        n_bytes = p.numel() * (4 if p.requires_grad else dtype.itemsize)
        if name.startswith("llama.layers.") and p.dim() == 2 and not p.requires_grad:
            if bits < 16:
                n_bytes = p.numel() * bits // 8
            n_bytes //= n_parts
        size += n_bytes
    return size


def check_fits(lavin: LaVIN, device: torch.device, dtype: torch.dtype, bits: int,
               n_parts: int) -> None:
    """Raises LavinError if the weights alone are larger than the device's memory."""
    available = memory(device)
    needed = weights_size(lavin, dtype, bits, n_parts)
    if needed <= available:
        return
    advice = ""
    for fewer in (8, 4):
        smaller = weights_size(lavin, dtype, fewer, n_parts)
        if fewer < bits and smaller <= available and n_parts == 1:  # no --bits with --fsdp
            advice = f"; with --bits {fewer} they take {smaller / 1e9:.3g} GB"
            break
    raise LavinError(f"the weights of this model take {needed / 1e9:.3g} GB, but {device} "
                     f"has {available / 1e9:.3g} GB{advice}")


def modules_outside_blocks(lavin: LaVIN) -> list[nn.Module]:
    """All modules except those in LLaMA's blocks. They get their memory first."""
    return [module for name, module in lavin.named_modules()
            if not name.startswith("llama.layers.")]


def check_context(max_seq_len: int, tokenizer: data.Tokenizer,
                  vit_config: ViTConfig) -> None:
    """Raises LavinError if a picture alone fills the context."""
    n_prefix = 2 + len(data.picture_prefix(tokenizer))      # modality token and BOS come first
    n_picture = n_prefix + vit_config.n_features
    if max_seq_len <= n_picture:
        raise LavinError(f"--max-seq-len {max_seq_len} has no room for text: "
                         f"a picture takes {n_picture} tokens")


def begin_with(adapter: str | Path | None, fresh: AdapterConfig | None,
               dropout: float | None) -> tuple[dict, AdapterConfig, dict]:
    """The result of `read_adapter`, or the same for fresh adapters. dropout overrides it."""
    state = {}
    config = fresh or AdapterConfig()
    settings = {}
    if adapter:
        state, config, settings = read_adapter(adapter)
    if dropout is not None:
        config = dataclasses.replace(config, dropout=dropout)
    return state, config, settings


def load(llama: str | Path, vit: str | Path, adapter: str | Path | None = None, *,
         device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32,
         max_seq_len: int | None = None, fresh: AdapterConfig | None = None,
         dropout: float | None = None, bits: int = 16, fsdp: bool = False,
         delta: str | Path | None = None, delta_unpermuted: bool = False) -> LaVIN:
    """LLaMA's folder or GGUF file, CLIP's file and a LaVIN checkpoint or None -> LaVIN.

    The model is in eval mode. Frozen weights have `dtype`, trained ones fp32. If None, max_seq_len
    and dropout come from the checkpoint; without one, they are 512 and that of `fresh`. fresh
    configures the adapters if there is no checkpoint (default: AdapterConfig()). bits 8 or 4
    quantizes LLaMA, and fsdp shards it over the ranks, block by block while it is read. delta: a
    Hugging Face folder whose weights are added to LLaMA's. delta_unpermuted: like the authors'
    code, add its rows of wq and wk in their own order, not in Meta's. Raises LavinError for files
    that are damaged or do not fit, ValueError for other bits or for bits with fsdp.
    """
    if bits not in (16, 8, 4) or (fsdp and bits < 16):
        raise ValueError(f"bits={bits}, fsdp={fsdp}: bits is 16, 8 or 4, and with fsdp 16")
    state, config, settings = begin_with(adapter, fresh, dropout)
    max_seq_len = max_seq_len or settings.get("max_seq_len") or 512
    source = open_llama(llama)
    tokenizer = load_tokenizer(source)
    vit_state, vit_config = read_clip(vit)
    llama_config = read_params(source, tokenizer.vocab_size())
    check_context(max_seq_len, tokenizer, vit_config)
    if adapter:
        check_not_folded(llama, llama_config)

    device = torch.device(device)
    with torch.device("meta"):                      # no memory yet: `allocate` gives it
        lavin = LaVIN(llama_config, vit_config, config, tokenizer, max_seq_len)
    check_fits(lavin, device, dtype, bits, ranks.count() if fsdp else 1)
    allocate(modules_outside_blocks(lavin), device, dtype)
    fill(frozen_parameters(lavin.vit), vit_state, vit)
    del vit_state                                   # saves 0.6 GB while LLaMA is read
    for block in load_llama(lavin.llama, source, device, dtype, delta, delta_unpermuted):
        if bits < 16:
            quantize(block, bits)
        if fsdp:
            ranks.shard(block, device)
    lavin.is_sharded = fsdp
    lavin.init_trained()
    if adapter:
        fill(to_official(lavin), state, adapter)    # views: filling them fills the model
    return lavin.eval()


# python checkpoints.py FILE


PARTS = {"layers": "LLaMA", "backbone": "ViT", "adapter_proj": "projector",
         "adapter_modality_embedding": "modality embedding"}
SHOWN = ("step", "epoch", "data", "format", "epochs", "batch_size", "lr", "max_seq_len",
         "seed", "bits", "adapters", "routing")


def describe(path: str | Path) -> dict:
    """Print what is in a checkpoint -> its settings."""
    state, config, settings = read_adapter(path)
    counts = Counter()
    widths = {}
    for name, tensor in state.items():
        part = PARTS.get(name.split(".")[0], name.split(".")[0])
        counts[part] += tensor.numel()
        if name.endswith("adapter_attn.conv_A.weight"):
            widths.setdefault(part, []).append(tensor.numel() // config.rank)
    total = sum(counts.values())
    shown = " · ".join(f"{part} {count:,}" for part, count in counts.items())
    print(f"{path}: {total:,} trained parameters: {shown}")
    blocks = [f"{part} of {len(w)} blocks, {w[0]} wide" for part, w in widths.items()]
    print(" · ".join(blocks))
    print(f"rank {config.rank} · projector's hidden size {config.projector_dim} · "
          f"τ {config.tau:g} · scale {config.scale:g} · dropout {config.dropout:g} · "
          f"experts {config.experts}")
    known = []
    for name in SHOWN:
        value = settings.get(name)
        if isinstance(value, list):
            value = " ".join(value)
        if value is not None:
            known.append(f"{name} {value}")
    print(" · ".join(known))
    return settings


def print_routing(lavin: LaVIN) -> None:
    """Print the weights of each layer's experts."""
    if lavin.adapter_config.experts == 1:
        print("routing  none: the adapters have a single expert")
        return
    for i, (text, picture) in enumerate(lavin.route().tolist(), 1):
        print(f"layer {i:3}   text {text[0]:.3f} {text[1]:.3f}"
              f"   picture {picture[0]:.3f} {picture[1]:.3f}")


def flag_parser() -> Parser:
    parser = Parser(description="Describe a LaVIN checkpoint.")
    parser.add_argument("file", help="the checkpoint, ours or released")
    parser.add_argument("--llama", help="its LLaMA, needed to print the routing "
                        "weights (default: the one it was trained with)")
    parser.add_argument("--vit", help="its CLIP (default: the one it was trained with)")
    parser.add_argument("--delta", help="the Hugging Face folder of weights to add to LLaMA's "
                        "(default: the one it was trained with)")
    parser.add_argument("--fold", metavar="DIR", help="write LLaMA with the adapters "
                        "merged into it, for text only: Meta's layout, fp16, biases for "
                        "wq, wk and wv")
    return parser


def main() -> None:
    """Describe a checkpoint. If its LLaMA is found, also print the routing, and fold if asked."""
    args = flag_parser().parse_args()
    settings = describe(args.file)
    llama = args.llama or settings.get("llama")
    vit = args.vit or settings.get("vit")
    delta = args.delta or settings.get("delta")
    for given in (args.llama, args.vit, args.delta):
        if given and not os.path.exists(given):
            raise LavinError(f"{given}: no such file or folder")
    ways = "--llama DIR --vit FILE"
    if delta:
        ways += " --delta DIR"
    needed = [llama, vit, delta] if delta else [llama, vit]
    known = all(path and os.path.exists(path) for path in needed)
    if not known and args.fold:
        raise LavinError(f"--fold needs the LLaMA that the adapters belong to: {ways}")
    if not known:
        print(f"routing  depends on LLaMA too; to print it, add {ways}")
        return

    if args.fold:
        check_writable(Path(args.fold, "params.json"), "--fold")
    lavin = load(llama, vit, args.file, delta=delta,
                 delta_unpermuted=settings.get("delta_unpermuted", False))
    print_routing(lavin)
    if args.fold:
        save_folded(fold(lavin, 0), args.fold)
        print(f"written: {args.fold}; ask it with python generate.py "
              f"--llama {args.fold} --vit {vit} --adapter none --prompt …")


if __name__ == "__main__":
    run(main)
