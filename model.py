"""LLaMA in Meta's layout, and LaVIN: LLaMA and CLIP's ViT joined by Mixture-of-Modality Adaptation.

In the order of reading: norm, RoPE, attention, feed-forward, block, LLaMA, its loading, LaVIN.
Module names are those of Meta's checkpoint, so that a parameter's name is its name in the file.
Shapes: B samples, T tokens, C width, H heads, K key/value heads, D = C / H, L layers;
N pictures of R × R pixels, F features of V channels each.
"""

import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import adapters
import data
import hf
import quantize
import ranks
import vit as clip
from adapters import Adapter, AdapterConfig, Projector, fold
from decode import Packed, attend_packed, attend_step, continued, is_one_token, one_product
from files import LavinError, check_names, fill, is_hf_folder, read_checkpoint, read_json, tensors_of, write_atomically
from router import route


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


def rotate(x, rope):
    """Turn each pair of neighbouring channels of x (B, T, H, D) by its angle, in fp32; rope = LLaMA.rope(positions).

    Meta's checkpoints pair channels 2i and 2i + 1; Hugging Face's pair i and i + D/2.
    """
    pairs, (cos, sin) = x.float().unflatten(-1, (-1, 2)), rope          # (B, T, H, D/2, 2)
    if torch.compiler.is_compiling():                                   # which fuses this, and knows no complex numbers
        a, b = pairs.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:                                                               # one pass instead of seven
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))
    return turned.flatten(-2).type_as(x)


class Linear(nn.Linear):
    """nn.Linear, at the speed of memory where a single token is decoded."""

    def forward(self, x):
        if not is_one_token(x):
            return super().forward(x)
        y = F.linear(x, self.weight) if self.weight.dtype == torch.float32 else one_product(self.weight, x)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, self.head_dim = config.dim, config.head_dim
        self.wq = Linear(C, C, bias=config.attention_bias)
        self.wk = Linear(C, config.n_kv_heads * self.head_dim, bias=config.attention_bias)
        self.wv = Linear(C, config.n_kv_heads * self.head_dim, bias=config.attention_bias)
        self.wo = Linear(C, C, bias=False)
        self.grouped = config.n_kv_heads != config.n_heads
        self.attend_packed = attend_packed

    def forward(self, x, rope, cache=None, where=None):
        """Causal self-attention of each sample that is packed into x, or with where None of the rows of x; with a layer's
        cache over what it holds as well (decode.py)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rope), rotate(k, rope)                         # (B, T, H, D), (B, T, K, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                # (B, H, T, D), (B, K, T, D)
        if where is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        else:
            y = (attend_step if isinstance(where, tuple) else self.attend_packed)(q, k, v, cache, where)
        return self.wo(y.transpose(1, 2).flatten(2))                    # (B, T, C)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))                 # SwiGLU


class Block(nn.Module):
    def __init__(self, config, adapter):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.adapter = Adapter(config.dim, adapter)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x, w, rope, cache=None, where=None):
        """x (B, T, C); w (B, T or 1, 2), the weights of the two adapter experts for each token or sample."""
        x = x + self.attention(self.adapter(self.attention_norm(x), w), rope, cache, where)
        x = x + self.feed_forward(self.ffn_norm(x))
        return x


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of x @ weight.T, x (N, C), against targets (N,): fp32.

    The weight being frozen, all that is left to know of the logits is their gradient to x, softmax − one-hot times
    weight. It is made at once, a few rows at a time, while these lie in the cache; 32,000 logits for every answer token,
    their softmax and their gradient never exist together.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        loss = torch.zeros((), device=x.device)
        gradient = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        rows = 128 if x.device.type == "cpu" else 1024
        for start in range(0, len(x), rows):
            here, answers = slice(start, start + rows), targets[start:start + rows, None]
            logs = F.linear(x[here], weight).log_softmax(-1, dtype=torch.float32)       # (rows, vocabulary)
            loss -= logs.gather(1, answers).sum()
            if gradient is not None:
                gradient[here] = logs.exp_().scatter_add_(1, answers, -torch.ones_like(answers, dtype=logs.dtype)) @ weight
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, of_loss):
        return ctx.saved_tensors[0] * of_loss, None, None


@dataclass
class LLaMAConfig:
    """params.json; the defaults are 7B's."""
    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    vocab_size: int = 32000
    multiple_of: int = 256
    norm_eps: float = 1e-6
    n_kv_heads: int | None = None               # fewer than n_heads: grouped-query attention
    ffn_dim_multiplier: float | None = None
    rope_theta: float = 10000.0
    hidden_dim: int | None = None               # of the feed-forward; Meta's files leave it to be computed
    attention_bias: bool = False                # of wq, wk and wv: adapters were folded into them

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.head_dim = self.dim // self.n_heads
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        self.hidden_dim = self.hidden_dim or self.multiple_of * math.ceil(hidden / self.multiple_of)


