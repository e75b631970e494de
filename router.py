"""The router computes the weights of the two experts in each adapter.

The paper's routing (section 3.2): w = softmax((y W + b) / τ). In LLaMA, y is the modality token's
normalized hidden state at the layer. The token is one of two learned embeddings: "text only" or
"text and a picture". The paper puts it in front of the sequence. (The ViT has no such token: there,
each token of a picture is routed by its own y. See vit.py: Block.)

The token attends only to itself, and no other token sees it. So its hidden state at every layer
depends only on the modality. Here the token is never put into a sequence. Instead, the two possible
tokens go through the layers once, as two sequences of length 1. Each sample then looks up its
weights by its modality. The real sequence needs no extra token and no custom mask. (In this pass,
each adapter draws one dropout mask per modality, which all samples of a step share. In the authors'
code each sample has its own. With several GPUs, each GPU draws its own.)
"""

import torch
import torch.nn as nn


class Router(nn.Linear):
    """w = softmax((y W + b) / τ): (..., C) -> (..., 2), the weights of the two experts, fp32.

    τ is a temperature. The larger it is, the closer both weights stay to one half. The product is
    in autocast's dtype; the division and the softmax over the two experts are in fp32.
    """

    def __init__(self, width: int, tau: float):
        super().__init__(width, 2)
        self.tau = tau

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y (..., C), normalized -> w (..., 2), whose sum is 1."""
        logits = super().forward(y).float()
        return torch.softmax(logits / self.tau, dim=-1)


class NoRouter(nn.Module):
    """Replaces the router if there is a single expert: (..., C) -> (..., 1), a weight of 1.

    The adapter is then a plain one, as in the paper's ablations. (--no-routing is something else:
    it keeps both experts and freezes their weights at one half.)
    """

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return torch.ones(*y.shape[:-1], 1, device=y.device)


def route(llama: nn.Module, modality_embedding: torch.Tensor) -> torch.Tensor:
    """The routing weights of all layers for both modalities: (L, 2 modalities, E experts), fp32.

    E is 2, or 1 in the ablation with a single expert. (Read this after model.py.)

    `modality_embedding` (2, C) holds the two tokens. They go through the blocks as two rows of one
    token each, so each attends only to itself. Training needs the gradient through this
    whole pass: a layer's routing weights depend on its router, the modality embedding, and the
    adapters and routers of all earlier layers.
    """
    x = modality_embedding[:, None]                                 # (2, 1, C)
    rope = llama.rope(torch.zeros(1, device=x.device))              # position 0: no rotation
    routed = []
    for layer in llama.layers:
        w = layer.adapter.router(layer.attention_norm(x))           # (2, 1, E)
        x = layer(x, w, rope)
        routed.append(w[:, 0])
    return torch.stack(routed)                                      # (L, 2, E)
