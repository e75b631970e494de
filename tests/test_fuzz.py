"""Wrong inputs by the hundred, made from descriptions of the right ones. Each ends cleanly.

    python tests/test_fuzz.py 20000 7          20000 cases, drawn from seed 7

A case is a wrong flag, a checkpoint with a wrong setting, a file with a wrong tensor, JSON with a
wrong field, or a hostile name. It ends within a minute. It is either accepted, or it gives exit
code 2 and one line of text that a terminal can show. Nothing is written.
"""

import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from argparse import Namespace
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import torch

from conftest import ADAPTER, GOLDEN, LLAMA, VIT    # first: it puts our modules on sys.path

import checkpoints
import generate
import miniature
import train
from extras import benchmarks, flags, hf, instructions, scienceqa, serve, terminal
from extras.values import ADAPTER_ARGS, LLAMA_PARAMS, PROGRESS, QUESTION, SETTINGS
from files import LavinError, tokenizer_path
from helpers import nested, quantized
from hf_layout import CONFIG as HF_CONFIG, clip_folder, write_golden_folder

pytestmark = pytest.mark.filterwarnings("ignore")       # PyTorch warns of these odd tensors

CLIP_CONFIG = {"model_type": "clip_vision_model", "hidden_size": 64, "num_attention_heads": 1,
               "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
DEADLINE = 60           # seconds
MEMORY = 12 * 2**30     # bytes of address space, to protect the machine
UNSHOWABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


# Wrong values


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = (
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, -2**64, 10**400, 0.0, -0.5, 0.5, 1e-320, 1e308,
    math.inf, -math.inf, math.nan, "", " ", "x", "0", "-1", "nan", "x" * 100_000, "a\0b", "\ud800",
    "\x1b[2J\x1b[31m", "../..", "/etc/passwd", "/dev/zero", "é\u202eb", [], [[]], [None], ["x"],
    [1, 2, 3], {}, {"x": 1}, {"": {}}, deep_list(50), [10**400])
TEXTS = (
    "", " ", "x", "0", "-1", "-0", "1", "7", "1.5", "1e3", "nan", "inf", "-inf", "1e308", "1e-320",
    "9" * 400, "9" * 5000, "0x10", "1_0", "١", "None", "true", "QCM", "../..", "/dev/zero",
    "\x1b[2J", "é\u202e", "\udce9", "x" * 100_000, "--", "-x", "a b", "a\nb", "%s", "{}")


def junk(rng):
    """A wrong value, sometimes nested in another one."""
    value = rng.choice(JUNK)
    if rng.random() < 0.1:
        value = [value, rng.choice(JUNK)]
    if rng.random() < 0.05:
        value = {"x": value}
    return value


def sparse(tensor):
    return tensor.to_sparse()


def without_data(tensor):
    return tensor.to("meta")


def of_integers(tensor):
    return tensor.to(torch.int8)


def of_bools(tensor):
    return tensor > 0


def of_complex(tensor):
    return torch.complex(tensor.float(), tensor.float())


def of_tiny_floats(tensor):
    return tensor.to(torch.float8_e5m2)


def with_nan(tensor):
    return torch.full_like(tensor, math.nan)


def with_infinity(tensor):
    changed = tensor.clone()
    changed.flatten()[0] = math.inf
    return changed


def too_large_for_half(tensor):
    return torch.full_like(tensor, 1e38, dtype=torch.float32)


def a_number(tensor):
    return torch.tensor(1.0)


def longer(tensor):
    return torch.cat([tensor.reshape(-1), tensor.reshape(-1)])


def flat(tensor):
    return tensor.flatten()


def with_one_more_dimension(tensor):
    return tensor[None]


def nothing_in_it(tensor):
    return tensor.reshape(-1)[:0]


def huge_without_memory(tensor):
    return torch.zeros(1).expand(2**40)


def no_tensor(tensor):
    return [1.0]


SPOILERS = (
    sparse, quantized, nested, without_data, of_integers, of_bools, of_complex, of_tiny_floats,
    with_nan, with_infinity, too_large_for_half, a_number, longer, flat, with_one_more_dimension,
    nothing_in_it, huge_without_memory, no_tensor)


def spoil(state, rng):
    """A copy of {name: tensor} in which one tensor is wrong, missing, or renamed."""
    state = dict(state)
    name = rng.choice(sorted(state))
    kind = rng.randrange(len(SPOILERS) + 2)
    if kind < len(SPOILERS):
        state[name] = SPOILERS[kind](state[name])
    elif kind == len(SPOILERS):
        del state[name]
    else:
        state[rng.choice(["x", "", "layers.9.x", "\x1b[2J", 7])] = state.pop(name)
    return state


def spoil_json(content, rng):
    """A copy of JSON content in which junk replaces one value or everything."""
    if not isinstance(content, dict | list) or not content or rng.random() < 0.15:
        return junk(rng)
    changed = copy.copy(content)
    key = rng.choice(list(content)) if isinstance(content, dict) else rng.randrange(len(content))
    action = rng.random()
    if action < 0.1:
        del changed[key]
    elif action < 0.2 and isinstance(changed, dict):
        changed[rng.choice(["x", "", "\x1b[2J", "../x"])] = changed.pop(key)
    else:
        changed[key] = spoil_json(content[key], rng)
    return changed


def write_json(path, content, rng):
    """Write it, but sometimes as text that is not JSON or is hard to parse."""
    text = json.dumps(content)
    damage = rng.randrange(20)
    if damage == 0:
        text = "[" * 100_000
    elif damage == 1:
        text = '{"a":' * 50_000
    elif damage == 2:
        text = text[:rng.randrange(len(text) + 1)]
    elif damage == 3:
        text = "9" * 100_000
    raw = text.encode(errors="surrogatepass")
    if damage == 4:
        raw = b"\xff\xfe" + raw
    path.write_bytes(raw)


# What a case runs on


class Place:
    """A folder with a small data set and hostile names, and the models to be spoiled."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.sqa = self.folder / "sqa"
        miniature.write(self.sqa)
        self.scratch = self.folder / "scratch"
        self.llama_state = torch.load(LLAMA / "consolidated.00.pth", weights_only=True)
        self.adapter = torch.load(ADAPTER, weights_only=False)
        self.clip_state = dict(checkpoints.read_clip_state(VIT))
        self.make_hf_models()
        self.make_names()
        self.run = self.folder / "run"
        code, stderr = end_of(train, *self.train_flags(self.run), "--max-steps", "1")
        assert code == 0, stderr
        self.checkpoint = torch.load(self.run / "checkpoint.pth", weights_only=False)

    def make_hf_models(self):
        """The tensors of LLAMA and VIT with Hugging Face's names. As they are, they load."""
        golden = self.fresh()
        self.hf_llama = write_golden_folder(golden / "llama")
        (golden / "clip").mkdir()
        clip_folder(golden / "clip", torch.clone, "mlp.fc1")
        self.hf_clip = torch.load(golden / "clip" / "pytorch_model.bin", weights_only=True)
        write_hf_folder(golden / "llama", self.hf_llama)
        checkpoints.load(golden / "llama", golden / "clip", ADAPTER)

    def make_names(self):
        """Names of things that are not plain files, and of things that do not exist."""
        odd = self.folder / "odd"
        odd.mkdir()
        os.mkfifo(odd / "pipe")
        (odd / "loop").symlink_to(odd / "loop")
        (odd / "empty").write_text("")
        (odd / "garbage").write_bytes(bytes(range(256)) * 40)
        (odd / "zero").symlink_to("/dev/zero")
        (odd / "\udce9\udcff").write_text("{}")
        self.names = [str(odd / name) for name in (
            "pipe", "loop", "empty", "garbage", "zero", "\udce9\udcff", "missing", "x" * 300,
            "\x1b[31m", "a\nb", "pipe/x")]
        self.names += [str(odd), "/dev/zero", "/dev/full", "", " ", "..", "~", "x" * 100_000,
                       "-", "http://127.0.0.1/x", "é", ":", "a:b:c", "/proc/self/mem", "%s{}"]

    def train_flags(self, out):
        return ["--data", "sqa", "--data-root", str(self.sqa), "--llama", str(LLAMA),
                "--vit", str(VIT), "--out", str(out), "--epochs", "1", "--batch-size", "8",
                "--max-seq-len", "160", "--workers", "0", "--eval-limit", "0", "--device", "cpu"]

    def fresh(self):
        """An empty folder."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        return self.scratch

    def files(self):
        return sorted(path for path in self.folder.rglob("*"))


class Hang(BaseException):
    """A BaseException, so code that catches errors does not catch it."""


def hear_alarm(*_):
    raise Hang(f"more than {DEADLINE} seconds")


@contextlib.contextmanager
def deadline():
    previous = signal.signal(signal.SIGALRM, hear_alarm)
    signal.alarm(DEADLINE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def end_of(script, *args):
    """Run a script in this process -> (exit code, stderr)."""
    argv = sys.argv
    sys.argv = [f"{script.__name__}.py", *args]
    stderr = io.StringIO()
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    code = 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
            with deadline():
                terminal.run(script.main)
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
        for number, handler in handlers:
            signal.signal(number, handler)
    return code, stderr.getvalue()


def assert_clean_end(code, stderr):
    assert code in (0, None, 2), (code, stderr)
    if code == 2:
        assert stderr.startswith("error: "), stderr
        assert stderr.count("\n") == 1 and len(stderr) < 1000, stderr
        assert not UNSHOWABLE.search(stderr.rstrip("\n")), repr(stderr)


def assert_clean(action, *args):
    """Check that an action returns, or raises a LavinError with a message."""
    try:
        with deadline(), contextlib.redirect_stdout(io.StringIO()):
            return action(*args)
    except LavinError as error:
        assert str(error).strip()
        return None


# The families of cases. Each function runs one case, drawn from a generator.

def flags_with_a_value(parser):
    return [action.option_strings[-1] for action in parser._actions if action.nargs != 0]


def flag_of_train(rng, place):
    flag = rng.choice(flags_with_a_value(flags.train_parser("")))
    out = place.folder / "no-such-run"
    args = [*place.train_flags(out), "--dry-run", f"{flag}={rng.choice(TEXTS)}"]
    if flag == "--out":
        args += ["--resume"]
    assert_clean_end(*end_of(train, *args))


def flag_of_generate(rng, place):
    name = rng.choice(["max_new_tokens", "temperature", "top_p", "batch_size", "split", "score",
                       "by", "format", "seed", "bits", "dtype", "device", "max_seq_len", "workers",
                       "serve", "host", "data", "prompt", "image"])
    assert name in QUESTION
    flag = "--" + name.replace("_", "-")
    args = ["--adapter", str(ADAPTER), "--llama", str(LLAMA), "--vit", str(VIT), "--device", "cpu",
            "--max-new-tokens", "2", f"{flag}={rng.choice(TEXTS)}"]
    if name in ("split", "score", "by", "format", "batch_size", "workers"):
        args += ["--data", "sqa", "--data-root", str(place.sqa)]
        if name in ("by", "batch_size"):
            args += ["--split", "exam"]
    elif name in ("serve", "host"):
        args += ["--serve", "0", "--image", "x"]        # a contradiction, so that it does not serve
    elif name not in ("data", "prompt"):
        args += ["--prompt", "x"]
    assert_clean_end(*end_of(generate, *args))


def setting_of_a_checkpoint(rng, place):
    """A checkpoint with a wrong setting, argument or progress, read by both scripts."""
    checkpoint = dict(place.checkpoint)
    part = rng.choice(["config", "config", "args", "progress", "whole"])
    if part == "config":
        checkpoint["config"] = checkpoint["config"] | {rng.choice(sorted(SETTINGS)): junk(rng)}
    elif part == "args":
        args = vars(checkpoint["args"]) | {rng.choice(sorted(ADAPTER_ARGS)): junk(rng)}
        checkpoint["args"] = Namespace(**args)
    elif part == "progress":
        checkpoint[rng.choice(sorted(PROGRESS))] = junk(rng)
    else:
        checkpoint[rng.choice(sorted(checkpoint))] = junk(rng)
    out = place.fresh()
    torch.save(checkpoint, out / "checkpoint.pth")
    if rng.random() < 0.7:
        assert_clean(checkpoints.read_adapter, out / "checkpoint.pth")
    elif rng.random() < 0.5:
        assert_clean_end(*end_of(checkpoints, str(out / "checkpoint.pth")))
    else:
        code, stderr = end_of(train, "--resume", "--out", str(out), "--dry-run")
        assert_clean_end(code, stderr)
        assert [path.name for path in out.iterdir()] == ["checkpoint.pth"]


def tensor_of_llama(rng, place):
    folder = place.fresh()
    shutil.copy(LLAMA / "params.json", folder)
    shutil.copy(tokenizer_path(LLAMA), folder)
    torch.save(spoil(place.llama_state, rng), folder / "consolidated.00.pth")
    dtype = rng.choice([torch.float32, torch.bfloat16])
    assert_clean(lambda: checkpoints.load(folder, VIT, ADAPTER, dtype=dtype))


def tensor_of_clip(rng, place):
    path = place.fresh() / "clip.pt"
    torch.save(spoil(place.clip_state, rng), path)
    assert_clean(lambda: checkpoints.load(LLAMA, path, ADAPTER))


def tensor_of_adapter(rng, place):
    path = place.fresh() / "adapter.pth"
    torch.save(place.adapter | {"model": spoil(place.adapter["model"], rng)}, path)
    assert_clean(lambda: checkpoints.load(LLAMA, VIT, path))


def tensor_of_optimizer(rng, place):
    out = place.fresh()
    checkpoint = dict(place.checkpoint)
    optimizer = copy.copy(checkpoint["optimizer"])
    state = dict(optimizer["state"])
    i = rng.choice(sorted(state))
    state[i] = spoil(state[i], rng)
    optimizer["state"] = state
    checkpoint["optimizer"] = optimizer
    torch.save(checkpoint, out / "checkpoint.pth")
    assert_clean_end(*end_of(train, "--resume", "--out", str(out), "--dry-run"))


def params_json(rng, place):
    folder = place.fresh()
    params = json.loads((LLAMA / "params.json").read_text())
    if rng.random() < 0.7:
        params = params | {rng.choice(sorted(LLAMA_PARAMS)): junk(rng)}
    else:
        params = spoil_json(params, rng)
    write_json(folder / "params.json", params, rng)
    shutil.copy(tokenizer_path(LLAMA), folder)
    config = assert_clean(checkpoints.read_params, folder, 512)
    if config is not None:
        torch.save(place.llama_state, folder / "consolidated.00.pth")
        assert_clean(lambda: checkpoints.load(folder, VIT, None))


def spoil_config(config, rng):
    """A config.json with junk: mostly as the value of a setting that we read."""
    if rng.random() < 0.7:
        return config | {rng.choice(sorted(config)): junk(rng)}
    return spoil_json(config, rng)


def config_json(rng, place):
    folder = place.fresh()
    write_json(folder / "config.json", spoil_config(HF_CONFIG, rng), rng)
    assert_clean(checkpoints.read_params, folder, 512)


def config_of_clip(rng, place):
    folder = place.fresh()
    torch.save(place.hf_clip, folder / "pytorch_model.bin")
    config = CLIP_CONFIG
    if rng.random() < 0.5:
        config = {"model_type": "clip", "vision_config": config}
    write_json(folder / "config.json", spoil_config(config, rng), rng)
    assert_clean(hf.read_clip, folder)


@functools.cache
def json_of_sqa(name):
    with tempfile.TemporaryDirectory() as folder:
        miniature.write(Path(folder, "sqa"))
        return json.loads(Path(folder, "sqa", name).read_text())


def write_hf_folder(folder, state):
    """A LLaMA in Hugging Face's layout."""
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    shutil.copy(tokenizer_path(LLAMA), folder)
    torch.save(state, folder / "pytorch_model.bin")


def tensor_of_hf(rng, place):
    folder = place.fresh()
    write_hf_folder(folder, spoil(place.hf_llama, rng))
    if rng.random() < 0.2:
        index = {"weight_map": {"x": "pytorch_model.bin"}}
        write_json(folder / "pytorch_model.bin.index.json", spoil_json(index, rng), rng)
    assert_clean(lambda: checkpoints.load(folder, VIT, ADAPTER))


def tensor_of_hf_clip(rng, place):
    folder = place.fresh()
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    torch.save(spoil(place.hf_clip, rng), folder / "pytorch_model.bin")
    assert_clean(checkpoints.read_clip, folder)


def text_of_mme(rng, place):
    folder = place.fresh()
    (folder / "count").mkdir()
    shutil.copy(GOLDEN / "images" / "0.png", folder / "count" / "a.png")
    tab = rng.choice(["\t", " ", "", "\x1b"])
    line = f"Is it?{tab}{rng.choice(['Yes', 'No', 'x', ''])}\n"
    text = line * rng.choice([0, 1, 2, 1000])
    raw = text.encode() + rng.choice([b"", b"\xff", b"\0", b"\n"])
    if rng.random() < 0.1:
        os.mkfifo(folder / "count" / "a.txt")
    elif rng.random() < 0.9:
        (folder / "count" / "a.txt").write_bytes(raw)
    assert_clean(benchmarks.load_mme, folder)


def file_of_sqa(rng, place):
    name = rng.choice(["problems.json", "pid_splits.json", "captions.json"])
    content = json_of_sqa(name)
    original = (place.sqa / name).read_bytes()
    write_json(place.sqa / name, spoil_json(content, rng), rng)
    try:
        use_captions = name == "captions.json"
        assert_clean(scienceqa.load_sqa, place.sqa, "train", "QCM-ALE", use_captions)
    finally:
        (place.sqa / name).write_bytes(original)


ROWS = {
    "alpaca": [{"instruction": "Name a metal.", "input": "", "output": "Iron."}],
    "llava": [{"id": "1", "image": "0.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A disc."}]}],
    "jsonl": [{"prompt": "What?", "answer": "A disc.", "image": "0.png"}],
    "all_data": {"all": [{"instruction": "What?", "answer": "A disc.", "image": "0.png",
                          "image_source": "cc", "qid": "7"}]},
}


