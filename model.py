"""LLaMA in Meta's layout, and LaVIN: LLaMA and CLIP's ViT joined by Mixture-of-Modality Adaptation.

Read it from top to bottom: norm, RoPE, attention, feed-forward, block, LLaMA, LaVIN.
Modules are named as in Meta's checkpoints, so a parameter has the same name here and in the file.

Shapes: B rows, T tokens, C width, H heads, K key/value heads, D width of a head, L layers;
N pictures of R × R pixels, F features of V channels each; E experts, 2. A training batch has no
padding: its samples are concatenated into one row. So B is 1 in the layers, and T counts all
samples' tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
from adapters import Adapter, AdapterConfig, Projector
from fast.ops import attend_in_groups, cross_entropy, is_on_cpu, multiply_complex
from files import LavinError
from router import route
from vit import ViTConfig, VisionTransformer


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · weight. All but the last product is in fp32: x² overflows fp16."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., C), in the dtype of x."""
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rope_frequencies(config: "LLaMAConfig", device: torch.device | None = None) -> torch.Tensor:
    """RoPE's frequencies (D/2,), fp32: pair i of a head's channels turns by 1 / θ^(2i/D) from one
    position to the next.

    LLaMA 3.1 handles longer texts than it was pre-trained on by lowering the low frequencies. What
    counts is how many turns a pair makes over the pre-training context (`rope_context`). With
    `rope_high` turns or more, a pair keeps its frequency. With `rope_low` turns or fewer, its
    frequency is divided by `rope_factor`. In between, it is a weighted mean of these two values.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1 / config.rope_theta ** exponents                # (D/2,)
    if config.rope_factor == 1:
        return frequencies
    turns = config.rope_context * frequencies / (2 * math.pi)
    kept = (turns - config.rope_low) / (config.rope_high - config.rope_low)
    kept = kept.clamp(0, 1)                                         # 1: frequency kept
    return kept * frequencies + (1 - kept) * frequencies / config.rope_factor


def rope_angles(positions: torch.Tensor,
                frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RoPE: at position p, pair i of a head's channels is rotated by the angle p · frequency i.

    positions (..., T), frequencies (D/2,) -> cosines and sines (..., T, 1, D/2), fp32.

    `rotate` does this to queries and keys, so positions enter their dot product only as a
    distance. Therefore a sequence without its modality token may still start at position 0.
    """
    angles = positions[..., None].float() * frequencies             # (..., T, D/2)
    angles = angles.unsqueeze(-2)                                   # one for all heads
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE: rotate each pair of neighbouring channels (a, b) of x by its angle, in fp32.

    x (B, T, H, D) -> the same shape and dtype; rope: cosines and sines, (T, 1, D/2) for all rows
    or (B, T, 1, D/2). Meta's checkpoints pair channels 2i and 2i + 1; Hugging Face's pair i and
    i + D/2.
    """
    cos, sin = rope
    pairs = x.float().unflatten(-1, (-1, 2))                        # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():
        a, b = pairs.unbind(-1)                                     # (B, T, H, D/2) each
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:
        turned = multiply_complex(pairs, cos, sin)                  # the same, faster
    return turned.flatten(-2).type_as(x)                            # (B, T, H, D)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           lengths: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention: q (B, H, T, D), k and v (B, K, T, D) -> (B, H, T, D).

    Without `lengths`, every row is a sequence. With lengths (samples,), int64 on the CPU, a single
    row holds all samples, one after the other. Attention never crosses their boundaries.
    """
    if lengths is None:
        grouped = q.shape[1] != k.shape[1]  # several query heads share a key head, as in LLaMA 3
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=grouped)
    if is_on_cpu(q):
        return attend_in_groups(q, k, v, lengths)       # attend_to_each in fewer calls
    return attend_to_each(q, k, v, lengths)


