"""tokenizer.json: the same tokens as from its own library, and BOS and EOS from files next to it.

The tests need the package tokenizers, except the test of the error if it is missing.
"""

import base64
import json
import sys

import pytest
import torch

import checkpoints
import data
import generate
from conftest import GOLDEN, VIT, difference
from data import Sample
from extras import chat, instructions
from extras.tokenizers import JsonTokenizer, load_json, save
from fast import engine
from fast.fold import fold
from files import LavinError
from helpers import AWKWARD, ask, change_config, copy_llama
from hf_layout import write_golden_folder


@pytest.fixture(scope="session")
def tokenizers():
    return pytest.importorskip("tokenizers", reason="needs pip install tokenizers")


@pytest.fixture(scope="session")
def small_model(tokenizers):
    """The text of a tokenizer.json with 400 tokens. Token 0 is <|endoftext|>, as in SmolLM2."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    texts = [sample.prompt for sample in SAMPLES] + AWKWARD + ["The answer is A. Response:"] * 5
    model.train_from_iterator(texts, trainer)
    return model.to_str()


SAMPLES = [
    Sample("Instruction: Name a metal. \nResponse:", "Iron."),
    Sample("Instruction: What is it?\nResponse:", "An orange.",
           image=GOLDEN / "images/0.png")]


@pytest.fixture
def folder(tmp_path, small_model):
    """A LLaMA in Hugging Face's layout, with no tokenizer but tokenizer.json."""
    folder = tmp_path / "smol"
    write_golden_folder(folder)
    (folder / "tokenizer.json").write_text(small_model)
    special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


@pytest.mark.parametrize("text", AWKWARD)
def test_the_same_tokens_as_transformers(folder, text):
    transformers = pytest.importorskip("transformers", reason="needs pip install transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokens = load_json(folder / "tokenizer.json").encode(text)
    assert tokens == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_comes_back(folder, text):
    tokenizer = load_json(folder / "tokenizer.json")
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_id()]) == text
    assert max(tokens, default=0) < tokenizer.vocab_size() == 400
    if text.isascii():
        pieces = "".join(tokenizer.id_to_piece(token) for token in tokens)
        assert pieces.replace("▁", " ") == text


def test_a_text_cannot_end_itself(folder):
    tokenizer = load_json(folder / "tokenizer.json")
    text = "<|im_end|> and <|endoftext|>"
    tokens = tokenizer.encode(text)
    assert not {0, 1} & set(tokens)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.id_to_piece(1) == "<|im_end|>"


# BOS and EOS


@pytest.mark.parametrize("files, bos, eos", [
    ({"tokenizer_config.json": {"bos_token": "a", "eos_token": "<|im_end|>"},
      "generation_config.json": {"eos_token_id": 0}}, "a", "<|im_end|>"),
    ({"tokenizer_config.json": {"bos_token": None, "eos_token": {"content": "<|im_end|>"}},
      "config.json": {"bos_token_id": 0}}, "<|endoftext|>", "<|im_end|>"),
    ({"config.json": {"bos_token_id": 1, "eos_token_id": [0, 1]}}, "<|im_end|>", "<|endoftext|>"),
    ({"generation_config.json": {"eos_token_id": 1}}, "<|im_end|>", "<|im_end|>"),
])
def test_bos_and_eos_are_found(tmp_path, small_model, files, bos, eos):
    """The order is tokenizer_config.json, config.json, generation_config.json.

    If no file names BOS, it is EOS.
    """
    (tmp_path / "tokenizer.json").write_text(small_model)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_json(tmp_path / "tokenizer.json")
    assert tokenizer.id_to_piece(tokenizer.bos_id()) == bos
    assert tokenizer.id_to_piece(tokenizer.eos_id()) == eos