def row_of_instructions(rng, place):
    kind = rng.choice(sorted(ROWS))
    path = place.fresh() / f"rows.{kind}"
    content = spoil_json(ROWS[kind], rng)
    if kind == "jsonl":
        row = content[0] if isinstance(content, list) and content else content
        write_json(path, row, rng)
    else:
        write_json(path, content, rng)
    source = f"{kind}:{path}:{GOLDEN / 'images'}"
    read = assert_clean(instructions.read_instructions, source, rng.random() < 0.5, True)
    if read is not None:
        for row in read[1]:
            assert str(row).strip()


def captions_file(rng, place):
    path = place.fresh() / "captions.json"
    content = {"images": [{"id": 1, "file_name": "0.png"}, {"id": 2, "file_name": "1.png"}]}
    write_json(path, spoil_json(content, rng), rng)
    assert_clean(benchmarks.load_captions, f"{path}:{GOLDEN / 'images'}", "Describe it.")


def question_of_a_page(rng, place):
    content = {"question": "What?", "turns": [["a", "b"]], "image": None}
    path = place.fresh() / "question"
    write_json(path, spoil_json(content, rng), rng)
    assert_clean(serve.parse_question, path.read_bytes(), 32)


def name_for_train(rng, place):
    flag = rng.choice([
        "--llama", "--vit", "--delta", "--data-root", "--adapter", "--data", "--out"])
    name = rng.choice(place.names)
    if flag == "--data" and rng.random() < 0.7:
        name = f"{rng.choice(sorted(ROWS))}:{name}"
    args = [*place.train_flags(place.folder / "no-such-run"), f"{flag}={name}"]
    if flag == "--out":
        args += ["--resume"]
    else:
        args += [rng.choice(["--dry-run", "--check"])]
    code, stderr = end_of(train, *args)
    if code == 1 and "--check" in args:         # --check found bad rows and said so
        code = 0
    assert_clean_end(code, stderr)


