"""Decoding: prompts are read in one pass, then continued a token at a time over a cache of keys and values.

A row of the cache belongs to one prompt. Prompts are read packed, one behind the other, so that no work is done for
padding (as samples are in training); then every step gives each row one more token. A row that has ended makes room for the next prompt that
waits, so that no step is spent on what is done (continuous batching).
On a GPU a step is captured once as a CUDA graph and replayed, which costs the CPU one call instead of a thousand.
Shapes: n rows in use, S places in each; H heads, K key/value heads, D their width, L layers, C the model's width.
"""

import contextlib
import itertools

import torch
import torch.nn.functional as F

import data


def is_one_token(x):
    """Is a compiled step decoding a single token, x (1, 1, C)? It takes as long as the weights take to be read."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.dim() == 3 and x.shape[0] == x.shape[1] == 1


def one_product(weight, x):
    """x (1, 1, in) times weight (out, in) -> (1, 1, out), as a sum in fp32: the compiler makes one pass over the weight of
    it, unpacking included, where a matrix product of bf16 or packed numbers would be slower."""
    parts = weight.chunk(8 if x.device.type == "cpu" else 1)            # one loop over eight places keeps memory busier
    return torch.cat([(part.float() * x.flatten().float()).sum(-1) for part in parts]).type_as(x).view(1, 1, -1)


class Packed:
    """places = [(row, start, T), …]: of each packed sample its place in the cache, if there is one, and its length.

    Not a list alone, which the compiler would look into and compile anew for every number of samples.
    """

    def __init__(self, places):
        self.places = places


def attend_packed(q, k, v, cache, where):
    """Samples packed one behind the other: q (1, H, ΣT, D), k and v (1, K, ΣT, D); where: Packed. Each attends to itself
    and to what its row of the cache holds already."""
    parts, lengths, grouped = [], [T for _, _, T in where.places], q.shape[1] != k.shape[1]
    for (row, start, T), q, k, v in zip(where.places, *(t.split(lengths, dim=2) for t in (q, k, v))):
        mask = None
        if cache is not None:
            for cached, new in zip(cache, (k, v)):
                cached[row, :, start:start + T] = new[0]
        if start:                                               # a conversation goes on
            k, v = (cached[row:row + 1, :, :start + T] for cached in cache)
            mask = torch.ones(T, start + T, dtype=torch.bool, device=q.device).tril(start)
        parts.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped))
    return torch.cat(parts, dim=2)


def attend_step(q, k, v, cache, where):
    """A token for each of the first n rows: q (n, H, 1, D), k and v (n, K, 1, D); where = (rows (n,), positions (n,), mask
    (n, 1, 1, S)): the place of each, and what of the first S places it attends to."""
    rows, positions, mask = where
    for cached, new in zip(cache, (k, v)):
        cached[rows, :, positions] = new[:, :, 0].type_as(cached)
    k, v = (cached[:mask.shape[0], :, :mask.shape[-1]] for cached in cache)
    if not torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
    # The fused kernel is made for many queries. For one, the compiler makes a better one of sums.
    q, k, v = q.unflatten(1, (k.shape[1], -1)).float(), k[:, :, None].float(), v[:, :, None].float()        # (n, K, H/K, …, D)
    p = ((q * k).sum(-1) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).softmax(-1)                   # (n, K, H/K, S)
    return (p[..., None] * v).sum(-2).flatten(1, 2)[:, :, None]                                             # (n, H, 1, D)


class Decoder:
    """The cache of a LaVIN, `rows` rows with places for S tokens each, and what fills it. The rows in use are the first."""

    def __init__(self, lavin, rows, S, compiled=False):
        """compiled: the steps of a folded model, not the reading of prompts."""
        llama, dtype = lavin.llama, lavin.llama.norm.weight.dtype
        shape = (rows, llama.config.n_kv_heads, S, llama.config.head_dim)
        self.lavin, self.rows, self.S, self.compiled = lavin, rows, S, compiled
        self.lengths, self.graphs = [], {}
        self.caches = [[torch.zeros(shape, device=lavin.device, dtype=dtype) for _ in range(2)] for _ in llama.layers]
        self.w = self.routed = None
        if lavin.modality is None:
            with torch.no_grad():
                self.routed = lavin.route()
            self.w = torch.zeros(len(llama.layers), rows, 1, 2, device=lavin.device)        # of each row
        if compiled:
            for module in [*llama.layers, llama.output]:
                module.compile()

    @torch.inference_mode()
    def read(self, batch):
        """Prompts of a data.Batch, into the next rows -> the logits of what follows them (prompts, vocabulary), fp32."""
        first, batch = len(self.lengths), batch.to(self.lavin.device)
        with self.lavin.autocast():
            x, w = self.lavin.embed(batch), self.lavin.weights(batch, self.routed)
        if w is not None:
            ends = torch.tensor(batch.lengths).cumsum(0).to(x.device) - 1
            self.w[:, first:first + len(ends), 0] = w[:, 0, ends]
        self.lengths += batch.lengths
        return self.pass_through(x, w, [(first + i, 0, T) for i, T in enumerate(batch.lengths)])

    @torch.inference_mode()
    def extend(self, ids):
        """Further tokens behind those of the only row -> the logits of what follows (1, vocabulary), fp32."""
        x = self.lavin.llama.tok_embeddings(torch.tensor([ids], device=self.lavin.device))
        logits = self.pass_through(x, None if self.w is None else self.w[:, :1], [(0, self.lengths[0], len(ids))])
        self.lengths[0] += len(ids)
        return logits

    def pass_through(self, x, w, places):
        """x (1, ΣT, C) through LLaMA -> the logits behind each prompt of `places`."""
        positions = torch.cat([torch.arange(start, start + T) for _, start, T in places]).to(x.device)
        ends = torch.tensor([T for _, _, T in places]).cumsum(0).to(x.device) - 1
        eager = torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext()
        with self.lavin.autocast(), eager:
            x = self.lavin.llama(x, w, self.caches, positions, Packed(places))
            return self.lavin.llama.output(x[0, ends]).float()

    @torch.inference_mode()
    def step(self, ids):
        """The newest token of each row -> the logits of the next (n, vocabulary), fp32."""
        ids, positions = torch.tensor(ids), torch.tensor(self.lengths)
        self.lengths = [length + 1 for length in self.lengths]
        if self.lavin.device.type == "cuda" and self.w is None:
            return self.replayed(ids, positions)
        S = max(self.lengths)
        S = min(self.S, -(-S // 64) * 64) if self.compiled else S          # few shapes for the compiler
        return self.one_step(ids.to(self.lavin.device), positions.to(self.lavin.device), S)

    def one_step(self, ids, positions, S):
        """Tokens ids (n,) at positions (n,), none beyond S - 1, through LLaMA -> logits (n, vocabulary), fp32."""
        w = None if self.w is None else self.w[:, :len(ids)]
        rows = torch.arange(len(ids), device=ids.device)
        mask = torch.arange(S, device=ids.device) <= positions[:, None, None, None]         # (n, 1, 1, S)
        with self.lavin.autocast():
            x = self.lavin.llama.tok_embeddings(ids[:, None])               # (n, 1, C)
            if self.compiled and len(ids) == 1:
                x = x.float()                                               # see one_product
            x = self.lavin.llama(x, w, self.caches, positions[:, None], (rows, positions, mask))
            return self.lavin.llama.output(x)[:, 0].float()

    def replayed(self, ids, positions):
        """one_step of the next power of two of rows, as a CUDA graph: captured when first needed, then replayed.

        Rows that are not in use write to their first place, which the next prompt writes anew.
        """
        n, size = len(ids), min(self.rows, 1 << (len(ids) - 1).bit_length())
        ids, positions = (F.pad(t, (0, size - n)).to(self.lavin.device) for t in (ids, positions))
        if size not in self.graphs:
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):                      # compiles and warms up; to write the same thrice does no harm
                    self.one_step(ids, positions, self.S)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                logits = self.one_step(ids, positions, self.S)
            self.graphs[size] = graph, ids, positions, logits
        graph, its_ids, its_positions, logits = self.graphs[size]
        its_ids.copy_(ids)
        its_positions.copy_(positions)
        graph.replay()
        return logits[:n]

    def retire(self, row):
        """A row has ended: the last one in use takes its place."""
        last, length = len(self.lengths) - 1, self.lengths[-1]
        if row < last:
            for cached in itertools.chain(*self.caches):
                cached[row, :, :length] = cached[last, :, :length]
            self.lengths[row] = length
            if self.w is not None:
                self.w[:, row] = self.w[:, last]
        self.lengths.pop()


def continued(lavin, prompts, rows, max_new_tokens, temperature=0.0, top_p=1.0, done=None, compiled=False, longest=None):
    """Continue prompts (data.Encoded, in any number, taken as they are needed), up to `rows` at a time. Yields, when one
    has ended, (its number, its new ids).

    Greedy at temperature 0, else sampled from the smallest set of tokens that holds `top_p` of the probability. An answer
    ends at EOS (not kept), after max_new_tokens, at the context's end, or when `done(its ids)` is true.
    longest: tokens of the longest prompt, where the prompts are not a list.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but at least 1")
    longest = longest or max((len(encoded.tokens) for encoded in prompts), default=0)
    context, eos = lavin.max_seq_len - 1, lavin.tokenizer.eos_id()          # the modality token has one place
    decoder = Decoder(lavin, rows, min(longest + max_new_tokens, context), compiled)
    waiting, open_rows = enumerate(prompts), []                             # [(number, length of prompt, new ids)]
    while True:
        fresh = list(itertools.islice(waiting, rows - len(open_rows)))
        logits = [decoder.step([ids[-1] for _, _, ids in open_rows])] if open_rows else []
        if fresh:
            logits.append(decoder.read(data.collate([encoded for _, encoded in fresh], lavin.resolution)))
            open_rows += [(number, len(encoded.tokens), []) for number, encoded in fresh]
        if not open_rows:
            return
        tokens = pick(torch.cat(logits), temperature, top_p).tolist()
        for row in reversed(range(len(open_rows))):
            number, length, ids = open_rows[row]
            if tokens[row] != eos:
                ids.append(tokens[row])
            if tokens[row] == eos or len(ids) == max_new_tokens or length + len(ids) >= context or done and done(ids):
                decoder.retire(row)
                open_rows[row] = open_rows[-1]
                open_rows.pop()
                yield number, ids


def pick(logits, temperature, top_p):
    """(B, vocabulary) -> (B,): the likeliest token, or one drawn from the nucleus of mass top_p."""
    if temperature < 1e-4:                                      # and where dividing by it would overflow
        return logits.argmax(-1)
    p, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0                            # those before a token already hold top_p
    p[:, 0] = p[:, 0].clamp(min=1e-30)                          # top_p = 0: the likeliest
    return order.gather(-1, torch.multinomial(p, 1))[:, 0]
