"""Bad input: one line on stderr that says what, where and what to do; exit code 2; no traceback; nothing half-written."""

import argparse
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import generate
import train
from adapters import AdapterConfig
from conftest import ADAPTER, LLAMA, ROOT, VIT
from model import LLaMA, read_params
from test_train import flags


@pytest.fixture
def fails(call, tmp_path):
    """fails(script, *flags, says=(…)): exits 2 with one line that holds every text of `says`, and leaves no checkpoint."""
    def fails(script, *args, says):
        code, _, stderr = call(script, *args)
        assert code == 2 and len(stderr.splitlines()) == 1 and stderr.startswith("error: "), stderr
        for text in says:
            assert str(text) in stderr, f"{text!r} is not in {stderr!r}"
        assert not list(tmp_path.glob("out/*.pth")) and not list(tmp_path.rglob("*.tmp"))
    return fails


def ask(*more, prompt="Name a metal.", adapter=ADAPTER, llama=LLAMA, vit=VIT):
    return ["--prompt", prompt, "--adapter", adapter, "--llama", llama, "--vit", vit, "--max-new-tokens", 2, *more]


def test_everything_that_is_missing_is_listed_at_once(fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/7B").mkdir(parents=True)           # with nothing there at all, the embedded default is taken
    fails(train, "--data", "sqa", says=[
        "weights/7B/params.json", "weights/7B/consolidated.00.pth", "weights/7B/tokenizer.model", "weights/ViT-L-14.pt",
        "data/scienceqa/problems.json", "https://github.com/lupantech/ScienceQA", "https://github.com/openai/CLIP", "--llama DIR"])
    fails(generate, "--prompt", "x", says=["out/checkpoint.pth", "python train.py", "--adapter FILE", "weights/ViT-L-14.pt"])
    fails(generate, *ask(llama=tmp_path, vit=tmp_path / "no.pt"), says=["params.json", "tokenizer.model", "no.pt"])


def test_without_a_traceback_from_the_shell(tmp_path):
    """As a person calls it, not in this process."""
    command = [sys.executable, ROOT / "train.py", "--data", "sqa", "--llama", "nowhere"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "nowhere/params.json" in result.stderr


def truncate(source, target):
    target.write_bytes(source.read_bytes()[:source.stat().st_size // 2])
    return target


def test_truncated_weights(fails, tmp_path):
    fails(generate, *ask(vit=truncate(VIT, tmp_path / "ViT.pt")), says=["ViT.pt", "truncated"])
    fails(generate, *ask(adapter=truncate(ADAPTER, tmp_path / "adapter.pth")), says=["adapter.pth", "truncated"])
    llama = Path(shutil.copytree(LLAMA, tmp_path / "llama"))
    shutil.copy(LLAMA.parent / "tokenizer.model", llama)
    (llama / "consolidated.00.pth").chmod(0o644)
    truncate(LLAMA / "consolidated.00.pth", llama / "consolidated.00.pth")
    fails(generate, *ask(llama=llama), says=["consolidated.00.pth", "truncated"])
    (llama / "tokenizer.model").write_bytes(b"not a tokenizer")
    fails(generate, *ask(llama=llama), says=["tokenizer.model", "not a sentencepiece tokenizer"])


def test_text_that_is_not_unicode(fails, sqa, tmp_path):
    fails(generate, *ask(prompt=b"caf\xe9".decode(errors="surrogateescape")), says=["the prompt", "not Unicode"])
    problems = json.loads((sqa / "problems.json").read_text())
    problems["3"]["question"] = "\ud800"
    (sqa / "problems.json").write_text(json.dumps(problems))
    fails(train, *flags(sqa, tmp_path / "out"), says=["problem 3", "not Unicode"])


def test_params_that_are_not_llamas(fails, tmp_path):
    llama = Path(shutil.copytree(LLAMA, tmp_path / "llama"))
    shutil.copy(LLAMA.parent / "tokenizer.model", llama)
    for params, said in [("{", "not JSON"), ("[]", "not LLaMA's parameters"), ('{"dim": 64, "n_heads": 0}', "not LLaMA's parameters"),
                         ('{"dim": 65, "n_layers": 4, "n_heads": 4}', "do not divide"), ('{"dim": "wide"}', "not LLaMA's parameters"),
                         ('{"dim": 64, "n_layers": 4, "n_heads": 4, "use_scaled_rope": true}', "scaled RoPE"),
                         ('{"dim": 64, "n_layers": "4", "n_heads": 4}', "n_layers is '4'"), ('{"n_heads": -4}', "n_heads is -4"),
                         ('{"dim": 64, "n_layers": 4.0}', "n_layers is 4.0"), ('{"norm_eps": true}', "norm_eps is True"),
                         ('{"dim": 64, "n_layers": 5, "n_heads": 4, "multiple_of": 32}', "layers.4"),
                         ('{"dim": 128, "n_layers": 4, "n_heads": 4, "multiple_of": 32}', "(512, 64) in 1 shard")]:
        (llama / "params.json").chmod(0o644)
        (llama / "params.json").write_text(params)
        fails(generate, *ask(llama=llama), says=["llama", said])


class Hostile:
    """Unpickled, it would make a file."""
    def __reduce__(self):
        return open, (str(Hostile.target), "w")


def test_a_pickle_is_never_executed(fails, tmp_path):
    Hostile.target = tmp_path / "executed"
    llama = Path(shutil.copytree(LLAMA, tmp_path / "llama"))
    shutil.copy(LLAMA.parent / "tokenizer.model", llama)
    (llama / "consolidated.00.pth").unlink()
    for name, write in [("plain.pth", lambda path: path.write_bytes(pickle.dumps(Hostile()))),
                        ("zipped.pth", lambda path: torch.save({"model": Hostile()}, path))]:
        path = tmp_path / name
        write(path)
        fails(generate, *ask(adapter=path), says=[name, "not"])
        fails(generate, *ask(vit=path), says=[name, "not"])
        shutil.copy(path, llama / "consolidated.00.pth")
        fails(generate, *ask(llama=llama), says=["consolidated.00.pth", "not"])
    assert not Hostile.target.exists()
    torch.load(tmp_path / "zipped.pth", weights_only=False)
    assert Hostile.target.exists()                              # the trap works


class Scripted(torch.nn.Module):
    """Loaded by torch.jit.load, it would make the file `target`: TorchScript can write tensors."""
    def __init__(self, target):
        super().__init__()
        self.weight, self.target = torch.nn.Parameter(torch.zeros(1)), target

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.target, self.training = state
        torch.save(self.weight, self.target)


def test_torchscript_that_would_run_code_is_not_loaded(fails, tmp_path):
    torch.jit.script(Scripted(str(tmp_path / "executed"))).save(tmp_path / "ViT.pt")
    fails(generate, *ask(vit=tmp_path / "ViT.pt"), says=["ViT.pt: would run code"])
    assert not (tmp_path / "executed").exists()
    torch.jit.load(tmp_path / "ViT.pt")
    assert (tmp_path / "executed").exists()                     # the trap works


def test_adapters_that_do_not_fit(fails, tmp_path):
    checkpoint = torch.load(ADAPTER, weights_only=False)
    model = checkpoint["model"]
    name = "layers.2.adapter_attn.conv_A.weight"
    for change, says in [({name: torch.zeros(8, 4096, 1)}, [name, "(8, 4096, 1)", "(8, 64, 1)"]),
                         ({"layers.4.adapter_attn.conv_A.weight": model[name]}, ["layers.4.adapter_attn.conv_A.weight has no place"]),
                         ({name: "text"}, ["no named tensors"])]:
        torch.save(checkpoint | {"model": model | change}, tmp_path / "a.pth")
        fails(generate, *ask(adapter=tmp_path / "a.pth"), says=["a.pth", *says])
    for args in ({"temperature": 10.0}, argparse.Namespace(temperature="hot"), [3]):
        torch.save(checkpoint | {"args": args}, tmp_path / "a.pth")
        fails(generate, *ask(adapter=tmp_path / "a.pth"), says=["a.pth: not a LaVIN checkpoint"])
    torch.save({"model": {n: t for n, t in model.items() if n != name}}, tmp_path / "a.pth")
    fails(generate, *ask(adapter=tmp_path / "a.pth"), says=["a.pth", f"{name} is missing"])
    for content in ({}, [1], {"model": {}}, {"model": 3}, torch.zeros(3)):
        torch.save(content, tmp_path / "a.pth")
        fails(generate, *ask(adapter=tmp_path / "a.pth"), says=["a.pth", "not a"])


def test_a_vit_that_is_none(fails, tmp_path):
    state = torch.jit.load(VIT).state_dict()
    short = {name: t for name, t in state.items() if "resblocks.7.ln_1.bias" not in name}
    for content, says in [({"visual.conv1.weight": torch.zeros(3)}, ["not a CLIP ViT"]), ([], ["no named tensors"]),
                          (short, ["resblocks.7.ln_1.bias is missing"])]:
        torch.save(content, tmp_path / "v.pt")
        fails(generate, *ask(vit=tmp_path / "v.pt"), says=["v.pt", *says])


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("field, value, says", [
    ("answer", 4, "has the answer 4, outside its 4 choices"), ("answer", -1, "has the answer -1"), ("answer", "0", "has the answer '0'"),
    ("choices", [], "has choices other than"), ("choices", "ab", "has choices other than"), ("subject", "cooking", "subject 'cooking'"),
    ("grade", "first", "grade 'first'"), ("question", None, "'question' that is not text"), ("image", 3, "has the image 3"),
    *[(field, ..., f"lacks the field '{field}'") for field in
      ("question", "choices", "answer", "hint", "image", "lecture", "solution", "split", "subject", "grade")]])
def test_problems(fails, sqa, tmp_path, field, value, says):
    edit(sqa / "problems.json", lambda p: p["6"].pop(field) if value is ... else p["6"].update({field: value}))
    fails(train, *flags(sqa, tmp_path / "out"), says=["problems.json", "problem 6", says])


def test_problems_and_splits_that_cannot_be_read(fails, sqa, tmp_path):
    original = (sqa / "pid_splits.json").read_text()
    for content, says in [('{"train": ["0", "77"]}', "split 'train' names problem 77"), ("[]", "not objects"), ("", "not JSON"),
                          ('{"test": ["0"]}', "no split 'train'; it has test"), ('{"train": []}', "split 'train' is empty"),
                          ('{"train": 3}', "pid_splits.json")]:
        (sqa / "pid_splits.json").write_text(content)
        fails(train, *flags(sqa, tmp_path / "out"), says=[says])
    (sqa / "pid_splits.json").write_text(original)
    for content, says in [("{not json", "not JSON"), (b"\xff\xfe\xff", "not JSON"), ('{"0": 3}', "problem 0 is not an object")]:
        (sqa / "problems.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        fails(train, *flags(sqa, tmp_path / "out"), says=["problems.json", says])


def test_a_caption_file_that_is_none(fails, sqa, tmp_path):
    for content in ("[]", "{}", '{"captions": 3}', "{"):
        (sqa / "captions.json").write_text(content)
        fails(train, *flags(sqa, tmp_path / "out", "--captions"), says=["captions.json"])
    (sqa / "captions.json").unlink()
    fails(train, *flags(sqa, tmp_path / "out", "--captions"), says=["captions.json", "cannot be read"])


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("content", [None, b"", b"no picture", "truncated"], ids=["missing", "empty", "text", "truncated"])
def test_pictures(fails, sqa, tmp_path, content, workers):
    path = sqa / "images" / "train" / "10" / "image.png"
    whole = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(whole[:len(whole) // 2] if content == "truncated" else content)
    fails(train, *flags(sqa, tmp_path / "out", "--workers", workers), says=["problem 10", path])
    fails(generate, *ask("--image", path), says=[path])


def test_prompts(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--format", "QCM-XYZ"), says=["'QCM-XYZ'", ", ".join(data.FORMATS)])
    fails(generate, "--data", "sqa", "--data-root", sqa, "--format", "ALE", *ask()[2:], says=["'ALE'", "QCM-ALE"])
    fails(generate, *ask(prompt="why? " * 200), says=["a context of 128 has room for 126", "--max-seq-len"])
    fails(generate, *ask(prompt=" "), says=["--prompt is empty"])
    fails(generate, "--data", "sqa", "--data-root", sqa, "--split", "exam", *ask()[2:], says=["no split 'exam'; it has train, val, test"])
    fails(train, *flags(sqa, tmp_path / "out", "--max-seq-len", 9), says=["--max-seq-len 9"])
    fails(train, *flags(sqa, tmp_path / "out", "--max-seq-len", 20), says=["--max-seq-len 20 cuts off the answer of every sample"])


def test_places_that_cannot_be_written(fails, sqa, tmp_path):
    (tmp_path / "file").write_text("mine")
    fails(train, *flags(sqa, tmp_path / "file" / "out"), says=["file/out", "--out"])
    fails(train, *flags(sqa, tmp_path / "file"), says=["file", "--out"])
    fails(generate, "--data", "sqa", "--data-root", sqa, "--predictions", tmp_path / "file" / "p.json", *ask()[2:], says=["file"])
    fails(generate, "--data", "sqa", "--data-root", sqa, "--predictions", tmp_path, *ask()[2:], says=["--predictions", "directory"])
    assert (tmp_path / "file").read_text() == "mine"


def test_resume(fails, call, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "none", "--resume"), says=["--resume", "none/checkpoint.pth"])
    out = tmp_path / "run"
    assert call(train, *flags(sqa, out, "--max-steps", 1))[0] == 0
    before = (out / "checkpoint.pth").read_bytes()
    for flag, value in [("--batch-size", 4), ("--epochs", 5), ("--lr", 0.5), ("--format", "QCM-A"), ("--max-seq-len", 99), ("--tau", 5),
                        ("--dtype", "bf16")]:
        fails(train, "--resume", "--out", out, flag, value, says=["--resume", flag[2:].replace("-", "_"), str(value)])
    edit(sqa / "pid_splits.json", lambda splits: splits["train"].pop())
    fails(train, "--resume", "--out", out, says=["--resume", "knows 24 samples, not 23"])
    assert (out / "checkpoint.pth").read_bytes() == before
    (tmp_path / "other").mkdir()
    params = json.loads((LLAMA / "params.json").read_text()) | {"dim": 32}
    (tmp_path / "other" / "params.json").write_text(json.dumps(params))
    whole = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
    with torch.device("meta"):
        small = LLaMA(read_params(tmp_path / "other", 512), AdapterConfig())
    torch.save({n: whole[n][tuple(map(slice, p.shape))].clone() for n, p in small.named_parameters() if n in whole},
               tmp_path / "other" / "consolidated.00.pth")
    shutil.copy(LLAMA.parent / "tokenizer.model", tmp_path / "other")
    fails(train, "--resume", "--out", out, "--llama", tmp_path / "other", says=["checkpoint.pth", "do not belong together"])
    edit(sqa / "pid_splits.json", lambda splits: splits["train"].append("23"))
    (out / "checkpoint.pth").rename(out / "mine.pth")
    checkpoint = torch.load(out / "mine.pth", weights_only=False)
    for change, says in [({"optimizer": {}}, "no optimizer of this model"), ({"config": [1]}, "was not written by train.py"),
                         ({"step": "x"}, "was not written by train.py")]:
        torch.save(checkpoint | change, out / "checkpoint.pth")
        fails(train, "--resume", "--out", out, says=["checkpoint.pth", says])
    shutil.copy(ADAPTER, out / "checkpoint.pth")
    fails(train, "--resume", "--out", out, says=["was not written by train.py"])


@pytest.mark.parametrize("bad", [("--micro-batch", 0), ("--batch-size", -1), ("--epochs", 0), ("--epochs", 1.5), ("--workers", -1),
                                 ("--eval-limit", -1), ("--dropout", 1), ("--tau", 0), ("--lr", 0), ("--lr", "nan"), ("--tau", "nan"), ("--max-steps", 0)])
def test_numbers_that_make_no_sense(call, sqa, tmp_path, bad):
    code, _, stderr = call(train, *flags(sqa, tmp_path / "out", *bad))
    assert code == 2 and bad[0] in stderr and "Traceback" not in stderr


def test_a_device_that_is_not_there(fails, sqa, tmp_path):
    fails(train, *flags(sqa, tmp_path / "out", "--device", "cuda:77"), says=["--device cuda:77"])
    fails(generate, *ask("--device", "toaster"), says=["--device toaster"])


def test_compile_without_a_compiler(sqa, tmp_path, fails, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    fails(generate, *ask(), "--compile", says=["--compile", "no-such-compiler"])
    fails(train, *flags(sqa, tmp_path / "out", "--compile"), says=["--compile", "no-such-compiler"])


def test_memory_that_no_machine_has(fails):
    fails(generate, *ask("--max-seq-len", 10**11), says=["too little memory", "--max-seq-len"])


def test_a_device_that_computes_nothing(fails):
    fails(generate, *ask("--device", "meta"), says=["--device meta", "not available"])
