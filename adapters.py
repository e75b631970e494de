"""The trained modules: the adapter in front of every attention, and the projector.

The paper's Mixture-of-Modality Adapter (section 3.2) is a bottleneck without a non-linearity:

    A(y; w) = y + s (w0 up0(h) + w1 up1(h))        h = dropout(down(y))

`down` maps C channels to r = 8. The two experts, up0 and up1, map these back to C. The router gives
their weights, w0 + w1 = 1. s is a fixed scale, 1 in all released models.

For a fixed w, the adapter is a linear map plus a bias. A single expert with the parameters of
w0 up0 + w1 up1 would compute the same. There are two experts so that w, which varies with the
modality, can make the adapter act differently on text and on pictures. For one modality,
fast/fold.py can merge LLaMA's adapters into wq, wk and wv: each changes by a matrix of rank r. In
the ViT every token has its own w, so its adapters cannot be merged.
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.ops import add_experts
from router import NoRouter, Router


@dataclass
class AdapterConfig:
    rank: int = 8
    projector_dim: int = 128    # hidden size of the projector
    tau: float = 10.0           # temperature of the routers: 10 for 7B, 5 for 13B
    scale: float = 1.0          # s
    dropout: float = 0.1        # on h; there is no other dropout in the model
    experts: int = 2            # 1: a plain adapter without a router, an ablation. 3 would also
                                # need a wider Router, and names in checkpoints.official_table


class Adapter(nn.Module):
    """A(y; w), and the router that belongs to it.

    The caller runs the router and passes w in. In the ViT the caller is the block. In LLaMA,
    `router.route` computes w for all layers first, and LLaMA.forward passes each block its own w.

    C r + r parameters are in `down`, C r + 2 C in the experts, and 2 C + 2 in the router: 81,930
    for each of 7B's 32 layers.
    """

    def __init__(self, width: int, config: AdapterConfig):
        super().__init__()
        self.scale = config.scale
        self.down = nn.Linear(width, config.rank)
        self.dropout = nn.Dropout(config.dropout)
        # One tensor holds all E = 2 experts. In the authors' code each is a convolution of length 1
        # with two groups: the first half of its outputs reads the first half of h, the second half
        # reads the second. (So r must be even.) Released checkpoints call `down` conv_A, the first
        # expert conv_B and the second conv_D.
        n = config.experts
        self.up = nn.Parameter(torch.empty(n, width, config.rank // 2))     # (E, C, r/2)
        self.up_bias = nn.Parameter(torch.empty(n, width))                  # (E, C)
        self.router = Router(width, config.tau) if n > 1 else NoRouter()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both experts start at zero, so a fresh adapter is the identity.

        While the experts are zero, only they and the projector get a gradient. `down`, the router
        and the modality tokens follow once the experts have changed.
        """
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up)
        nn.init.zeros_(self.up_bias)
        if isinstance(self.router, Router):
            self.router.reset_parameters()

    def forward(self, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """y (B, T, C); w (B, T, E), or (B, 1, E) for one w per row -> (B, T, C)."""
        h = self.dropout(self.down(y))                              # (B, T, r)
        # y + self.scale * self.mixed(h, w), but faster
        return add_experts(y, self.scale, h, w, self.up, self.up_bias)

    def mixed(self, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """w0 up0(h) + w1 up1(h), as the paper writes it: h (B, T, r) -> (B, T, C)."""
        total = 0
        for e in range(len(self.up)):
            total = total + w[..., e:e + 1] * self.expert(e, h)     # w_e: (B, T or 1, 1)
        return total

    def expert(self, e: int, h: torch.Tensor) -> torch.Tensor:
        """up_e(h): one matrix product for each of the two groups."""
        first, second = h.chunk(2, dim=-1)                          # (B, T, r/2) each
        up_first, up_second = self.up[e].chunk(2)                   # (C/2, r/2) each
        grouped = torch.cat([first @ up_first.T, second @ up_second.T], dim=-1)
        return grouped + self.up_bias[e]


class Projector(nn.Module):
    """The ViT's features (width V) -> LLaMA's tokens: Linear(V -> 128), SiLU, Linear(128 -> C).

    It has 128 V + 128 + 128 C + C parameters: 659,584 for ViT-L/14 and 7B.
    """

    def __init__(self, vit_width: int, projector_dim: int, width: int):
        super().__init__()
        # conv_A and conv_B are the authors' names, for what are Linear layers in their code too.
        self.conv_A = nn.Linear(vit_width, projector_dim)
        self.conv_B = nn.Linear(projector_dim, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights and zero biases, as in the authors' code."""
        for linear in (self.conv_A, self.conv_B):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """N pictures of F features each: (N, F, V) -> (N, F, C)."""
        return self.conv_B(F.silu(self.conv_A(features)))