def name_for_generate(rng, place):
    flag = rng.choice(["--llama", "--vit", "--delta", "--data-root", "--adapter", "--data",
                       "--image", "--predictions"])
    name = rng.choice(place.names)
    args = ["--adapter", str(ADAPTER), "--llama", str(LLAMA), "--vit", str(VIT),
            "--device", "cpu", "--max-new-tokens", "1"]
    if flag == "--data" and rng.random() < 0.9:
        name = f"{rng.choice(['mme', 'caption'])}:{name}"
    if flag in ("--data-root", "--predictions"):
        args += ["--data", "sqa", "--split", "exam"]
    elif flag != "--data":
        args += ["--prompt", "What?"]
    code, stderr = end_of(generate, *args, f"{flag}={name}")
    assert_clean_end(code, stderr)


FAMILIES = {
    flag_of_train: 40,
    flag_of_generate: 40,
    setting_of_a_checkpoint: 20,
    tensor_of_llama: 15,
    tensor_of_clip: 15,
    tensor_of_adapter: 15,
    tensor_of_optimizer: 6,
    params_json: 150,
    config_json: 150,
    config_of_clip: 50,
    file_of_sqa: 100,
    row_of_instructions: 200,
    tensor_of_hf: 15,
    tensor_of_hf_clip: 15,
    captions_file: 100,
    text_of_mme: 50,
    question_of_a_page: 200,
    name_for_train: 30,
    name_for_generate: 30,
}                                                           # {family: number of cases in the test}


