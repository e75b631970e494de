"""The router: the modality token, and the weights by which every adapter mixes its two experts.

The paper's routing (section 3.2): w = softmax((y W + b) / τ), where y is the modality token at
that layer. The token is one of two learned embeddings, "text only" and "text and a picture", put in
front of the sequence.

The token sees only itself, and no other token sees it. So what it becomes, layer by layer, depends
on nothing but the modality. That saves the token from ever being put into a sequence: the two
possible tokens go through the layers once, as two sequences of length 1, and a sample looks its
weights up by its modality. The real sequence needs no extra token and no custom mask.
(Under dropout all samples of a step share one draw of this stream. In the authors' code each sample
has its own.)
"""

import torch
import torch.nn as nn


class Router(nn.Linear):
    """w = softmax((y W + b) / τ): (..., C) -> (..., 2), the weights of the two experts, fp32.

    τ is a temperature. The larger it is, the closer both weights stay to one half.
    """

    def __init__(self, width: int, tau: float):
        super().__init__(width, 2)
        self.tau = tau

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """y (..., C), normed -> w (..., 2), which sum to 1."""
        logits = super().forward(y).float()
        return torch.softmax(logits / self.tau, dim=-1)


class NoRouter(nn.Module):
    """In the place of a router where there is a single expert: (..., C) -> (..., 1), its weight 1.

    A plain adapter, for the paper's ablations.
    """

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return torch.ones(*y.shape[:-1], 1, device=y.device)


def route(llama: nn.Module, modality_embedding: torch.Tensor) -> torch.Tensor:
    """The routing weights of all layers for both modalities: (L, 2 modalities, E experts), fp32.

    E is 2, but in the ablation with a single expert.

    `modality_embedding` (2, C) holds the two tokens. They go through the blocks of model.py as two
    rows of one token each, and a lone token attends to itself alone. Training needs the gradient
    through the whole stream: the router of a layer trains the embedding and the adapters of every
    layer before it.
    """
    x = modality_embedding[:, None]                                 # (2, 1, C)
    rope = llama.rope(torch.zeros(1, device=x.device))              # position 0: no rotation
    routed = []
    for layer in llama.layers:
        w = layer.adapter.router(layer.attention_norm(x))           # (2, 1, E)
        x = layer(x, w, rope)
        routed.append(w[:, 0])
    return torch.stack(routed)                                      # (L, 2, E)
