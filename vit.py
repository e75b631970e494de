"""CLIP's image encoder with adapters, from OpenAI's archive (https://github.com/openai/CLIP, ViT-L-14.pt).

LaVIN takes the class token after every fourth block as the picture's features, and has no use for `ln_post`,
`proj` and the text tower, which are dropped.
Shapes: B pictures, T tokens (class token + patches), C width, V in the rest of the project.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import hf
from adapters import Adapter
from files import LavinError, read_checkpoint, tensors_of


@dataclass
class ViTConfig:
    width: int = 1024
    layers: int = 24
    patch: int = 14         # pixels
    resolution: int = 224   # pixels

    @property
    def n_features(self):
        return self.layers // 4


class LayerNorm(nn.LayerNorm):
    """In fp32, as in CLIP."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float()).type_as(x)


class Attention(nn.Module):
    """Self-attention over all tokens; heads are 64 wide. Names as in nn.MultiheadAttention, which CLIP uses."""

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)       # (B, T, 3C)
        q, k, v = qkv.unflatten(-1, (3, -1, 64)).permute(2, 0, 3, 1, 4)     # 3 × (B, H, T, 64)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))              # (B, T, C)


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))                # QuickGELU


class Block(nn.Module):
    """CLIP's residual block with an adapter in front of the attention.

    There is no modality token here: every token routes itself. So w differs from token to token, and the adapter cannot
    be folded into `attn` as LLaMA's are (adapters.fold), which takes one w for all.
    """

    def __init__(self, width, adapter):
        super().__init__()
        self.adapter = Adapter(width, adapter)
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        y = self.ln_1(x)                                                # (B, T, C), as x
        x = x + self.attn(self.adapter(y, self.adapter.router(y)))
        x = x + self.mlp(self.ln_2(x))
        return x


class VisionTransformer(nn.Module):
    def __init__(self, config, adapter):
        super().__init__()
        C = config.width
        self.conv1 = nn.Conv2d(3, C, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.positional_embedding = nn.Parameter(torch.empty((config.resolution // config.patch) ** 2 + 1, C))
        self.ln_pre = LayerNorm(C)
        self.resblocks = nn.ModuleList(Block(C, adapter) for _ in range(config.layers))
        self.checkpointing = False

    def forward(self, pixels):
        """pixels (B, 3, R, R), normalised -> (B, F, C): the class token after every fourth block."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2)               # (B, patches, C)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)   # (B, T, C)
        x = self.ln_pre(x + self.positional_embedding)
        features = []
        for i, block in enumerate(self.resblocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i % 4 == 3:
                features.append(x[:, 0])
        return torch.stack(features, dim=1)


def read(path):
    """OpenAI's TorchScript archive, a plain state dict of the same names, or a folder of Hugging Face's -> ({our name:
    tensor}, ViTConfig).

    Every size comes from the tensors. Raises LavinError if it is not a CLIP ViT.
    """
    try:
        scripted = hostile = False
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                scripted = any("/code/" in name for name in archive.namelist())
                # TorchScript's reader runs code in one case, a class that restores itself. It takes /CODE/ for
                # /code/ and one of two entries of the same name, so every entry is searched.
                hostile = scripted and any(b"__setstate__" in archive.read(entry) for entry in archive.infolist())
        if hostile:
            raise LavinError(f"{path}: would run code when read, which no CLIP archive does; not loaded")
        if Path(path).is_dir():
            state = hf.read_clip(path)
        else:
            state = torch.jit.load(path, map_location="cpu").state_dict() if scripted else read_checkpoint(path)
    except LavinError:
        raise
    except Exception as error:      # damaged bytes make the readers raise anything
        raise LavinError(f"{path}: not a readable CLIP archive; truncated? fetch it again") from error
    unused = ("visual.ln_post.", "visual.proj")
    state = {name.removeprefix("visual.").removeprefix("transformer."): tensor
             for name, tensor in tensors_of(state, path).items()
             if name.startswith("visual.") and not name.startswith(unused)}
    try:
        width, _, patch, _ = state["conv1.weight"].shape
        side = round((len(state["positional_embedding"]) - 1) ** 0.5)
    except (KeyError, TypeError, ValueError) as error:
        raise LavinError(f"{path}: not a CLIP ViT ({error!r}); take ViT-L-14.pt") from error
    layers = len({name.split(".")[1] for name in state if name.startswith("resblocks.")})
    if layers < 4 or width % 64:
        raise LavinError(f"{path}: {layers} blocks of width {width}; features need 4 blocks and heads a multiple of 64")
    return state, ViTConfig(width, layers, patch, side * patch)