class LLaMA(nn.Module):
    def __init__(self, config, adapter):
        super().__init__()
        self.config = config
        # nn.Embedding() would draw random weights, and on the meta device import half of PyTorch to do so.
        self.tok_embeddings = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.dim))
        self.layers = nn.ModuleList(Block(config, adapter) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        self.checkpointing = False

    def rope(self, positions):
        """Positions (..., T) -> cosines and sines (..., T, 1, D/2), fp32: pair i turns by position / θ^(2i/D)."""
        D = self.config.head_dim
        frequencies = 1 / self.config.rope_theta ** (torch.arange(0, D, 2, device=positions.device).float() / D)
        angles = (positions[..., None].float() * frequencies).unsqueeze(-2)
        return angles.cos(), angles.sin()

    def forward(self, x, w, caches=None, positions=None, where=None):
        """x (B, T, C), w (L, B, T or 1, 2) -> the last hidden state, normed, (B, T, C); `output` makes logits of it.

        w is None in a folded model. positions (B, T), if not 0, 1, 2, …; where: what is packed into x, or to be cached
        (decode.py: attend_packed, attend_step).
        """
        rope = self.rope(torch.arange(x.shape[1], device=x.device) if positions is None else positions)
        for i, layer in enumerate(self.layers):
            w_i = None if w is None else w[i]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, w_i, rope, None, where, use_reentrant=False)
            else:
                x = layer(x, w_i, rope, caches and caches[i], where)
        return self.norm(x)


def read_params(directory, vocab_size):
    """params.json, or Hugging Face's config.json -> LLaMAConfig. vocab_size is the tokenizer's: Meta's file says -1."""
    path, params = Path(directory, "params.json"), None
    if is_hf_folder(directory):
        path, params = Path(directory, "config.json"), hf.read_config(directory)
        if vocab_size > params["vocab_size"]:
            raise LavinError(f"{path}: {params['vocab_size']} tokens, but tokenizer.model has {vocab_size}")
        vocab_size = params["vocab_size"]
    params = params or read_json(path)
    try:
        if params.get("use_scaled_rope"):
            raise LavinError(f"{path}: scaled RoPE (LLaMA 3.1 and later) is not supported")
        known = {f.name: params[f.name] for f in dataclasses.fields(LLaMAConfig) if params.get(f.name) is not None}
        known["vocab_size"] = vocab_size
        for name, value in known.items():
            real = name in ("norm_eps", "ffn_dim_multiplier", "rope_theta")
            kinds = (int, float) if real else (bool,) if name == "attention_bias" else (int,)
            if type(value) not in kinds or value <= 0 and value is not False:
                raise ValueError(f"{name} is {value!r}")
        config = LLaMAConfig(**known)
        if config.dim % config.n_heads or config.n_heads % config.n_kv_heads:
            raise ValueError(f"dim {config.dim}, heads {config.n_heads}, key heads {config.n_kv_heads} do not divide")
    except (AttributeError, TypeError, ValueError) as error:
        raise LavinError(f"{path}: not LLaMA's parameters ({error})") from error
    return config


def allocate(modules, device, dtype):
    """Give modules made on the meta device memory, still unset: frozen parameters in dtype, trained ones in fp32."""
    for child in modules:
        for name, p in list(child.named_parameters(recurse=False)):
            empty = torch.empty(p.shape, device=device, dtype=torch.float32 if p.requires_grad else dtype)
            setattr(child, name, nn.Parameter(empty, requires_grad=p.requires_grad))