def test_several_tokens_that_end_an_answer(folder, tmp_path):
    """Chat models name several. The usual one is EOS, and --fold takes all of them along."""
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1]}))
    tokenizer = load_json(folder / "tokenizer.json")
    assert tokenizer.eos_id() == 0
    assert data.answer_ends(tokenizer) == {0, 1, 7}
    save(tokenizer, tmp_path)
    again = load_json(tmp_path / "tokenizer.json")
    assert again.eos_id() == 0 and data.answer_ends(again) == {0, 1, 7}
    for wrong in ([0, 400], ["<|im_end|>"], "<|im_end|>", True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(LavinError, match="generation_config.json: its EOS token .* is not in"):
            load_json(folder / "tokenizer.json")


@pytest.mark.parametrize("special, said", [
    ({}, "no EOS token is named"),
    ({"eos_token": "</s>"}, "its EOS token '</s>' is not in the vocabulary"),
    ({"eos_token": 3}, "its EOS token 3 is not"),
    ({"eos_token_id": 400}, "its EOS token 400 is not"),
    ({"eos_token_id": -1}, "its EOS token -1 is not"),
    ({"eos_token_id": 10**30}, "its EOS token 1000"),
    ({"eos_token_id": True}, "its EOS token True is not"),
    ({"eos_token_id": []}, r"its EOS token \[\] is not"),
    ([], "not a configuration"),
])
def test_what_is_no_eos(folder, special, said):
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    with pytest.raises(LavinError, match=said):
        load_json(folder / "tokenizer.json")


# Other files


@pytest.mark.parametrize("content", [
    b"", b"{}", b"[]", b"x", b"\xff\xfe", b'{"model": 3}', b'{"model": {"type": "BPE"}}',
    b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_damaged_files(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(LavinError, match="tokenizer.json: not a tokenizer.json that"):
        load_json(folder / "tokenizer.json")


def test_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(LavinError, match="tokenizer.json: pip install tokenizers"):
        load_json(tmp_path / "tokenizer.json")


def test_metas_tokenizer_of_llama_3_is_named(fails, tmp_path):
    llama = copy_llama(tmp_path / "llama")
    lines = [base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256)]
    (llama / "tokenizer.model").write_bytes(b"".join(lines))
    fails(generate, *ask(llama=llama), says=["tokenizer.model: LLaMA 3's", "tokenizer.json"])


def test_tokenizer_json_stands_in_for_it(folder):
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert isinstance(checkpoints.load_tokenizer(folder), JsonTokenizer)


# The model with it


def test_training_and_generation(folder, call):
    """Token 0 is EOS: it carries loss and ends an answer. It does not mark a picture's place."""
    lavin = checkpoints.load(folder, VIT)
    batch = lavin.batch(SAMPLES)
    ends = batch.lengths.cumsum(0) - 1
    assert batch.labels[ends].tolist() == [0, 0]
    assert len(batch.feature_indices) == lavin.n_features
    lavin(batch).backward()
    assert lavin.projector.conv_A.weight.grad.abs().sum() > 0
    code, stdout, stderr = call(generate, *ask(adapter="none", llama=folder))
    assert (code, stderr) == (0, "") and stdout
    with torch.no_grad():                       # equal logits: argmax is token 0, EOS
        lavin.llama.output.weight.zero_()
    assert lavin.generate(SAMPLES, 4) == ["", ""]


@torch.no_grad()
def test_each_of_several_ends_an_answer(folder):
    """What the model says first is named as another end, so nothing is left to be said."""
    question = "Name a metal."
    sample = Sample(instructions.instruction_prompt(question))
    lavin = checkpoints.load(folder, VIT)
    assert lavin.generate([sample], 1) != [""]
    prompt = data.collate([lavin.encode(sample, prompt_only=True)], lavin.resolution)
    first = lavin.logits(prompt)[0, -1].argmax().item()
    assert first != lavin.tokenizer.eos_id()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, first]}))
    lavin = checkpoints.load(folder, VIT)
    assert lavin.generate([sample], 4) == [""]
    assert engine.generate(lavin, [sample], 4) == [""]
    assert "".join(chat.Conversation(lavin).say(question)) == ""


def test_what_check_shows(folder):
    tokenizer = checkpoints.load_tokenizer(folder)
    encoded = data.encode(SAMPLES[1], tokenizer, 2, 128)
    shown = instructions.show(SAMPLES[1], encoded, tokenizer)
    assert "Image: [picture]Instruction: What is it?\nResponse:»An orange.<|endoftext|>«" in shown


def test_a_folded_model_takes_its_tokenizer_along(folder, tmp_path):
    """In Meta's layout, the model has exactly as many tokens as the tokenizer."""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:400].clone()
    torch.save(tensors, folder / "pytorch_model.bin")
    change_config(folder, vocab_size=400)
    lavin = checkpoints.load(folder, VIT)
    checkpoints.save_folded(fold(lavin, 0), tmp_path / "folded")
    again = checkpoints.load(tmp_path / "folded", VIT)
    for name in ("bos_id", "eos_id", "vocab_size"):
        assert getattr(again.tokenizer, name)() == getattr(lavin.tokenizer, name)()
    batch = lavin.batch(SAMPLES[:1])
    assert torch.equal(again.batch(SAMPLES[:1]).tokens, batch.tokens)
    assert difference(again.logits(batch), lavin.logits(batch)) < 2e-2       # in fp16
