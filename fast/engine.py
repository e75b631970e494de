"""Generation with a cache: prompts are read in one pass, then continued a token at a time.

LaVIN.generate recomputes the whole sequence for every token. The engine generates the same tokens,
but computes each only once: a cache keeps the keys and values of earlier tokens, the picture's
features among them. The experts' weights of a new token are those of its prompt's modality.

A row of the cache belongs to one prompt. Prompts are concatenated when they are read, so no work is
spent on padding. Then every step adds one token to each row. When a row has ended, the next waiting
prompt takes its place, so no step is spent on finished rows (continuous batching). On a GPU, the
step of a folded model is captured as a CUDA graph and then replayed, so the CPU makes one call
instead of a thousand. There is a graph for each power of two up to the number of rows.

Shapes: n rows in use, S positions in each; H heads, K key/value heads, D their width, L layers,
C the model's width, T tokens of all prompts that are read together, E experts.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

import data
from fast import ranks
from fast.ops import is_one_token, one_token_product
from model import LaVIN, pick

LAYERS_PER_GRAPH = 8        # at most; see in_groups

# The caches of a layer, for the two kinds of pass. Each has the method `attend(q, k, v)`, which
# model.Attention calls.


class PromptCache:
    """A layer's cache in a pass that reads prompts, or more tokens after them.

    keys and values: (n_rows, K, max_tokens, D). spans: for each prompt (its row, the position of
    its first new token, the number of new tokens). Spans of the same row are read one after the
    other.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, spans: list[tuple]):
        self.keys = keys
        self.values = values
        self.spans = spans

    def attend(self, q, k, v):
        """q (1, H, T, D), k and v (1, K, T, D), prompts concatenated -> (1, H, T, D)."""
        grouped = q.shape[1] != k.shape[1]
        lengths = [length for _, _, length in self.spans]
        parts = zip(self.spans, q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
        outputs = []
        for (row, start, length), q_i, k_i, v_i in parts:
            end = start + length
            self.keys[row, :, start:end] = k_i[0]
            self.values[row, :, start:end] = v_i[0]
            mask = None
            if start > 0:               # the row has earlier tokens, which are seen too
                k_i = self.keys[row:row + 1, :, :end]
                v_i = self.values[row:row + 1, :, :end]
                mask = torch.ones(length, end, dtype=torch.bool, device=q.device).tril(start)
            y_i = F.scaled_dot_product_attention(
                q_i, k_i, v_i, mask, is_causal=mask is None, enable_gqa=grouped)
            outputs.append(y_i)
        return torch.cat(outputs, dim=2)


class StepCache:
    """A layer's cache in a step, which adds one token to each of the first n rows.

    keys and values: (n_rows, K, max_tokens, D). rows: (n,). positions: (n,), of the new tokens.
    mask (n, 1, 1, seen): which of the first `seen` positions each new token sees. No others are
    read.
    """

    def __init__(self, keys, values, rows, positions, mask):
        self.keys = keys
        self.values = values
        self.rows = rows
        self.positions = positions
        self.mask = mask

    def attend(self, q, k, v):
        """q (n, H, 1, D), k and v (n, K, 1, D) -> (n, H, 1, D)."""
        self.keys[self.rows, :, self.positions] = k[:, :, 0].type_as(self.keys)
        self.values[self.rows, :, self.positions] = v[:, :, 0].type_as(self.values)
        n, _, _, n_seen = self.mask.shape
        k = self.keys[:n, :, :n_seen]                                   # (n, K, seen, D)
        v = self.values[:n, :, :n_seen]
        if not torch.compiler.is_compiling():
            grouped = q.shape[1] != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, self.mask, enable_gqa=grouped)

        # The fused kernel is made for many queries. For a single one, compiled sums are faster.
        # H/K query heads share a key head.
        q = q.unflatten(1, (k.shape[1], -1)).float()                    # (n, K, H/K, 1, D)
        k = k[:, :, None].float()                                       # (n, K, 1, seen, D)
        v = v[:, :, None].float()
        scores = (q * k).sum(-1) / q.shape[-1] ** 0.5                   # (n, K, H/K, seen)
        scores = scores.masked_fill(~self.mask, -torch.inf)
        p = (scores - scores.amax(-1, keepdim=True)).exp()
        y = (p[..., None] * v).sum(-2) / p.sum(-1, keepdim=True)        # (n, K, H/K, D)
        return y.flatten(1, 2)[:, :, None]                              # (n, H, 1, D)