def places(whole, slices):
    """The parts of `whole` that model-parallel slices fill, in order; None if they do not add up to it.

    Meta cuts wq, wk, wv, w1, w3 and output along dim 0, wo, w2 and tok_embeddings along dim 1; the norms are
    whole in every shard. The shapes alone tell which.
    """
    if all(s.shape == whole.shape for s in slices):
        return [whole]
    for dim in range(whole.dim()):
        others = [s.shape[:dim] + s.shape[dim + 1:] for s in slices]
        sizes = [s.shape[dim] if s.dim() > dim else 0 for s in slices]
        if sum(sizes) == whole.shape[dim] and set(others) == {whole.shape[:dim] + whole.shape[dim + 1:]}:
            return whole.split(sizes, dim)
    return None


@torch.no_grad()
def load_llama(llama, directory, device, dtype, delta=None):
    """Copy consolidated.00.pth, .01.pth, … or Hugging Face's files into the frozen weights of `llama`, tensor by tensor.

    delta: a folder of Hugging Face's whose tensors are added, as Vicuna's are.

    The blocks are still on the meta device: each is given memory when its turn comes and yielded when it is full,
    to be made smaller before the next one comes.
    The files are mapped, not read. The pages of a map that have been touched count as memory until it is
    dropped, so the maps are renewed before more than the largest tensor of each shard, or 16 MB, has been touched.
    """
    theirs, config = is_hf_folder(directory), llama.config
    files = [directory] if theirs else sorted(Path(directory).glob("consolidated.*.pth"))
    names = [name for name, p in llama.named_parameters() if not p.requires_grad]

    def open_shards():
        if theirs:
            return [hf.read_llama(directory)]
        return [tensors_of(read_checkpoint(file, mmap=True), file) for file in files]

    shards = open_shards()
    for file, found in zip(files, [list(shard) for shard in shards]):
        check_names(file, names, [name for name in found if not name.endswith("rope.freqs")])   # we compute them
    added = hf.read_llama(delta) if delta else {}
    for name in names if delta else ():
        if name not in added or added[name].shape != llama.get_parameter(name).shape:
            raise LavinError(f"{delta}: {name} is missing or of another shape than in {directory}; this delta is of another model")
    budget, touched = max(2**24, *(t.nbytes for t in shards[0].values())), 0
    for i in range(-1, len(llama.layers)):                              # -1: what is outside the blocks
        if i >= 0:
            allocate(llama.layers[i].modules(), device, dtype)
        for name in names:
            if i != (int(name.split(".")[1]) if name.startswith("layers.") else -1):
                continue
            parameter = llama.get_parameter(name)
            if touched + shards[0][name].nbytes > budget:
                shards = slices = piece = None                          # unmap before mapping anew
                shards, touched = open_shards(), 0
            touched += shards[0][name].nbytes
            slices = [shard[name] for shard in shards]
            if theirs:
                slices = [hf.to_meta(name, slices[0], config)]
            target = torch.empty_like(parameter, dtype=torch.float32) if delta else parameter
            parts = places(target, slices)
            if parts is None:
                shapes = " + ".join(str(tuple(s.shape)) for s in slices)
                raise LavinError(f"{directory}: {name} is {shapes} in {len(files)} shard(s), but params.json and tokenizer "
                                 f"ask for {tuple(parameter.shape)}; is a consolidated.NN.pth missing?")
            for part, piece in zip(parts, slices):
                part.copy_(piece)
            if delta:
                parameter.copy_(target.add_(hf.to_meta(name, added[name], config)))
        if i >= 0:
            yield llama.layers[i]


def save_folded(lavin, directory):
    """LLaMA of a LaVIN folded for text, in Meta's layout: params.json states its biases ("attention_bias": true), so that
    a reader which knows none refuses it instead of leaving them out. LavinError for what that layout cannot hold."""
    if lavin.modality != 0:
        raise ValueError("fold(0) first: for pictures, Meta's layout has no place for the ViT and the projector")
    if quantize.packed(lavin.llama):
        raise LavinError("--fold: packed matrices have no place in Meta's layout; leave --bits out")
    directory = Path(directory)
    if any(directory.glob("consolidated.*.pth")):
        raise LavinError(f"--fold {directory}: holds a model already; choose another folder")
    params = {name: value for name, value in vars(lavin.llama.config).items() if value is not None and name != "head_dim"}
    write_atomically(directory / "tokenizer.model", lambda path: path.write_bytes(lavin.tokenizer.serialized_model_proto()))
    write_atomically(directory / "params.json", lambda path: path.write_text(json.dumps(params)))
    state = {name: p.to(torch.float16) if p.dtype == torch.float32 else p for name, p in lavin.llama.state_dict().items()}
    write_atomically(directory / "consolidated.00.pth", lambda path: torch.save(state, path))


