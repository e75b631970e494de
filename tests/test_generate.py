"""Answers and scores from the command line, with what a training run left behind."""

import json

import torch
import torch.nn.functional as F

import data
import generate
import tiny
import train
from conftest import ADAPTER, LLAMA, VIT
from decode import Decoder
from model import LaVIN
from test_train import flags

GOLDEN_FLAGS = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)


def test_a_single_prompt_is_streamed(call, lavin, samples, expected):
    prompt = samples[0]
    code, stdout, stderr = call(generate, "--prompt", prompt.prompt, "--image", prompt.image, *GOLDEN_FLAGS, "--max-new-tokens", 12)
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1] == lavin.tokenizer.decode([t for t in expected["greedy"][0].tolist() if t >= 0])


def test_a_plain_question_becomes_an_instruction(call, samples):
    answers = [call(generate, "--prompt", text, *GOLDEN_FLAGS, "--max-new-tokens", 5)[1].splitlines()[-1]
               for text in ("Name a metal.", samples[3].prompt)]
    assert answers[0] == answers[1]


def test_seeded_sampling(call):
    def answer(seed):
        return call(generate, "--prompt", "Name a metal.", *GOLDEN_FLAGS, "--temperature", 1, "--top-p", 0.9, "--seed", seed)[1]

    assert answer(1) == answer(1) != answer(2)


def test_seeded_sampling_of_a_data_set(call, sqa, tmp_path):
    def outputs(seed):
        path = tmp_path / f"{seed}.json"
        assert call(generate, "--data", "sqa", "--data-root", sqa, *GOLDEN_FLAGS, "--temperature", 1, "--seed", seed,
                    "--max-seq-len", 200, "--max-new-tokens", 4, "--predictions", path)[0] == 0
        return json.loads(path.read_text())["outputs"]

    assert outputs(1) == outputs(1) != outputs(2)


def test_what_training_knew_need_not_be_said_again(call, sqa, tmp_path, monkeypatch):
    assert call(train, *flags(sqa, tmp_path / "out", "--format", "CQM-A", "--max-steps", 2, "--captions"))[0] == 0
    monkeypatch.chdir(tmp_path)                             # OUT is the default `out`, the paths are absolute
    code, stdout, stderr = call(generate, "--data", "sqa", "--split", "test", "--predictions", "p.json", "--max-new-tokens", 8)
    assert (code, stderr) == (0, "")
    assert "format CQM-A" in stdout and "12 problems" in stdout and "12 of 12 outputs name no valid choice" in stdout
    assert stdout.split("NAT")[1].split()[:8] == list(data.COLUMNS[1:])
    written = json.loads((tmp_path / "p.json").read_text())
    assert set(written) == {"results", "outputs"} and set(written["results"].values()) == {-1}
    assert set(written["outputs"]) == {str(i) for i in range(32, 44)}


def test_a_sample_ends_as_soon_as_its_letter_is_out(sqa, monkeypatch):
    """With a model that says "The answer is B. …": the text stops at the letter where the format lets it."""
    lavin = LaVIN.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = data.load_sqa(sqa, "test")
    text_only = [s for s in samples if s.image is None]
    said = lavin.tokenizer.encode("The answer is B. BECAUSE: it is so.")

    def logits(decoder):
        """Of the next token of every row, as many as it has gone beyond its prompt."""
        return torch.stack([F.one_hot(torch.tensor([*said, 2])[n - start], 512).float() for n, start in zip(decoder.lengths, decoder.starts)])

    def read(decoder, batch):
        decoder.starts, first = decoder.starts[:len(decoder.lengths)] + batch.lengths, len(decoder.lengths)
        decoder.lengths += batch.lengths
        return logits(decoder)[first:]

    def step(decoder, ids):
        decoder.lengths = [length + 1 for length in decoder.lengths]
        return logits(decoder)

    def retire(decoder, row):
        for numbers in (decoder.lengths, decoder.starts):
            numbers[row] = numbers[-1]
            numbers.pop()

    for name, method in {"starts": [], "read": read, "step": step, "retire": retire}.items():
        monkeypatch.setattr(Decoder, name, method, raising=False)
    assert set(generate.answer_all(lavin, text_only, "QCM-ALE").values()) == {"The answer is B"}
    assert set(generate.answer_all(lavin, text_only, "QCM-LEA").values()) == {"The answer is B. BECAUSE: it is so."}
    predictions, _ = generate.score(lavin, problems, text_only, "QCM-ALE")
    assert set(predictions.values()) == {1}


def test_a_letter_that_is_no_choice_is_not_an_answer(sqa, monkeypatch, capsys):
    lavin = LaVIN.load(LLAMA, VIT, max_seq_len=300)
    problems, samples = data.load_sqa(sqa, "test")
    monkeypatch.setattr(generate, "answer_all", lambda *_, **how: {s.id: "The answer is E." for s in samples})
    predictions, _ = generate.score(lavin, problems, samples, "QCM-ALE")
    assert set(predictions.values()) == {-1} and "12 of 12" in capsys.readouterr().out


def test_prompts_that_do_not_fit_count_as_wrong(call, sqa):
    code, stdout, _ = call(generate, "--data", "sqa", "--data-root", sqa, *GOLDEN_FLAGS, "--max-seq-len", 90, "--max-new-tokens", 2)
    assert code == 0 and "do not fit the context of 90" in stdout and "0/12" in stdout


def test_letters_are_what_greedy_generation_says_where_the_answer_comes_first(call, tmp_path):
    """On the small world's LLaMA, which answers in words alone without an adapter."""
    root = tmp_path / "world"
    tiny.write_world(root, sizes=(1, 1, 60))
    read = {}
    for name, more in (("greedy", ("--max-new-tokens", 8)), ("letters", ("--score", "letters"))):
        path = tmp_path / f"{name}.json"
        code, stdout, stderr = call(generate, "--data", "sqa", "--data-root", root, "--llama", tiny.PATHS["llama"], "--vit", tiny.PATHS["vit"],
                                    "--adapter", "none", "--max-seq-len", 160, "--predictions", path, *more)
        assert (code, stderr) == (0, "")
        read[name] = json.loads(path.read_text())["results"]
    greedy = {pid: index for pid, index in read["greedy"].items() if index >= 0}
    assert len(greedy) > 30 and all(read["letters"][pid] == index for pid, index in greedy.items())
    assert -1 not in read["letters"].values() and "0 of 60 outputs" in stdout


def test_letters_need_a_data_set_with_choices(call):
    assert call(generate, "--prompt", "x", "--score", "letters", *GOLDEN_FLAGS)[0] == 2
    assert call(generate, "--data", "sqa", "--score", "letters", "--temperature", 1, *GOLDEN_FLAGS)[0] == 2