# A compiled step


class OneTokenLinear(nn.Module):
    """nn.Linear, but as fast as memory allows when a compiled step decodes a single token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x):
        if not is_one_token(x):
            return F.linear(x, self.weight, self.bias)
        y = one_token_product(self.weight, x)
        if self.bias is not None:
            y = y + self.bias
        return y


def prepare_linears(llama: nn.Module) -> None:
    """Turn a LLaMA's linear layers into OneTokenLinear."""
    holders = [llama]
    for block in llama.layers:
        holders += [block.attention, block.feed_forward]
    for holder in holders:
        for name, child in list(holder.named_children()):
            if isinstance(child, nn.Linear):
                setattr(holder, name, OneTokenLinear(child))


def in_groups(n_layers: int) -> list[slice]:
    """The layers in groups of equal size, as a compiled step takes them.

    Calling a compiled function costs 0.2 ms on a CPU, as much as a small layer's work. But
    compiling many layers at once takes minutes. All groups share the code of the first.
    """
    size = max(n for n in range(1, LAYERS_PER_GRAPH + 1) if n_layers % n == 0)
    return [slice(first, first + size) for first in range(0, n_layers, size)]


def run_layers(llama: nn.Module, layers: nn.ModuleList, x, w, positions, caches):
    """A group of LLaMA's layers, as in LLaMA.forward: x (n, 1, C) -> (n, 1, C)."""
    rope = llama.rope(positions[:, None])
    for i, layer in enumerate(layers):
        w_i = None if w is None else w[i]
        x = layer(x, w_i, rope, cache=caches[i])
    return x