class LaVIN(nn.Module):
    """LLaMA and CLIP, frozen, with what joins them: adapters, routers, projector and the modality embedding.

    Frozen weights are kept in one dtype, trained ones in fp32; where the two meet, autocast computes in the
    dtype of the frozen ones. Every public method does so by itself.
    """

    def __init__(self, llama, vit, adapter, tokenizer, max_seq_len):
        """Configs, tokenizer and the context in tokens, the modality token counted. Weights are left unset."""
        super().__init__()
        self.config = adapter
        self.tokenizer, self.max_seq_len = tokenizer, max_seq_len
        self.resolution, self.n_features = vit.resolution, vit.n_features
        self.llama = LLaMA(llama, adapter)
        self.vit = clip.VisionTransformer(vit, adapter)
        self.projector = Projector(vit.width, adapter.hidden, llama.dim)
        self.modality_embedding = nn.Parameter(torch.empty(2, llama.dim))       # 0 text only, 1 with a picture
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, (Adapter, Projector)):
                module.requires_grad_(True)
        self.modality_embedding.requires_grad_(True)
        self.modality = None                            # the one that it is folded for

    @classmethod
    def load(cls, llama, vit, adapter=None, *, device="cpu", dtype=torch.float32, max_seq_len=None,
             tau=None, dropout=None, bits=16, fsdp=False, delta=None):
        """LLaMA's directory, CLIP's file and, unless to be trained afresh, a LaVIN checkpoint -> LaVIN in eval mode.

        max_seq_len, tau and dropout: as given, else the checkpoint's, else 512, 10 and 0.1. bits: 8 or 4 pack LLaMA's
        matrices (quantize.py), and fsdp cuts them into parts (ranks.py), each block as soon as it is read. delta: a
        folder of Hugging Face's that is added to LLaMA, as Vicuna's are.
        Raises LavinError for a file that is missing, damaged or does not fit the others.
        """
        state, config, settings = adapters.read(adapter) if adapter else ({}, AdapterConfig(), {})
        changes = {"tau": tau, "dropout": dropout}
        config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
        max_seq_len = max_seq_len or settings.get("max_seq_len") or 512
        tokenizer = data.load_tokenizer(llama)
        vit_state, vit_config = clip.read(vit)
        longest_prefix = 2 + len(data.picture_prefix(tokenizer)) + vit_config.n_features
        if max_seq_len <= longest_prefix:
            raise LavinError(f"--max-seq-len {max_seq_len} has no room for text: a picture takes {longest_prefix}")
        params = read_params(llama, tokenizer.vocab_size())
        if adapter and params.attention_bias:
            raise LavinError(f"{llama}: adapters are folded into it already; take the LLaMA they were trained with, or --adapter none")
        with torch.device("meta"):                      # no memory before the dtype is known
            lavin = cls(params, vit_config, config, tokenizer, max_seq_len)
        allocate([m for name, m in lavin.named_modules() if not name.startswith("llama.layers.")], device, dtype)
        fill({name: p for name, p in lavin.vit.named_parameters() if not p.requires_grad}, vit_state, vit)
        del vit_state                                   # 0.6 GB that need not be held while LLaMA is read
        for block in load_llama(lavin.llama, llama, device, dtype, delta):
            if bits < 16:
                quantize.pack(block, bits)
            if fsdp:
                ranks.shard(block, torch.device(device))
        lavin.init_trained()
        if adapter:
            fill(adapters.to_official(lavin), state, adapter)
        return lavin.eval()

    def init_trained(self):
        """As the reference: adapters are the identity, the modality tokens drawn from N(0, 1)."""
        for module in self.modules():
            if isinstance(module, (Adapter, Projector)):
                module.reset_parameters()
        nn.init.normal_(self.modality_embedding)

    @property
    def device(self):
        return self.modality_embedding.device

    def autocast(self):
        dtype = self.llama.norm.weight.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def encode(self, sample, prompt_only=False):
        """data.Sample -> data.Encoded, for this model's tokenizer, pictures and context."""
        return data.encode(sample, self.tokenizer, self.n_features, self.max_seq_len, prompt_only)

    def batch(self, samples, prompt_only=False):
        """[data.Sample] -> data.Batch on the model's device, for training or, with prompt_only, to be continued."""
        encoded = [self.encode(sample, prompt_only) for sample in samples]
        return data.collate(encoded, self.resolution).to(self.device)

    def image_features(self, pixels):
        """(N, 3, R, R), normalised -> (N, F, V), before the projector."""
        with self.autocast():
            return self.vit(pixels.to(self.vit.conv1.weight.dtype))

    def route(self):
        """(L, 2 modalities, 2 experts): the weights by which each layer mixes its experts."""
        with self.autocast():
            return route(self.llama, self.modality_embedding)

    def embed(self, batch):
        """Tokens and pictures -> (1, ΣT, C). The one place where pictures enter the text."""
        x = self.llama.tok_embeddings(batch.tokens)
        if len(batch.pixels):
            start = 1 + len(data.picture_prefix(self.tokenizer))        # BOS, "Image: ", features
            places = batch.pictured[:, None] + torch.arange(start, start + self.n_features, device=x.device)
            x[places] = self.projector(self.image_features(batch.pixels)).type_as(x)        # (N, F, C)
        return x[None]

    def weights(self, batch, routed=None):
        """The experts' weights for each token, (L, 1, ΣT, 2); None if folded. routed: what route() gave, if asked before."""
        if self.modality is None:
            text, picture = (self.route() if routed is None else routed).split(1, dim=1)        # (L, 1, 2)
            return torch.where(batch.modality[:, None] == 0, text, picture)[:, None]
        if len(batch.pictured) != self.modality * len(batch.lengths):
            raise ValueError(f"folded for modality {self.modality}, but the batch has {len(batch.pictured)} pictures")

    def hidden(self, batch, routed=None):
        """The last hidden state of every token, (ΣT, C)."""
        where = Packed([(row, 0, T) for row, T in enumerate(batch.lengths)])
        return self.llama(self.embed(batch), self.weights(batch, routed), positions=batch.positions[None], where=where)[0]

    def forward(self, batch, routed=None):
        """Mean cross-entropy over the batch's answer tokens, fp32. Logits are made for these alone."""
        with self.autocast():
            x = self.hidden(batch, routed).index_select(0, batch.answers - 1)      # (n_answer, C)
            loss = CrossEntropy.apply(x, self.llama.output.weight, batch.labels[batch.answers])
        return loss / max(batch.n_answer, 1)

    def logits(self, batch):
        """(B, T, vocabulary), fp32, of every position, 0 behind a sample's end; the modality token is not among them."""
        with self.autocast():
            logits = self.llama.output(self.hidden(batch)).float()
        return torch.nn.utils.rnn.pad_sequence(logits.split(batch.lengths), batch_first=True)

    @torch.no_grad()
    def fold(self, modality):
        """-> a LaVIN for one modality (0 text only, 1 with a picture) whose LLaMA has no adapters: plain LLaMA's cost.

        They are merged into wq, wk and wv (adapters.fold), which alone are copied; all else is shared. The ViT keeps
        its adapters: there every token of every picture has weights of its own, so there is no one matrix to merge into.
        """
        if self.modality is not None or modality not in (0, 1):
            raise ValueError(f"fold({modality}) of a LaVIN " + ("for one of the modalities 0 and 1" if self.modality is None else "that is folded already"))
        shared = {id(it): it for it in [*self.parameters(), *self.buffers(), self.tokenizer]}
        folded = copy.deepcopy(self, shared)
        for block, w in zip(folded.llama.layers, self.route()[:, modality]):
            block.adapter = fold(block.adapter, w, block.attention, self.llama.norm.weight.dtype)
        folded.modality = modality
        folded.llama.config = dataclasses.replace(self.llama.config, attention_bias=True)
        return folded

    def generate(self, samples, max_new_tokens=64, temperature=0.0, top_p=1.0):
        """[data.Sample] -> the new text of each. Answers in the samples are ignored."""
        encoded = [self.encode(sample, prompt_only=True) for sample in samples]
        new = dict(continued(self, encoded, min(len(encoded), 32), max_new_tokens, temperature, top_p))
        return [self.tokenizer.decode(new[i]) for i in range(len(encoded))]
