"""CLIP's image encoder with adapters, under the names of OpenAI's archive (ViT-L-14.pt).

LaVIN takes the class token after every fourth block as the picture's features: 6 of them for
ViT-L/14, whose 24 blocks are 1024 wide. It has no use for CLIP's `ln_post`, `proj` and text tower.
Shapes: B pictures, T tokens (class token and patches), C width (called V in the other files).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adapters import Adapter, AdapterConfig


@dataclass
class ViTConfig:
    """The defaults are ViT-L/14's."""
    width: int = 1024
    layers: int = 24
    patch: int = 14         # pixels
    resolution: int = 224   # pixels
    quick_gelu: bool = True # OpenAI's encoders; most that others trained have the usual GELU

    @property
    def n_features(self) -> int:
        """How many tokens a picture becomes: 6 for ViT-L/14."""
        return self.layers // 4


class LayerNorm(nn.LayerNorm):
    """In fp32, as in CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the dtype of x."""
        weight = self.weight.float()
        bias = self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias).type_as(x)


class Attention(nn.Module):
    """Self-attention over all tokens; every head is 64 wide.

    The names are those of nn.MultiheadAttention, which CLIP uses.
    """

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). Without a mask: every patch sees the whole picture."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)   # (B, T, 3C)
        qkv = qkv.unflatten(-1, (3, -1, 64))                        # (B, T, 3, H, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, T, 64) each
        y = F.scaled_dot_product_attention(q, k, v)                 # (B, H, T, 64)
        return self.out_proj(y.transpose(1, 2).flatten(2))          # (B, T, C)


class MLP(nn.Module):
    def __init__(self, width, quick_gelu):
        super().__init__()
        self.quick_gelu = quick_gelu
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)
        if self.quick_gelu:
            x = F.silu(1.702 * x) / 1.702       # QuickGELU, x · sigmoid(1.702 x), CLIP's own
        else:
            x = F.gelu(x)
        return self.c_proj(x)


class Block(nn.Module):
    """CLIP's residual block with an adapter in front of the attention.

    There is no modality token in a picture, so every token routes itself: w differs from token to
    token. (The authors' code takes w from the first picture of the batch for all pictures. A
    picture's features then depend on its neighbours, which is a bug that we do not copy.)
    """

    def __init__(self, width, quick_gelu, adapter_config):
        super().__init__()
        self.adapter = Adapter(width, adapter_config)
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, quick_gelu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        y = self.ln_1(x)                                            # (B, T, C)
        w = self.adapter.router(y)                                  # (B, T, E)
        x = x + self.attn(self.adapter(y, w))
        x = x + self.mlp(self.ln_2(x))
        return x


class VisionTransformer(nn.Module):
    def __init__(self, config: ViTConfig, adapter_config: AdapterConfig):
        super().__init__()
        C = config.width
        n_patches = (config.resolution // config.patch) ** 2
        self.conv1 = nn.Conv2d(3, C, config.patch, stride=config.patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(C))
        self.positional_embedding = nn.Parameter(torch.empty(n_patches + 1, C))
        self.ln_pre = LayerNorm(C)
        self.resblocks = nn.ModuleList(
            Block(C, config.quick_gelu, adapter_config) for _ in range(config.layers))
        self.checkpointing = False      # recompute activations in backward, to save memory

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, R, R), normalised -> (B, F, C): the class token after every 4th block."""
        x = self.conv1(pixels)                                      # (B, C, R/patch, R/patch)
        x = x.flatten(2).transpose(1, 2)                            # (B, patches, C)
        class_token = self.class_embedding.expand(len(x), 1, -1)    # (B, 1, C)
        x = torch.cat([class_token, x], dim=1)                      # (B, T, C)
        x = self.ln_pre(x + self.positional_embedding)
        features = []
        for i, block in enumerate(self.resblocks):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i % 4 == 3:
                features.append(x[:, 0])
        return torch.stack(features, dim=1)                         # (B, F, C)
