"""Folding, the cache, continuous batching: each is another way to the numbers of the whole sequence at once."""

import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import torch

import adapters
import data
from conftest import ADAPTER, LLAMA, VIT, difference
from decode import Decoder, Packed, attend_packed, attend_step, continued
from model import LaVIN, save_folded

TEXTS = [data.Sample(f"Instruction: {'Name a metal. ' * n}\nResponse:") for n in (1, 5, 2, 1, 3, 4, 2)]


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


# Folding


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("modality", [0, 1])
def test_folded_is_unfolded(samples, modality, dtype, allowed):
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER, dtype=dtype)
    batch = lavin.batch([s for s in samples if (s.image is not None) == modality])
    before = lavin.logits(batch).detach()
    folded = lavin.fold(modality)
    assert not any(isinstance(m, adapters.Adapter) for m in folded.llama.modules())
    assert relative(folded.logits(batch).detach(), before) < allowed
    exact = LaVIN.load(LLAMA, VIT, ADAPTER).logits(batch).detach()
    assert relative(folded.logits(batch).detach(), exact) < 1.2 * relative(before, exact) + 1e-5        # rounding costs what it did
    assert difference(lavin.logits(batch), before) == 0                     # what was folded from is as it was
    shared = {p.data_ptr() for p in lavin.parameters()}
    copied = {name for name, p in folded.named_parameters() if p.data_ptr() not in shared}
    assert copied == {f"llama.layers.{i}.attention.{name}.{kind}" for i in range(4) for name in ("wq", "wk", "wv") for kind in ("weight", "bias")}


@pytest.mark.parametrize("bits", [8, 4])
def test_folded_packed_is_unfolded_packed(samples, bits):
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER, bits=bits)
    batch = lavin.batch(samples[:1])
    assert difference(lavin.fold(1).logits(batch), lavin.logits(batch)) < 1e-4


def test_a_batch_of_the_other_modality_is_refused(lavin, samples):
    with pytest.raises(ValueError, match="folded for modality 0"):
        lavin.fold(0).logits(lavin.batch(samples))


def test_what_cannot_be_folded(lavin):
    for model, modality in ((lavin.fold(0), 0), (lavin, 2), (lavin, -1)):
        with pytest.raises(ValueError, match="fold"):
            model.fold(modality)


def test_a_folded_llama_can_be_saved_and_loaded(lavin, samples, call, tmp_path):
    batch = lavin.batch([s for s in samples if s.image is None])
    code, stdout, stderr = call(adapters, ADAPTER, "--llama", LLAMA, "--vit", VIT, "--fold", tmp_path / "folded")
    assert (code, stderr) == (0, "") and "folded" in stdout
    assert json.loads((tmp_path / "folded" / "params.json").read_text())["attention_bias"] is True
    alone = LaVIN.load(tmp_path / "folded", VIT)                            # fresh adapters are the identity
    alone.max_seq_len = lavin.max_seq_len
    assert relative(alone.logits(batch).detach(), lavin.logits(batch).detach()) < 5e-3          # rounded to fp16
    assert relative(alone.fold(0).logits(batch).detach(), alone.logits(batch).detach()) < 1e-5  # as generate.py will do
    packed = LaVIN.load(tmp_path / "folded", VIT, bits=8)
    assert relative(packed.logits(batch).detach(), lavin.logits(batch).detach()) < 5e-2


def test_a_folded_llama_that_nobody_could_use(lavin, call, sqa, tmp_path):
    import train
    with pytest.raises(ValueError, match="no place for the ViT"):
        save_folded(lavin.fold(1), tmp_path / "folded")
    save_folded(lavin.fold(0), tmp_path / "folded")
    paths = ("--llama", tmp_path / "folded", "--vit", VIT)
    for script, args, says in ((adapters, (ADAPTER, *paths, "--fold", tmp_path / "folded"), "folded into it already"),
                               (adapters, (ADAPTER, "--llama", LLAMA, "--vit", VIT, "--fold", tmp_path / "folded"), "holds a model already"),
                               (train, ("--data", "sqa", "--data-root", sqa, *paths, "--out", tmp_path / "out"), "folded into it")):
        code, _, stderr = call(script, *args)
        assert code == 2 and says in stderr


