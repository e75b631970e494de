"""Answers and scores from the command line, with what a training run left behind."""

import json

import generate
import train
from conftest import ADAPTER, LLAMA, VIT
from extras.evaluate import COLUMNS
from test_train import flags
from tiny import world

MODEL = ("--llama", LLAMA, "--vit", VIT, "--adapter", ADAPTER)


# A prompt


def test_a_single_prompt_is_streamed(call, lavin, samples, expected):
    sample = samples[0]
    code, stdout, stderr = call(
        generate, "--prompt", sample.prompt, "--image", sample.image, *MODEL,
        "--max-new-tokens", 12)
    assert (code, stderr) == (0, "")
    greedy = [token for token in expected["greedy"][0].tolist() if token >= 0]
    assert stdout.splitlines()[-1] == lavin.tokenizer.decode(greedy)


def test_a_plain_question_becomes_an_instruction(call, samples):
    def answer(prompt):
        stdout = call(generate, "--prompt", prompt, *MODEL, "--max-new-tokens", 5)[1]
        return stdout.splitlines()[-1]

    assert answer("Name a metal.") == answer(samples[3].prompt)


def test_seeded_sampling(call):
    def answer(seed):
        sampling = ("--temperature", 1, "--top-p", 0.9, "--seed", seed)
        return call(generate, "--prompt", "Name a metal.", *MODEL, *sampling)[1]

    assert answer(1) == answer(1) != answer(2)


# ScienceQA


def test_seeded_sampling_of_a_data_set(call, sqa, tmp_path):
    def outputs(seed):
        path = tmp_path / f"{seed}.json"
        code, _, _ = call(
            generate, "--data", "sqa", "--data-root", sqa, *MODEL, "--temperature", 1,
            "--seed", seed, "--max-seq-len", 200, "--max-new-tokens", 4, "--predictions", path)
        assert code == 0
        return json.loads(path.read_text())["outputs"]

    assert outputs(1) == outputs(1) != outputs(2)


def test_what_training_knew_need_not_be_said_again(call, sqa, tmp_path, monkeypatch):
    code, _, _ = call(train, *flags(
        sqa, tmp_path / "out", "--format", "CQM-A", "--max-steps", 2, "--captions"))
    assert code == 0
    monkeypatch.chdir(tmp_path)             # out/checkpoint.pth is what --adapter is by default
    code, stdout, stderr = call(
        generate, "--data", "sqa", "--split", "test", "--predictions", "p.json",
        "--max-new-tokens", 8)
    assert (code, stderr) == (0, "")
    assert "format CQM-A" in stdout
    assert "12 problems" in stdout
    assert "12 of 12 outputs name no valid choice" in stdout
    assert stdout.split("NAT")[1].split()[:8] == list(COLUMNS[1:])
    written = json.loads((tmp_path / "p.json").read_text())
    assert set(written) == {"results", "outputs"}
    assert set(written["results"].values()) == {-1}
    assert set(written["outputs"]) == {str(i) for i in range(32, 44)}


def test_prompts_that_do_not_fit_count_as_wrong(call, sqa):
    code, stdout, _ = call(
        generate, "--data", "sqa", "--data-root", sqa, *MODEL, "--max-seq-len", 90,
        "--max-new-tokens", 2)
    assert code == 0
    assert "do not fit the context of 90" in stdout
    assert "0/12" in stdout


def test_letters_are_what_greedy_generation_says_where_the_answer_comes_first(call, tmp_path):
    """On the small world's LLaMA, which answers in words alone without an adapter."""
    root = tmp_path / "world"
    world.write_world(root, sizes=(1, 1, 60))

    def answer(*how):
        path = tmp_path / "predictions.json"
        code, stdout, stderr = call(
            generate, "--data", "sqa", "--data-root", root, "--llama", world.PATHS["llama"],
            "--vit", world.PATHS["vit"], "--adapter", "none", "--max-seq-len", 160,
            "--predictions", path, *how)
        assert (code, stderr) == (0, "")
        return json.loads(path.read_text())["results"], stdout

    greedy, _ = answer("--max-new-tokens", 8)
    letters, stdout = answer("--score", "letters")
    n_named = 0
    for pid, index in greedy.items():
        if index >= 0:
            n_named += 1
            assert letters[pid] == index, pid
    assert n_named > 30
    assert -1 not in letters.values()
    assert "0 of 60 outputs" in stdout


def test_letters_need_a_data_set_with_choices(call):
    letters = ("--score", "letters", *MODEL)
    assert call(generate, "--prompt", "x", *letters)[0] == 2
    assert call(generate, "--data", "sqa", "--temperature", 1, *letters)[0] == 2