# torch.compile would unroll the loop and compile anew for every number of samples.
@torch._disable_dynamo
def attend_to_each(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                   lengths: torch.Tensor) -> torch.Tensor:
    """`attend` with lengths: causal attention within each sample of a row, one call per sample."""
    sizes = lengths.tolist()
    outputs = []
    for q_i, k_i, v_i in zip(q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2)):
        outputs.append(attend(q_i, k_i, v_i))                       # (1, H, length, D)
    return torch.cat(outputs, dim=2)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        q_dim = config.n_heads * config.head_dim
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, q_dim, bias=config.attention_bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=config.attention_bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=False)

    def forward(self, x: torch.Tensor, rope: tuple, lengths: torch.Tensor | None = None,
                cache: object | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). A cache holds this layer's keys and values of earlier tokens.

        rope: cosines and sines, as rope_angles gives them. Training and LaVIN.generate pass no
        cache. fast/engine.py has two kinds: PromptCache stores the keys and values of whole
        prompts, StepCache appends those of one token to each sequence.
        """
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))           # (B, T, H, D)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))           # (B, T, K, D)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))           # (B, T, K, D)
        q = rotate(q, rope).transpose(1, 2)                         # (B, H, T, D)
        k = rotate(k, rope).transpose(1, 2)                         # (B, K, T, D)
        v = v.transpose(1, 2)                                       # (B, K, T, D)
        if cache is None:
            y = attend(q, k, v, lengths)
        else:
            y = cache.attend(q, k, v)
        return self.wo(y.transpose(1, 2).flatten(2))                # (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x)."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """LLaMA's block, with the adapter before the attention.

    Call block(x, …), never block.forward(x, …): --fsdp and --compile hook into the former.
    """

    def __init__(self, config, adapter_config):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.adapter = Adapter(config.dim, adapter_config)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor, w: torch.Tensor | None, rope: tuple,
                lengths: torch.Tensor | None = None,
                cache: object | None = None) -> torch.Tensor:
        """x (B, T, C); w (B, T or 1, E): the experts' weights, None if folded -> (B, T, C).

        rope: cosines and sines, as rope_angles gives them.
        """
        # Once fast/fold.py has merged the adapter into wq, wk and wv, its replacement ignores w.
        adapted = self.adapter(self.attention_norm(x), w)
        x = x + self.attention(adapted, rope, lengths, cache)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


@dataclass
class LLaMAConfig:
    """LLaMA's sizes, from Meta's params.json or the files that extras/ reads. 7B's by default."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    vocab_size: int = 32000
    multiple_of: int = 256
    norm_eps: float = 1e-6
    n_kv_heads: int | None = None               # fewer than n_heads: grouped-query attention
    ffn_dim_multiplier: float | None = None
    rope_theta: float = 10000.0
    rope_factor: float = 1.0                    # 8 in LLaMA 3.1; see rope_frequencies
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_context: int = 8192
    hidden_dim: int | None = None               # None: computed below, as for Meta's files
    head_dim: int | None = None                 # None: C / H, as in most models
    attention_bias: bool = False                # in wq, wk and wv: in Qwen2 or a folded LLaMA
    tied_embeddings: bool = False               # `output` shares its matrix with the embeddings
    # Adapters are already merged into wq, wk and wv. Those built here must stay the identity.
    folded: bool = False

    def __post_init__(self):
        if self.head_dim is None:
            self.head_dim = self.dim // self.n_heads
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.hidden_dim is None:
            # Two thirds of 4 C, because SwiGLU has three matrices instead of two.
            hidden = int(2 * 4 * self.dim / 3)
            if self.ffn_dim_multiplier is not None:
                hidden = int(self.ffn_dim_multiplier * hidden)
            self.hidden_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)