@contextlib.contextmanager
def limited_memory():
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with limited_memory():
        yield Place(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_every_wrong_input_ends_cleanly(family, place, monkeypatch):
    monkeypatch.chdir(place.folder)
    place.fresh()
    before = place.files()
    for i in range(FAMILIES[family]):
        try:
            family(Random(f"{family.__name__} {i}"), place)
        except (Exception, Hang) as error:
            raise AssertionError(f"{family.__name__} {i}: {error!r}") from error
    place.fresh()
    assert place.files() == before


def main() -> None:
    """Run as many cases as asked for, from each family in turn. Print what fails, and how often."""
    n, seed = sys.argv[1:3]
    failed = Counter()
    ended = Counter()
    with tempfile.TemporaryDirectory() as folder, limited_memory():
        place = Place(folder)
        os.chdir(folder)
        families = list(FAMILIES)
        for i in range(int(n)):
            family = families[i % len(families)]
            ended[family.__name__] += 1
            try:
                family(Random(f"{seed} {i}"), place)
            except (Exception, Hang) as error:
                failed[family.__name__] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(f"{family.__name__} {seed} {i}: {error!r:.300} at {where.name} "
                      f"{where.filename}:{where.lineno}", flush=True)
    for name, count in ended.items():
        print(f"{name:28}{count:8} cases, {failed[name]} not clean")


if __name__ == "__main__":
    main()
