"""The router: the modality token, and the weights by which every adapter mixes its two experts.

The paper's routing: w = softmax((y W + b) / τ), where y is the modality token at that layer. The token is one
of two learned embeddings (text only, text + picture) put in front of the sequence. It sees only itself and no
other token sees it, so what it becomes, layer by layer, depends on nothing but the modality: the two tokens go
through the layers once, as two sequences of length 1, and the weights of a sample are looked up by its modality.
The real sequence then needs no extra token and no custom mask. (Under dropout all samples of a step share one
draw of this stream; in the reference each has its own.)
"""

import torch
import torch.nn as nn


class Router(nn.Linear):
    """w = softmax((y W + b) / τ): (..., C) -> (..., 2), the experts' weights in fp32."""

    def __init__(self, width, tau):
        super().__init__(width, 2)
        self.tau = tau

    def forward(self, y):
        return torch.softmax(super().forward(y).float() / self.tau, dim=-1)


def route(llama, modality_embedding):
    """The routing weights of all layers, for both modalities: (L, 2 modalities, 2 experts), fp32.

    `modality_embedding` (2, C) are the two tokens. A lone token attends to itself alone, so the ordinary
    block with T = 1 is all it takes. Training needs the gradient through the whole stream: a later layer's
    router trains the embedding and the adapters of every layer before it.
    """
    x, weights = modality_embedding[:, None], []                    # (2, 1, C)
    rope = llama.rope(torch.zeros(1, device=x.device))
    for layer in llama.layers:
        w = layer.adapter.router(layer.attention_norm(x))           # (2, 1, 2)
        x = layer(x, w, rope)
        weights.append(w[:, 0])
    return torch.stack(weights)                                     # (L, 2, 2)