class LLaMA(nn.Module):
    def __init__(self, config: LLaMAConfig, adapter_config: AdapterConfig):
        super().__init__()
        self.config = config
        # Frozen. The values come from the checkpoint, so this needs no initialization.
        embeddings = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embeddings)
        self.layers = nn.ModuleList(
            Block(config, adapter_config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.checkpointing = False      # recompute activations in backward to save memory

    def rope(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rope_angles for positions (..., T), with this model's frequencies."""
        return rope_angles(positions, rope_frequencies(self.config, positions.device))

    def forward(self, x: torch.Tensor, w: torch.Tensor | None,
                positions: torch.Tensor | None = None, lengths: torch.Tensor | None = None,
                caches: list | None = None) -> torch.Tensor:
        """Embeddings x (B, T, C) -> the last hidden state (B, T, C), normalized for `output`.

        w (L, B, T or 1, E): the experts' weights in every layer, or None if adapters are folded in.
        positions (T,) for all rows, or (B, T): by default 0, 1, 2, …. lengths: as in `attend`.
        caches: for generation, one for each layer.

        Frozen weights need no gradient, but the gradient passes back through every layer, to the
        adapters of lower layers and to the projector. This needs each layer's activations. With
        `checkpointing`, only a layer's input is kept, and backward computes the layer again.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        rope = self.rope(positions)
        for i, layer in enumerate(self.layers):
            w_i = None if w is None else w[i]
            cache = None if caches is None else caches[i]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, w_i, rope, lengths, use_reentrant=False)
            else:
                x = layer(x, w_i, rope, lengths, cache)
        return self.norm(x)


def check_logits(logits: torch.Tensor) -> None:
    """Raises LavinError if a logit is not finite, as when an activation overflows in fp16."""
    if not logits.isfinite().all():
        raise LavinError("the model's logits are not finite; --dtype bf16 or fp32 has a wider "
                         "range than fp16")


def pick(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """logits (B, vocabulary) -> the next token of each row, (B,).

    Raises LavinError if a logit is not finite.

    Temperature 0 takes the likeliest token. Otherwise the token is sampled from the nucleus: the
    smallest set of likeliest tokens whose probabilities add up to top_p or more.
    """
    check_logits(logits)                                # argmax would treat NaN as the largest
    if temperature < 1e-4:                              # dividing by less could overflow
        return logits.argmax(-1)
    p = torch.softmax(logits / temperature, dim=-1)
    p, order = p.sort(descending=True)
    mass_before = p.cumsum(-1) - p
    p[mass_before >= top_p] = 0
    p[:, 0] = p[:, 0].clamp(min=1e-30)                  # top_p = 0: keep the likeliest
    drawn = torch.multinomial(p, 1)                     # (B, 1), an index into the sorted tokens
    return order.gather(-1, drawn)[:, 0]


class LaVIN(nn.Module):
    """LLaMA and CLIP's ViT, both frozen, and the trained parts that join them: adapters with their
    routers, the projector and the modality embedding. checkpoints.load() reads it from files.

    All frozen weights have one dtype (unless quantized); the trained ones are fp32. Autocast casts
    the inputs of every matrix product to the frozen dtype. forward, logits, generate, route and
    image_features turn autocast on; callers of embed and last_hidden_state must do so themselves.
    """

    def __init__(self, llama_config: LLaMAConfig, vit_config: ViTConfig,
                 adapter_config: AdapterConfig, tokenizer: data.Tokenizer, max_seq_len: int):
        """max_seq_len: the authors' context length, which counts the modality token.

        The frozen weights and the modality embedding have no meaningful values yet:
        checkpoints.load reads or draws them.
        """
        super().__init__()
        self.adapter_config = adapter_config
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.context = max_seq_len - 1  # tokens in a sequence, which here has no modality token
        self.resolution = vit_config.resolution
        self.n_features = vit_config.n_features
        self.llama = LLaMA(llama_config, adapter_config)
        self.vit = VisionTransformer(vit_config, adapter_config)
        self.projector = Projector(
            vit_config.width, adapter_config.projector_dim, llama_config.dim)
        # Row 0: text only. Row 1: text and a picture.
        self.modality_embedding = nn.Parameter(torch.empty(2, llama_config.dim))
        self.folded_for = None          # the modality that fast/fold.py merged the adapters for
        self.is_sharded = False         # by --fsdp: each rank holds a part (fast/ranks.py)

        self.requires_grad_(False)
        self.modality_embedding.requires_grad_(True)
        for module in self.trained_modules():
            module.requires_grad_(True)

    def trained_modules(self) -> list[nn.Module]:
        """The adapters, with the routers in them, and the projector."""
        return [m for m in self.modules() if isinstance(m, (Adapter, Projector))]

    def init_trained(self) -> None:
        """As in the authors' code: identity adapters, modality tokens drawn from N(0, 1)."""
        for module in self.trained_modules():
            module.reset_parameters()
        nn.init.normal_(self.modality_embedding)

    @property
    def device(self) -> torch.device:
        """The model's device, taken from a trained weight: --fsdp may shard the frozen ones."""
        return self.modality_embedding.device

    def autocast(self) -> torch.autocast:
        """A context that computes matrix products in the dtype of the frozen weights."""
        dtype = self.llama.norm.weight.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def encode(self, sample: data.Sample, prompt_only: bool = False) -> data.Encoded:
        """A sample's tokens, with this model's tokenizer, number of features and context."""
        return data.encode(sample, self.tokenizer, self.n_features, self.max_seq_len, prompt_only)

    def batch(self, samples: list[data.Sample], prompt_only: bool = False) -> data.Batch:
        """A batch on the model's device, for training or, with prompt_only, for generation."""
        encoded = [self.encode(sample, prompt_only) for sample in samples]
        return data.collate(encoded, self.resolution).to(self.device)

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, 3, R, R), normalized -> (N, F, V), before the projector."""
        with self.autocast():
            return self.vit(pixels.to(self.llama.norm.weight.dtype))

    def route(self) -> torch.Tensor:
        """(L, 2 modalities, E experts): the weights of each layer's experts, by modality."""
        with self.autocast():
            return route(self.llama, self.modality_embedding)

    def embed(self, batch: data.Batch) -> torch.Tensor:
        """Tokens and pictures -> (1, T, C). Pictures enter the sequence here and nowhere else.

        A batch without pictures skips the ViT and the projector. Then only LLaMA's adapters and
        routers, and row 0 of the modality embedding, get a gradient from it.
        """
        x = self.llama.tok_embeddings(batch.tokens)                 # (T, C)
        if len(batch.pixels) > 0:
            features = self.projector(self.image_features(batch.pixels))        # (N, F, C)
            x[batch.feature_indices] = features.flatten(0, 1).type_as(x)
        return x[None]

    def expert_weights(self, batch: data.Batch,
                       routed: torch.Tensor | None = None) -> torch.Tensor | None:
        """The experts' weights for every token, (L, 1, T, E), or None if adapters are folded in.

        routed: the result of route(), if the caller has it already.
        """
        if self.folded_for is not None:
            n_pictures = len(batch.pixels)
            n_expected = len(batch.lengths) if self.folded_for == 1 else 0      # all, or none
            if n_pictures != n_expected:
                raise ValueError(f"folded for modality {self.folded_for}, "
                                 f"but the batch has {n_pictures} pictures")
            return None
        if routed is None:
            routed = self.route()
        text, picture = routed.split(1, dim=1)                      # (L, 1, E) each
        # Like routed[:, batch.modality], but backward through that indexing is slow.
        is_text = batch.modality[:, None] == 0                      # (T, 1)
        w = torch.where(is_text, text, picture)                     # (L, T, E)
        return w[:, None]

    def last_hidden_state(self, batch: data.Batch,
                          routed: torch.Tensor | None = None) -> torch.Tensor:
        """LLaMA's last hidden state of every token, (T, C), ready for `output`."""
        x = self.embed(batch)
        w = self.expert_weights(batch, routed)
        x = self.llama(x, w, positions=batch.positions[None], lengths=batch.lengths)
        return x[0]

    def forward(self, batch: data.Batch, routed: torch.Tensor | None = None) -> torch.Tensor:
        """The mean cross-entropy over the batch's answer tokens, fp32."""
        with self.autocast():
            x = self.last_hidden_state(batch, routed)
            # The token before an answer token predicts it, so we shift by 1. (A sample begins with
            # BOS, never an answer, so index - 1 is in the same sample.) Only answers get logits:
            # a prompt's logits (in 7B, 32,000 numbers for each token) would not enter the loss.
            x = x.index_select(0, batch.answer_indices - 1)         # (n_answer, C)
            labels = batch.labels[batch.answer_indices]             # (n_answer,)
            # Same as F.cross_entropy(logits, labels, reduction="sum"), but with less memory.
            loss = cross_entropy(x, self.llama.output.weight, labels)
        return loss / max(batch.n_answer, 1)

    def logits(self, batch: data.Batch) -> torch.Tensor:
        """(samples, longest, vocabulary), fp32, padded with 0 after each sample's end.

        The sequence is the one in data.py's docstring; it has no modality token.
        """
        with self.autocast():
            logits = self.llama.output(self.last_hidden_state(batch)).float()
        samples = logits.split(batch.lengths.tolist())
        return nn.utils.rnn.pad_sequence(samples, batch_first=True)

    @torch.no_grad()
    def generate(self, samples: list[data.Sample], max_new_tokens: int = 64,
                 temperature: float = 0.0, top_p: float = 1.0) -> list[str]:
        """Continue the prompt of each sample -> the new texts. The samples' answers are ignored.

        This is the plain way: every new token recomputes the whole sequence, including the
        picture. fast/engine.py generates the same tokens, but computes each of them only once.
        Dropout is active in train mode. checkpoints.load returns the model in eval mode.
        """
        texts = []
        ends = data.answer_ends(self.tokenizer)
        for sample in samples:
            sequence = self.encode(sample, prompt_only=True)
            new_tokens = []
            while len(new_tokens) < max_new_tokens:
                batch = data.collate([sequence], self.resolution).to(self.device)
                last = self.logits(batch)[:, -1]                    # (1, vocabulary)
                token = pick(last, temperature, top_p).item()
                if token in ends:
                    break
                new_tokens.append(token)
                sequence = data.append_tokens(sequence, [token])
                if len(sequence.tokens) == self.context:    # it is full
                    break
            texts.append(data.decode(self.tokenizer, new_tokens))
        return texts