def read_out(llama: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The last layer's x (n, 1, C) -> logits (n, vocabulary), fp32."""
    return llama.output(llama.norm(x))[:, 0].float()


# The engine


class Engine:
    """The cache of a LaVIN, and the passes that fill it. The rows in use always come first."""

    def __init__(self, lavin: LaVIN, n_rows: int, max_tokens: int, compiled: bool = False):
        """A cache of `n_rows` rows, each with room for max_tokens tokens.

        compiled: torch.compile the steps. This changes the modules of `lavin`, so it should be a
        folded copy (fast/fold.py). Passes that read prompts are never compiled.
        """
        llama = lavin.llama
        self.lavin = lavin
        self.n_rows = n_rows
        self.max_tokens = max_tokens
        self.compiled = compiled
        self.lengths = []       # tokens in each row in use
        self.graphs = {}        # CUDA graphs, by their number of rows (see replay_step)
        # One position more than is used: the compiler has a special case for a slice of all.
        shape = (n_rows, llama.config.n_kv_heads, max_tokens + 1, llama.config.head_dim)
        dtype = llama.norm.weight.dtype
        self.keys = [torch.zeros(shape, device=lavin.device, dtype=dtype) for _ in llama.layers]
        self.values = [torch.zeros(shape, device=lavin.device, dtype=dtype) for _ in llama.layers]
        # A folded model needs no expert weights. Otherwise each row has its own.
        self.routed = None
        self.w = None
        if lavin.folded_for is None:
            with torch.no_grad():
                self.routed = lavin.route()
            n_layers, _, n_experts = self.routed.shape
            self.w = torch.zeros(n_layers, n_rows, 1, n_experts, device=lavin.device)
        self.groups = [slice(len(llama.layers))]
        self.run_layers = run_layers
        self.read_out = read_out
        if compiled:
            self.groups = in_groups(len(llama.layers))
            prepare_linears(llama)
            self.run_layers = torch.compile(run_layers)
            self.read_out = torch.compile(read_out)

    @torch.inference_mode()
    def prefill(self, batch: data.Batch) -> torch.Tensor:
        """Read prompts into the next free rows -> the logits after each, (prompts, vocabulary)."""
        batch = batch.to(self.lavin.device)
        lengths = batch.lengths.tolist()
        first = len(self.lengths)
        with self.lavin.autocast():
            x = self.lavin.embed(batch)                                 # (1, T, C)
            w = self.lavin.expert_weights(batch, self.routed)           # (L, 1, T, E)
        ends = batch.lengths.cumsum(0).to(x.device) - 1
        if w is not None:
            self.w[:, first:first + len(lengths), 0] = w[:, 0, ends]
        self.lengths += lengths
        spans = [(first + i, 0, length) for i, length in enumerate(lengths)]
        return self._read(x, w, spans, ends)

    @torch.inference_mode()
    def extend(self, tokens: list[int]) -> torch.Tensor:
        """Read more tokens into the only row in use -> the logits after them, (1, vocabulary)."""
        x = self.lavin.llama.tok_embeddings(torch.tensor([tokens], device=self.lavin.device))
        w = None if self.w is None else self.w[:, :1]
        end = torch.tensor([len(tokens) - 1], device=x.device)
        logits = self._read(x, w, [(0, self.lengths[0], len(tokens))], end)
        self.lengths[0] += len(tokens)
        return logits

    @torch.inference_mode()
    def branch(self, branches: list[tuple[int, list[int]]]) -> torch.Tensor:
        """Read what might follow the rows' prompts -> the logits after each token, (T, vocabulary).

        A branch is (its row, its tokens). It sees the prompt of its row but no other branch. It is
        not added to the row: the next branch overwrites its keys and values.
        """
        tokens = []
        rows = []               # of each token
        spans = []
        for row, new_tokens in branches:
            tokens += new_tokens
            rows += [row] * len(new_tokens)
            spans.append((row, self.lengths[row], len(new_tokens)))
        x = self.lavin.llama.tok_embeddings(torch.tensor([tokens], device=self.lavin.device))
        w = None if self.w is None else self.w[:, rows].transpose(1, 2)     # (L, 1, T, E)
        return self._read(x, w, spans, torch.arange(len(tokens), device=x.device))

    def _read(self, x, w, spans, wanted):
        """Run x (1, T, C), the tokens of all spans, through LLaMA -> logits (n, vocabulary), fp32.

        wanted (n,): the indices in x of the tokens whose logits are returned.
        """
        positions = torch.cat([torch.arange(start, start + length) for _, start, length in spans])
        caches = [PromptCache(keys, values, spans) for keys, values in zip(self.keys, self.values)]
        with self.lavin.autocast():
            x = self.lavin.llama(x, w, positions.to(x.device), caches=caches)
            return self.lavin.llama.output(x[0, wanted]).float()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> torch.Tensor:
        """Add each row's newest token -> the logits of the next one, (n, vocabulary), fp32."""
        tokens = torch.tensor(tokens)
        positions = torch.tensor(self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        device = self.lavin.device
        if device.type == "cuda" and self.w is None:
            return self.replay_step(tokens, positions)
        return self.one_step(tokens.to(device), positions.to(device), max(self.lengths))

    def one_step(self, tokens, positions, n_seen):
        """Tokens (n,) at positions (n,), all below n_seen -> logits (n, vocabulary), fp32."""
        n = len(tokens)
        w = None if self.w is None else self.w[:, :n]
        rows = torch.arange(n, device=tokens.device)
        seen = torch.arange(n_seen, device=tokens.device)
        mask = seen <= positions[:, None, None, None]                   # (n, 1, 1, seen)
        caches = [StepCache(keys, values, rows, positions, mask)
                  for keys, values in zip(self.keys, self.values)]
        llama = self.lavin.llama
        with self.lavin.autocast():
            x = llama.tok_embeddings(tokens[:, None])                   # (n, 1, C)
            if self.compiled:
                if n == 1:
                    x = x.float()       # one_token_product computes in fp32: avoid rounding
                # One graph for every n_seen, and one for every n above 1.
                for tensor, dim in ((mask, 3), (mask, 0), (rows, 0), (positions, 0), (x, 0)):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
            for group in self.groups:
                w_group = None if w is None else w[group]
                x = self.run_layers(
                    llama, llama.layers[group], x, w_group, positions, caches[group])
            return self.read_out(llama, x)

    def replay_step(self, tokens, positions):
        """one_step as a CUDA graph, with the number of rows rounded up to a power of two.

        A graph is captured when it is first needed and then replayed on the same tensors. Unused
        rows write to their first position, which the next prompt overwrites.
        """
        n = len(tokens)
        size = min(self.n_rows, 1 << (n - 1).bit_length())
        tokens = F.pad(tokens, (0, size - n)).to(self.lavin.device)
        positions = F.pad(positions, (0, size - n)).to(self.lavin.device)
        if size not in self.graphs:
            self.graphs[size] = self._capture(tokens, positions)
        graph, graph_tokens, graph_positions, logits = self.graphs[size]
        graph_tokens.copy_(tokens)
        graph_positions.copy_(positions)
        graph.replay()
        return logits[:n]

    def _capture(self, tokens, positions):
        """Return one_step's graph and the tensors it uses: (graph, tokens, positions, logits)."""
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):          # compile and warm up; repeated writes do no harm
                self.one_step(tokens, positions, self.max_tokens)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            logits = self.one_step(tokens, positions, self.max_tokens)
        return graph, tokens, positions, logits

    def retire(self, row: int) -> None:
        """Free a row. The last row in use takes its place."""
        last = len(self.lengths) - 1
        length = self.lengths[last]
        if row < last:
            for cached in itertools.chain(self.keys, self.values):
                cached[row, :, :length] = cached[last, :, :length]
            if self.w is not None:
                self.w[:, row] = self.w[:, last]
            self.lengths[row] = length
        self.lengths.pop()


@dataclass
class Answer:
    number: int                         # the number of its prompt
    n_prompt: int                       # tokens in the prompt
    tokens: list[int] = field(default_factory=list)


def next_tokens(lavin: LaVIN, logits: torch.Tensor, temperature: float,
                top_p: float) -> list[int]:
    """The next token of each row, picked from logits (rows, vocabulary).

    A model sharded by --fsdp needs all ranks for every pass, so they must agree when a row ends.
    Their logits can differ by rounding, so all ranks take rank 0's tokens.
    """
    tokens = pick(logits, temperature, top_p)
    if lavin.is_sharded:
        tokens = ranks.broadcast(tokens)
    return tokens.tolist()


def continue_prompts(lavin: LaVIN, prompts: Iterable[data.Encoded], n_rows: int,
                     max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0,
                     done: Callable[[list[int]], bool] | None = None, compiled: bool = False,
                     longest: int | None = None) -> Iterator[tuple[int, list[int]]]:
    """Continue prompts, up to `n_rows` at a time. When one ends, yield (its number, new tokens).

    A prompt is taken when a row is free, so `prompts` may be an iterator. Then `longest` must be
    given: the number of tokens in the longest prompt. An answer ends before EOS, after
    max_new_tokens, at the end of the context, or when done(its tokens) is true.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if longest is None:
        longest = max((len(encoded.tokens) for encoded in prompts), default=0)
    ends = data.answer_ends(lavin.tokenizer)
    engine = Engine(lavin, n_rows, min(longest + max_new_tokens, lavin.context), compiled)
    waiting = enumerate(prompts)
    active: list[Answer] = []                   # one for each row in use

    while True:
        fresh = list(itertools.islice(waiting, n_rows - len(active)))
        logits = []                             # in the order of the rows: old ones, then fresh
        if active:
            logits.append(engine.step([answer.tokens[-1] for answer in active]))
        if fresh:
            batch = data.collate([encoded for _, encoded in fresh], lavin.resolution)
            logits.append(engine.prefill(batch))
            active += [Answer(number, len(encoded.tokens)) for number, encoded in fresh]
        if not active:
            return
        tokens = next_tokens(lavin, torch.cat(logits), temperature, top_p)
        for row in reversed(range(len(active))):        # backwards: retiring moves the last row
            answer = active[row]
            ended = tokens[row] in ends
            if not ended:
                answer.tokens.append(tokens[row])
                n_new = len(answer.tokens)
                ended = (n_new == max_new_tokens or answer.n_prompt + n_new >= lavin.context
                         or done is not None and done(answer.tokens))
            if ended:
                engine.retire(row)
                active[row] = active[-1]
                active.pop()
                yield answer.number, answer.tokens


def generate(lavin: LaVIN, samples: list[data.Sample], max_new_tokens: int = 64,
             temperature: float = 0.0, top_p: float = 1.0, n_rows: int = 32) -> list[str]:
    """LaVIN.generate with a cache, for `n_rows` samples at a time."""
    prompts = [lavin.encode(sample, prompt_only=True) for sample in samples]
    n_rows = min(len(prompts), n_rows)
    answers = dict(continue_prompts(lavin, prompts, n_rows, max_new_tokens, temperature, top_p))
    return [data.decode(lavin.tokenizer, answers[i]) for i in range(len(prompts))]
