"""CLIP's image encoder with adapters.

Parameters have the names of OpenAI's file (ViT-L-14.pt), without its prefixes `visual.` and
`transformer.`.

The picture's features are the class token after every fourth block. ViT-L/14 has 24 blocks, 1024
wide, so it gives 6 features. The patches reach LLaMA only through the class token, which attends to
all of them in every block. LaVIN does not use CLIP's `ln_post`, `proj` or text tower.
Shapes: B pictures, T tokens (class token and patches), C width (called V in the other files).
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from adapters import Adapter, AdapterConfig
from fast.ops import attention

BLOCKS_PER_FEATURE = 4      # the class token is taken after every fourth block


@dataclass
class ViTConfig:
    """The defaults are ViT-L/14's."""
    width: int = 1024
    layers: int = 24
    patch: int = 14         # pixels
    resolution: int = 224   # pixels
    quick_gelu: bool = True # OpenAI's encoders use it; most others use the standard GELU

    @property
    def n_features(self) -> int:
        """The number of features per picture, each a token of LLaMA: 6 for ViT-L/14.

        To take the class token more often, change BLOCKS_PER_FEATURE. No tensor changes its shape,
        so released adapters still load, but they were trained on other features.
        """
        return self.layers // BLOCKS_PER_FEATURE


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm, computed in fp32 as in CLIP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the dtype of x."""
        weight = self.weight.float()
        bias = self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias).type_as(x)


class Attention(nn.Module):
    """Self-attention over all tokens. Every head is 64 wide.

    CLIP uses nn.MultiheadAttention, so the parameters have its names.
    """

    def __init__(self, width):
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C). There is no mask: every patch sees the whole picture."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)   # (B, T, 3C)
        qkv = qkv.unflatten(-1, (3, -1, 64))                        # (B, T, 3, H, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (B, H, T, 64) each
        y = attention(q, k, v)                                      # (B, H, T, 64)
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
            x = F.silu(1.702 * x) / 1.702       # CLIP's QuickGELU: x · sigmoid(1.702 x)
        else:
            x = F.gelu(x)
        return self.c_proj(x)


class Block(nn.Module):
    """CLIP's residual block with an adapter before the attention.

    A picture has no modality token. Instead, each token's w comes from its own y. (The authors'
    code uses the w of the batch's first picture for all pictures, so a picture's features depend on
    the rest of the batch. We do not copy this bug.)
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
        self.checkpointing = False      # recompute activations in backward to save memory

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels (B, 3, R, R), normalized -> (B, F, C): the class token after every 4th block."""
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
            if (i + 1) % BLOCKS_PER_FEATURE == 0:
                features.append(x[:, 0])
        return torch.stack(features, dim=1)                         # (B, F, C)
