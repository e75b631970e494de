"""Generation with a cache agrees with computing the whole sequence, whatever the batch."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import checkpoints
import data
from conftest import ADAPTER, LLAMA, VIT, difference, relative_error
from fast import engine
from fast.engine import Engine, PromptCache, StepCache, continue_prompts, in_groups
from fast.fold import fold

# Seven prompts of five lengths
TEXTS = [data.Sample(f"Instruction: {'Name a metal. ' * n}\nResponse:")
         for n in (1, 5, 2, 1, 3, 4, 2)]


def encode_prompts(lavin, samples):
    return [lavin.encode(sample, prompt_only=True) for sample in samples]


# The engine gives the same tokens as LaVIN.generate, which recomputes everything for each token


def test_generate_says_the_same_as_the_plain_loop(lavin, samples):
    """This holds for both modalities in one list, and for any number of rows."""
    plain = lavin.generate(samples, 20)
    assert len(set(plain)) == len(samples)
    for rows in (1, 3, 32):
        assert engine.generate(lavin, samples, 20, n_rows=rows) == plain


@pytest.mark.parametrize("modality", [0, 1])
def test_generate_of_a_folded_model_says_the_same(lavin, samples, modality):
    """The folded engine, the folded plain loop and the plain loop with adapters agree."""
    samples = [sample for sample in samples if (sample.image is not None) == modality]
    folded = fold(lavin, modality)
    plain = lavin.generate(samples, 20)
    assert engine.generate(folded, samples, 20) == plain
    assert folded.generate(samples, 20) == plain


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (2.0, 0.5)])
def test_generate_draws_the_same_as_the_plain_loop(lavin, samples, temperature, top_p):
    """With one row the engine draws in the same order as the plain loop: prompt by prompt."""
    torch.manual_seed(0)
    plain = lavin.generate(samples, 12, temperature, top_p)
    torch.manual_seed(0)
    assert engine.generate(lavin, samples, 12, temperature, top_p, n_rows=1) == plain
    assert plain != lavin.generate(samples, 12)


def test_generate_stops_at_the_end_of_the_context_as_the_plain_loop_does(lavin, samples):
    samples = samples[:2]           # with a picture and without
    plain = lavin.generate(samples, 1000)
    assert engine.generate(lavin, samples, 1000) == plain
    torch.manual_seed(0)
    plain = lavin.generate(samples, 1000, temperature=1.0)
    torch.manual_seed(0)
    assert engine.generate(lavin, samples, 1000, temperature=1.0, n_rows=1) == plain


def test_both_stop_at_eos(lavin, samples, monkeypatch):
    """If one of the generated tokens is declared EOS, the text ends before it."""
    prompts = encode_prompts(lavin, samples)
    ids = dict(continue_prompts(lavin, prompts, 4, 20))
    eos = ids[0][3]
    monkeypatch.setattr(lavin.tokenizer, "eos_id", lambda: eos)
    expected = []
    for i in range(len(samples)):
        n_kept = ids[i].index(eos) if eos in ids[i] else 20
        expected.append(ids[i][:n_kept])
    assert len(expected[0]) < 20
    new_ids = dict(continue_prompts(lavin, prompts, 4, 20))
    assert [new_ids[i] for i in range(len(samples))] == expected
    assert lavin.generate(samples, 20) == [lavin.tokenizer.decode(kept) for kept in expected]


def test_sampling(lavin, samples):
    """The same seed gives the same tokens, and a nucleus of one token is greedy decoding."""
    torch.manual_seed(0)
    first = engine.generate(lavin, samples[:1], 12, temperature=1.0, top_p=0.9)
    torch.manual_seed(0)
    assert engine.generate(lavin, samples[:1], 12, temperature=1.0, top_p=0.9) == first
    greedy = engine.generate(lavin, samples[:1], 12)
    assert engine.generate(lavin, samples[:1], 12, temperature=1.0, top_p=1e-9) == greedy


# The cache


@pytest.mark.parametrize("folded", [True, False])
def test_cached_decoding_is_recomputation(lavin, samples, folded):
    """Prompts of different lengths are read together, then continued token by token.

    The logits of each step equal those of the whole sequences, computed at once.
    """
    model = lavin
    if folded:
        samples = [sample for sample in samples if sample.image is not None]
        model = fold(lavin, 1)
    whole = lavin.logits(lavin.batch(samples)).detach()             # (B, T, vocabulary)
    encoded = [lavin.encode(sample) for sample in samples]
    halves = [data.cut(e, len(e.tokens) // 2) for e in encoded]
    lengths = [len(half.tokens) for half in halves]
    n_steps = min(len(e.tokens) - length for e, length in zip(encoded, lengths))
    assert n_steps > 5

    model_engine = Engine(model, len(samples), 128)
    logits = model_engine.prefill(data.collate(halves, lavin.resolution))
    for i in range(n_steps):
        expected = []
        newest = []
        for row, (e, length) in enumerate(zip(encoded, lengths)):
            expected.append(whole[row, length + i - 1])
            newest.append(int(e.tokens[length + i]))
        assert difference(logits, torch.stack(expected)) < 1e-4
        logits = model_engine.step(newest)


def test_a_cache_that_is_extended(lavin, samples):
    """After 20 tokens, 10 more and one more, the logits equal those of the whole sequence."""
    encoded = lavin.encode(samples[0])
    tokens = encoded.tokens.tolist()
    whole = lavin.logits(lavin.batch(samples[:1])).detach()
    folded_engine = Engine(fold(lavin, 1), 1, 128)
    start = data.collate([data.cut(encoded, 20)], lavin.resolution)
    assert difference(folded_engine.prefill(start)[0], whole[0, 19]) < 1e-4
    assert difference(folded_engine.extend(tokens[20:30])[0], whole[0, 29]) < 1e-4
    assert difference(folded_engine.extend(tokens[30:31])[0], whole[0, 30]) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_queries_over_the_cache(compiled):
    """Two prompts are read together, then continued by one step.

    The result equals causal attention in which each key is repeated for the queries that share it.
    """
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 16)
    k = torch.randn(2, 2, 6, 16)
    v = torch.randn(2, 2, 6, 16)
    full = F.scaled_dot_product_attention(
        q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1), is_causal=True)

    def concatenate(x):
        """The first 5 tokens of row 0 and the first 3 of row 1."""
        return torch.cat([x[:1, :, :5], x[1:, :, :3]], dim=2)

    keys = torch.zeros(3, 2, 8, 16)
    values = torch.zeros(3, 2, 8, 16)
    cache = PromptCache(keys, values, [(0, 0, 5), (1, 0, 3)])
    y = cache.attend(concatenate(q), concatenate(k), concatenate(v))
    assert difference(y, concatenate(full)) < 1e-6

    rows = torch.arange(2)
    positions = torch.tensor([5, 3])
    mask = torch.arange(6) <= positions[:, None, None, None]
    cache = StepCache(keys, values, rows, positions, mask)
    attend = cache.attend
    if compiled:
        attend = torch.compile(cache.attend, backend="eager", fullgraph=True)
    newest = [x[rows, :, positions][:, :, None] for x in (q, k, v)]
    y = attend(*newest)
    assert difference(y[:, :, 0], full[rows, :, positions]) < 1e-6


# Continuous batching


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("folded", [True, False])
def test_prompts_that_take_turns_in_few_rows_go_on_as_alone(lavin, monkeypatch, rows, folded):
    """Answers have 2 to 8 tokens. When a row ends, another moves into its place, and a waiting
    prompt starts.
    """
    model = fold(lavin, 0) if folded else lavin
    prompts = encode_prompts(lavin, TEXTS)
    alone = []
    for prompt in prompts:
        answers = dict(continue_prompts(model, [prompt], 1, 8))
        alone.append(answers[0])
    ends = []
    for ids, n_tokens in zip(alone, (2, 8, 3, 5, 2, 7, 4)):
        ends.append(ids[:n_tokens])
    assert len({tuple(ids) for ids in ends}) > 4

    widths = []
    step = Engine.step

    def counted_step(model_engine, ids):
        widths.append(len(ids))
        return step(model_engine, ids)

    def done(ids):
        return ids in ends

    monkeypatch.setattr(Engine, "step", counted_step)
    answers = dict(continue_prompts(model, prompts, rows, 8, done=done))
    assert len(answers) == len(TEXTS)
    for number, ids in answers.items():
        assert ids in ends
        assert ids == alone[number][:len(ids)]
    # No step computes a row for a prompt that has ended.
    assert sum(widths) == sum(len(ids) - 1 for ids in answers.values())
    assert max(widths) <= rows


def test_generation_stops_at_the_context_and_at_done(lavin, samples):
    prompts = encode_prompts(lavin, samples)
    answers = dict(continue_prompts(lavin, prompts, 4, 1000))
    totals = [len(prompt.tokens) + len(answers[i]) for i, prompt in enumerate(prompts)]
    assert max(totals) == 127                   # the modality token is the 128th

    def done(ids):
        return len(ids) == 3

    short = dict(continue_prompts(lavin, prompts, 4, 1000, done=done))
    assert short == {i: ids[:3] for i, ids in answers.items()}


def test_prompts_may_come_from_an_iterator(lavin):
    """A prompt is taken once there is a row for it. `longest` says how much room they need."""
    prompts = encode_prompts(lavin, TEXTS)
    longest = max(len(prompt.tokens) for prompt in prompts)
    taken = []

    def one_by_one():
        for number, prompt in enumerate(prompts):
            taken.append(number)
            yield prompt

    answers = continue_prompts(lavin, one_by_one(), 2, 5, longest=longest)
    first = next(answers)
    assert taken == [0, 1]
    assert dict([first, *answers]) == dict(continue_prompts(lavin, prompts, 2, 5))


def test_no_new_tokens_are_refused(lavin):
    with pytest.raises(ValueError, match="at least 1"):
        next(continue_prompts(lavin, encode_prompts(lavin, TEXTS[:1]), 1, 0))


# CUDA graphs and the compiler


class FakeGraph:
    """A CUDA graph without CUDA: it remembers the last one_step and runs it again.

    Like a real graph, it uses the tensors of the capture and writes the result in place.
    """
    steps = []          # every one_step so far, as a function without arguments
    n_captured = 0

    def replay(self):
        self.step()


@contextlib.contextmanager
def capture(graph):
    yield
    graph.step = FakeGraph.steps[-1]
    FakeGraph.n_captured += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    one_step = Engine.one_step

    def remembered_step(model_engine, *tensors):
        logits = one_step(model_engine, *tensors)

        def again():
            logits.copy_(one_step(model_engine, *tensors))

        FakeGraph.steps.append(again)
        return logits

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(FakeGraph, "steps", [])
    monkeypatch.setattr(FakeGraph, "n_captured", 0)
    monkeypatch.setattr(Engine, "one_step", remembered_step)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)


def test_steps_that_are_captured_and_replayed(lavin, fake_cuda):
    """replay_step equals step while rows come and go: first 3 rows, then 2, 4 and 3."""
    folded = fold(lavin, 0)
    plain = Engine(folded, 5, 100)
    replaying = Engine(folded, 5, 100)

    def read(texts):
        batch = data.collate(encode_prompts(lavin, texts), lavin.resolution)
        plain.prefill(batch)
        replaying.prefill(batch)

    def retire():
        plain.retire(0)
        replaying.retire(0)

    def compare(n_steps):
        n = len(plain.lengths)
        for token in range(5, 5 + n_steps):
            ids = list(range(token, token + n))
            with torch.inference_mode():
                positions = torch.tensor(replaying.lengths)
                replayed = replaying.replay_step(torch.tensor(ids), positions).clone()
            replaying.lengths = [length + 1 for length in replaying.lengths]
            assert difference(replayed, plain.step(ids)) < 1e-5

    read(TEXTS[:3])
    compare(3)
    retire()
    compare(2)
    read(TEXTS[3:5])
    compare(3)
    retire()
    compare(2)
    assert FakeGraph.n_captured == 2            # one graph for 3 and 4 rows, one for 2


@pytest.fixture
def compiler_without_code(monkeypatch):
    """torch.compile leaves out the compiler's last part.

    That part writes C++, which takes half a minute. bench/speed.py runs it.
    """
    without_code = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", without_code)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def count_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("bits, rows", [(16, 1), (16, 2), (8, 1), (4, 1)])
def test_compiled_steps_are_eager_steps(bits, rows, compiler_without_code):
    """The steps are in bf16. A compiled step of one row keeps fp32 where an eager step rounds."""
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, bits=bits, dtype=torch.bfloat16)
    lavin.llama.layers = lavin.llama.layers[:1]
    batch = data.collate(encode_prompts(lavin, TEXTS[:rows]), lavin.resolution)
    eager = Engine(fold(lavin, 0), rows, 128)
    compiled = Engine(fold(lavin, 0), rows, 128, compiled=True)
    assert difference(eager.prefill(batch), compiled.prefill(batch)) == 0
    assert count_graphs() == 0                  # prompts are read without the compiler
    for token in (5, 70, 200):
        ids = [token] * rows
        assert relative_error(compiled.step(ids), eager.step(ids)) < 2e-2


@pytest.mark.parametrize("n_layers, size", [(32, 8), (30, 6), (40, 8), (5, 5), (11, 1), (1, 1)])
def test_groups_of_layers_are_equally_large(n_layers, size):
    layers = list(range(n_layers))
    groups = [layers[group] for group in in_groups(n_layers)]
    assert [len(group) for group in groups] == [size] * (n_layers // size)
    assert sum(groups, []) == layers


@pytest.mark.parametrize("bits", [16, 8])
def test_compiled_steps_share_two_graphs(bits, compiler_without_code, monkeypatch):
    """There is one graph for all groups of layers and one for `output`, for any position."""
    monkeypatch.setattr(engine, "LAYERS_PER_GRAPH", 2)
    lavin = checkpoints.load(LLAMA, VIT, ADAPTER, bits=bits, dtype=torch.bfloat16)
    compiled = Engine(fold(lavin, 0), 1, 256, compiled=True)
    assert compiled.groups == [slice(0, 2), slice(2, 4)]
    compiled.prefill(data.collate(encode_prompts(lavin, TEXTS[:1]), lavin.resolution))
    while compiled.lengths[0] < 256:
        compiled.step([5])
        assert count_graphs() == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_prompts_that_take_turns_go_on_as_eager_ones(lavin, compiler_without_code):
    """A graph is for one row or for any number of rows. There is none for each number of rows."""
    lavin.llama.layers = lavin.llama.layers[:1]
    prompts = encode_prompts(lavin, TEXTS)
    eager = dict(continue_prompts(fold(lavin, 0), prompts, 5, 12))
    n_graphs = []
    for rows in (5, 3, 4, 7):
        compiled = continue_prompts(fold(lavin, 0), prompts, rows, 12, compiled=True)
        assert dict(compiled) == eager
        n_graphs.append(count_graphs())
    assert n_graphs[1] <= 6
    assert n_graphs[3] == n_graphs[1]


# Branches


def test_a_branch_sees_its_prompt_alone_and_leaves_no_trace(lavin, samples):
    """A branch gives the logits of a step with the same token, and later steps do not change."""
    batch = data.collate(encode_prompts(lavin, samples), lavin.resolution)
    tokens = [5, 6, 7, 8]
    stepped = Engine(lavin, 4, 128)
    stepped.prefill(batch)
    expected = stepped.step(tokens)
    branched = Engine(lavin, 4, 128)
    branched.prefill(batch)
    logits = branched.branch([(1, [9, 10]), (1, [6]), (3, [8]), (0, [5, 11, 12])])
    assert logits.shape == (7, lavin.llama.config.vocab_size)
    assert difference(logits[2], expected[1]) < 1e-4
    assert difference(logits[3], expected[3]) < 1e-4
    assert difference(logits[4], expected[0]) < 1e-4
    assert difference(branched.step(tokens), expected) < 1e-4