# The cache


@pytest.mark.parametrize("fold", [True, False])
def test_cached_decoding_is_recomputation(lavin, samples, fold):
    """Prompts read packed, of ragged lengths, then a token at a time: the logits of the whole sequence at once."""
    samples = [s for s in samples if s.image is not None] if fold else samples
    batch = lavin.batch(samples)
    whole = lavin.logits(batch).detach()
    encoded = [lavin.encode(s) for s in samples]
    half = [data.replace(e, tokens=e.tokens[:len(e.tokens) // 2], labels=e.labels[:len(e.tokens) // 2]) for e in encoded]
    decoder = Decoder(lavin.fold(1) if fold else lavin, len(samples), 128)
    logits = decoder.read(data.collate(half, lavin.resolution))
    for i in range(min(len(e.tokens) - len(h.tokens) for e, h in zip(encoded, half))):
        places = [len(h.tokens) + i for h in half]
        assert difference(logits, torch.stack([row[place - 1] for row, place in zip(whole, places)])) < 1e-4
        logits = decoder.step([int(e.tokens[place]) for e, place in zip(encoded, places)])


def test_a_cache_that_is_extended(lavin, samples):
    batch = lavin.batch(samples[:1])
    whole, tokens, encoded = lavin.logits(batch).detach(), batch.tokens.tolist(), lavin.encode(samples[0])
    start = data.replace(encoded, tokens=encoded.tokens[:20], labels=encoded.labels[:20])
    decoder = Decoder(lavin.fold(1), 1, 128)
    decoder.read(data.collate([start], lavin.resolution))
    assert difference(decoder.extend(tokens[20:30])[0], whole[0, 29]) < 1e-4
    assert difference(decoder.extend(tokens[30:31])[0], whole[0, 30]) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
def test_grouped_queries_over_the_cache(compiled):
    """Two prompts packed, then a step of both: causal attention with each key repeated for its queries."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 6, 16) for heads in (4, 2, 2))
    full = torch.nn.functional.scaled_dot_product_attention(q, *(t.repeat_interleave(2, dim=1) for t in (k, v)), is_causal=True)
    lengths, cache = (5, 3), (torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 8, 16))
    packed = [torch.cat([t[row:row + 1, :, :n] for row, n in enumerate(lengths)], dim=2) for t in (q, k, v)]
    y = attend_packed(*packed, cache, Packed([(row, 0, n) for row, n in enumerate(lengths)]))
    assert difference(y, torch.cat([full[row:row + 1, :, :n] for row, n in enumerate(lengths)], dim=2)) < 1e-6
    rows, positions = torch.arange(2), torch.tensor(lengths)
    step = torch.compile(attend_step, backend="eager") if compiled else attend_step
    y = step(*(t[rows, :, positions][:, :, None] for t in (q, k, v)), cache, (rows, positions, torch.arange(6) <= positions[:, None, None, None]))
    assert difference(y[:, :, 0], full[rows, :, positions]) < 1e-6


# Continuous batching


def test_a_ragged_batch_generates_what_each_sample_does_alone(lavin, samples):
    assert lavin.generate(samples, 20) == [lavin.generate([s], 20)[0] for s in samples]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
@pytest.mark.parametrize("fold", [True, False])
def test_prompts_that_take_turns_in_few_rows_go_on_as_alone(lavin, monkeypatch, rows, fold):
    """Answers of 2 to 8 tokens: rows end at different times, others move into their places, the next prompts come in."""
    model = lavin.fold(0) if fold else lavin
    encoded = [lavin.encode(s, prompt_only=True) for s in TEXTS]
    whole = [dict(continued(model, [e], 1, 8))[0] for e in encoded]
    ends = [tuple(ids[:n]) for ids, n in zip(whole, (2, 8, 3, 5, 2, 7, 4))]
    assert len(set(ends)) > 4
    widths, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, ids: widths.append(len(ids)) or step(self, ids))
    new = dict(continued(model, encoded, rows, 8, done=lambda ids: tuple(ids) in ends))
    assert all(tuple(ids) in ends and whole[i][:len(ids)] == ids for i, ids in new.items()) and len(new) == len(TEXTS)
    assert sum(widths) == sum(len(ids) - 1 for ids in new.values())         # no step is spent on what is done


def test_steps_that_are_recorded_and_replayed(lavin, monkeypatch):
    """The code of CUDA graphs without CUDA: what is recorded runs again on the tensors that it was recorded with, and no others."""
    calls, one_step = [], Decoder.one_step

    def recorded(decoder, *tensors):
        logits = one_step(decoder, *tensors)
        calls.append(lambda: logits.copy_(one_step(decoder, *tensors)))
        return logits

    class Graph:
        def replay(self):
            self.call()

    @contextlib.contextmanager
    def capture(graph):
        yield
        graph.call = calls[-1]
        sizes.append(len(calls))

    sizes, stream, model = [], SimpleNamespace(wait_stream=lambda other: None), lavin.fold(0)
    for name, fake in {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext, "CUDAGraph": Graph,
                       "graph": capture}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(Decoder, "one_step", recorded)
    plain, graphs = Decoder(model, 5, 100), Decoder(model, 5, 100)
    first, more = ([model.encode(s, prompt_only=True) for s in samples] for samples in (TEXTS[:3], TEXTS[3:5]))
    for prompts, n_steps in ((first, 3), (None, 2), (more, 3), (None, 2)):
        for decoder in (plain, graphs):
            decoder.read(data.collate(prompts, lavin.resolution)) if prompts else decoder.retire(0)
        for token in range(5, 5 + n_steps):
            ids = [token + row for row in range(len(plain.lengths))]
            with torch.inference_mode():
                replayed = graphs.replayed(torch.tensor(ids), torch.tensor(graphs.lengths)).clone()
            graphs.lengths = [length + 1 for length in graphs.lengths]
            assert difference(replayed, plain.step(ids)) < 1e-5
    assert len(sizes) == 2                                                  # 3 and 4 rows share a recording, as do 2 alone


def test_generation_stops_at_the_context_and_at_done(lavin, samples):
    encoded = [lavin.encode(s, prompt_only=True) for s in samples]
    new = dict(continued(lavin, encoded, 4, 1000))
    assert max(len(e.tokens) + len(new[i]) for i, e in enumerate(encoded)) == 127            # and one for the modality token
    short = dict(continued(lavin, encoded, 4, 1000, done=lambda ids: len(ids) == 3))
    assert short == {i: ids[:3] for i, ids in new.items()}


def test_sampling(lavin, samples):
    torch.manual_seed(0)
    first = lavin.generate(samples[:1], 12, temperature=1.0, top_p=0.9)
    torch.manual_seed(0)
    assert lavin.generate(samples[:1], 12, temperature=1.0, top_p=0.9) == first
    assert lavin.generate(samples[:1], 12, temperature=1.0, top_p=1e-9) == lavin.generate(samples[:1], 12)


@pytest.mark.parametrize("bits, rows", [(16, 1), (16, 2), (8, 1), (4, 1)])
def test_compiled_steps_are_eager_steps(bits, rows, monkeypatch):
    """bf16, where a compiled step of one row computes in fp32 what an eager one rounds. The compiler but for its last part, which
    takes half a minute to write C++: tests/bench.py runs that."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    lavin = LaVIN.load(LLAMA, VIT, ADAPTER, bits=bits, dtype=torch.bfloat16)
    lavin.llama.layers = lavin.llama.layers[:1]
    batch = data.collate([lavin.encode(s, prompt_only=True) for s in TEXTS[:rows]], lavin.resolution)
    eager, compiled = (Decoder(lavin.fold(0), rows, 128, compiled) for compiled in (False, True))
    assert difference(eager.read(batch), compiled.read(batch)) == 0
    for token in (5, 70, 200):
        assert relative(compiled.step([token] * rows), eager.step([token] * rows)) < 2e-2
