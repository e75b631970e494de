"""TorchScript archives are read as data: the same tensors as torch.jit.load, and no code runs."""

import pickle
import zipfile
from typing import Optional

import pytest
import torch
import torch.nn as nn

import checkpoints
import generate
from conftest import VIT
from extras import torchscript
from files import LavinError
from helpers import ask, list_again, read_entries

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")


def save(module, path):
    """Save a module as an archive -> its path."""
    torch.jit.script(module).save(path)
    return path


def write_entries(path, entries):
    """Write {name: content} as a zip file of uncompressed entries -> its path."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


# The tensors are those of torch.jit.load


def test_the_golden_archive():
    theirs = torch.jit.load(VIT).state_dict()
    assert len(theirs) > 100
    assert_same(torchscript.read_tensors(VIT), theirs)
    visual = {name: tensor for name, tensor in theirs.items() if name.startswith("visual.")}
    assert 0 < len(visual) < len(theirs)
    assert_same(torchscript.read_tensors(VIT, "visual."), visual)


class Tower(nn.Module):
    """Attributes of every kind that TorchScript stores, and tensors that are no plain blocks."""
    none: Optional[int]                     # noqa: UP045 -- TorchScript reads it
    words: dict[str, int]
    numbers: dict[int, str]
    nested: list[list[int]]
    tensors: list[torch.Tensor]

    def __init__(self):
        super().__init__()
        self.layers = 2 ** 40
        self.scale = 1.5
        self.title = "x" * 300
        self.none = None
        self.sizes = [1, 2]
        self.shares = [0.5]
        self.flags = [True]
        self.words = {"a": 1}
        self.numbers = {1: "a"}
        self.nested = [[1], [2]]
        self.tensors = [torch.ones(2)]
        self.pair = (1, "a", 2.0, 3)
        self.place = torch.device("cuda:0")
        self.complex = 3 + 4j
        block = torch.randn(10, 6)
        self.whole = nn.Parameter(block)
        self.register_buffer("part", block[2:5, 1:4])
        self.register_buffer("turned", block.T)
        self.register_buffer("spread", torch.ones(1).expand(4))
        self.register_buffer("halves", torch.randn(5).half())
        self.register_buffer("brains", torch.randn(5).bfloat16())
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("truth", torch.tensor([True]))
        self.register_buffer("nothing", None)
        self.shared = nn.Linear(3, 4).half()
        self.blocks = nn.Sequential(nn.Linear(2, 2), nn.GELU(), self.shared)

    def forward(self, x):
        return self.shared(x)


def test_attributes_shared_storages_offsets_and_strides(tmp_path):
    path = save(Tower(), tmp_path / "tower.pt")
    ours = torchscript.read_tensors(path)
    assert_same(ours, torch.jit.load(path).state_dict())
    assert ours["whole"].data_ptr() == ours["turned"].data_ptr()        # one storage, read once
    assert ours["part"].stride() == (6, 1)


def test_a_traced_model(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    path = tmp_path / "traced.pt"
    torch.jit.trace(model, torch.randn(1, 3)).save(path)
    assert_same(torchscript.read_tensors(path), torch.jit.load(path).state_dict())


def test_a_file_of_torch_save_is_no_archive(tmp_path):
    path = tmp_path / "plain.pt"
    torch.save({"a": torch.ones(1)}, path)
    assert torchscript.read_tensors(path) is None


# No code runs


def overwrite(target: str) -> int:
    """TorchScript can write to any file."""
    mapped = torch.from_file(target, True, 6, dtype=torch.uint8)
    mapped.copy_(torch.full([6], 88, dtype=torch.uint8))
    return int(mapped[0])


class Hooks(nn.Module):
    """state_dict() calls `values` of nn.Module's hooks. This submodule takes the place of hooks."""

    def __init__(self, target):
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.zeros(1))

    @torch.jit.export
    def values(self) -> list[int]:
        if overwrite(self.target) == 0:
            return [1]
        return torch.jit.annotate(list[int], [])

    @torch.jit.export
    def __contains__(self, name: str) -> bool:
        return overwrite(self.target) == 0

    @torch.jit.export
    def __len__(self) -> int:
        return overwrite(self.target)


class Restoring(nn.Module):
    """It has its own code that restores it."""

    def __init__(self, target):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.target = target

    @torch.jit.export
    def __getstate__(self):
        return self.weight, self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]):
        self.weight, self.target, self.training = state
        overwrite(self.target)


class Property(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.target = target
        self.weight = nn.Parameter(torch.zeros(1))

    @property
    def training_steps(self) -> int:
        return overwrite(self.target)

    def forward(self) -> int:
        return self.training_steps


class Custom:
    """A class that is not a module."""

    def __init__(self, target: str):
        self.target = target

    def __getstate__(self) -> str:
        return self.target

    def __setstate__(self, target: str) -> None:
        self.target = target
        overwrite(target)


class WithCustom(nn.Module):
    def __init__(self, target):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.custom = Custom(target)


class Outer(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.conv1 = nn.Linear(1, 1)
        self.inner = inner


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "target"
    path.write_text("before")
    return path


def renamed(path, name):
    """The archive with its attribute `inner` renamed to `name`, which nn.Module would forbid."""
    entries = {}
    for entry, content in read_entries(path).items():
        if entry.endswith(".pkl"):
            old = b"X" + len("inner").to_bytes(4, "little") + b"inner"
            new = b"X" + len(name).to_bytes(4, "little") + name.encode()
            content = content.replace(old, new)
        entries[entry] = content.replace(b"inner", name.encode())
    return write_entries(path, entries)


@pytest.mark.parametrize("name", [
    "_state_dict_pre_hooks", "_state_dict_hooks", "_non_persistent_buffers_set", "_modules",
    "_parameters", "_buffers", "_forward_hooks", "__class__", "__dict__"])
def test_a_submodule_in_the_place_of_a_hook_is_data(tmp_path, target, name):
    path = renamed(save(Outer(Hooks(str(target))), tmp_path / "v.pt"), name)
    assert f"{name}.weight" in torchscript.read_tensors(path)
    assert target.read_text() == "before"


def test_the_trap_with_the_hooks_works(tmp_path, target):
    path = renamed(save(Outer(Hooks(str(target))), tmp_path / "v.pt"), "_state_dict_pre_hooks")
    torch.jit.load(path).state_dict()
    assert target.read_text() == "XXXXXX"


@pytest.mark.parametrize("module", [Restoring, WithCustom])
def test_what_restores_itself_is_refused(fails, tmp_path, target, module):
    path = save(Outer(module(str(target))), tmp_path / "v.pt")
    fails(generate, *ask(vit=path), says=["v.pt: would run code when it is read; not loaded"])
    assert target.read_text() == "before"
    torch.jit.load(path)
    assert target.read_text() == "XXXXXX"           # the trap works


def test_a_property_is_not_asked(tmp_path, target):
    path = save(Outer(Property(str(target))), tmp_path / "v.pt")
    target.write_text("before")                     # torch.jit.script read the property
    assert "inner.weight" in torchscript.read_tensors(path)
    assert target.read_text() == "before"


def test_code_is_never_read(tmp_path):
    """The tensors are read even if the code is damaged, or unpacks to a huge file."""
    path = save(Outer(nn.Linear(2, 2)), tmp_path / "v.pt")
    expected = torchscript.read_tensors(path)
    entries = read_entries(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"nonsense" if "/code/" in name else content)
        archive.writestr("v/code/bomb.py", bytes(2**26), zipfile.ZIP_DEFLATED)
    assert_same(torchscript.read_tensors(path), expected)


# Pickles that TorchScript does not write


def pickled(*instructions):
    return b"\x80\x02" + b"".join(instructions) + b"."


def text(string):
    return b"X" + len(string).to_bytes(4, "little") + string.encode()


MODULE = b"c__torch__ M\nM\n)\x81"               # an empty module
EMPTY_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\0))tR"


def with_pickle(tmp_path, pickle_bytes):
    """A TorchScript archive whose data.pkl is this -> its path."""
    path = save(Outer(nn.Linear(2, 2)), tmp_path / "v.pt")
    return write_entries(path, read_entries(path) | {"v/data.pkl": pickle_bytes})


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def test_functions_are_not_called(tmp_path):
    """This holds for the instructions of every pickle protocol."""
    executed = tmp_path / "executed"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path = with_pickle(tmp_path, pickle.dumps({"a": Hostile(executed)}, protocol))
        try:
            torchscript.read_tensors(path)
        except LavinError as error:
            assert "v.pt" in str(error)
    assert not executed.exists()
    pickle.loads(pickle.dumps(Hostile(executed)))
    assert executed.exists()                        # the trap works


def nested(depth):
    """Nested modules. Each holds the next one twice, so there are 2 ** depth paths."""
    instructions = [MODULE]
    for _ in range(depth):
        instructions += [b"q\0", MODULE, b"}(", text("a"), b"h\0", text("b"), b"h\0", b"ub"]
    return pickled(*instructions)


@pytest.mark.parametrize("content, said", [
    (pickled(MODULE, b"q\0}(", text("a"), b"h\0ub"), "one inside itself"),
    (nested(60), "too many modules"),
    (pickled(MODULE, b"}(", text("a" * 301), EMPTY_TENSOR, b"ub"), "too many modules"),
    (pickled(b"(" * 2**20), "data.pkl has 1,048,579 bytes"),
    (pickled(b"N", b"r\xff\xff\xff\xffN0"), "POP, which TorchScript never writes"),
    (b"", "truncated"),
    (pickled(), "truncated"),
    (pickled(b"h\x07"), "truncated"),
    (pickled(MODULE, b"Nb"), "would run code"),
])
def test_a_pickle_that_torchscript_did_not_write(tmp_path, content, said):
    with pytest.raises(LavinError, match=f"v.pt: .*{said}"):
        torchscript.read_tensors(with_pickle(tmp_path, content))


# A tuple that holds a tuple twice, and so on. Its hash or its text would take forever.
DEEP = b")q\0" + b"h\0h\0\x86q\0" * 100


@pytest.mark.parametrize("storage", [
    [b"h\0", text("0"), b"NK\x04"],
    [b"ctorch\nFloatStorage\n", b"h\0", b"NK\x04"],
    [b"ctorch\nFloatStorage\n", text("0"), b"Nh\0"],
])
def test_no_tuples_are_hashed_or_shown(tmp_path, storage):
    path = with_pickle(tmp_path, pickled(MODULE, b"}(", DEEP, b"Nub"))
    assert torchscript.read_tensors(path) == {}
    tensor = [b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage"), *storage, b"tQK\0))tR"]
    content = pickled(DEEP, MODULE, b"}(", text("a"), *tensor, b"ub")
    with pytest.raises(LavinError, match="v.pt: .*its tensors have no storages"):
        torchscript.read_tensors(with_pickle(tmp_path, content))


# Storages


def record(size=4, offset=0, shape=(4,), strides=(1,), dtype="FloatStorage", key="0"):
    """The pickle instructions for a tensor."""
    def number(n):
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values):
        return b"(" + b"".join(number(n) for n in values) + b"t"

    storage = (b"(" + text("storage") + f"ctorch\n{dtype}\n".encode() + text(key) + text("cpu")
               + number(size) + b"tQ")
    return (b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + numbers(shape)
            + numbers(strides) + b"\x89}tR")


def archive_with(tmp_path, instructions, more=()):
    """Write an archive of a module with one tensor, and a storage of 4 floats -> its path."""
    content = pickled(MODULE, b"}(", text("a"), instructions, b"ub")
    entries = {"v/data.pkl": content, "v/constants.pkl": b"", "v/data/0": bytes(16)}
    return write_entries(tmp_path / "v.pt", entries | dict(more))


def test_a_tensor_that_is_within_its_storage(tmp_path):
    tensors = torchscript.read_tensors(archive_with(tmp_path, record(offset=1, shape=(3,))))
    assert torch.equal(tensors["a"], torch.zeros(3))


@pytest.mark.parametrize("wrong, said", [
    ({"shape": (5,)}, "a storage size of 20 are out of bounds"),
    ({"offset": 1}, "a storage size of 20 are out of bounds"),
    ({"offset": -1}, "invalid storage offset -1"),
    ({"strides": (2,)}, "a storage size of 28 are out of bounds"),
    ({"strides": (-1,)}, "Negative strides"),
    ({"shape": (-4,)}, r"sizes=\[-4\]"),
    ({"shape": (2**40,)}, f"a storage size of {4 * 2**40} are out of bounds"),
    ({"shape": (2**62, 2**62), "strides": (2**62, 2**62)}, "size calculation overflowed"),
    ({"shape": (2, 2)}, "mismatch in length of strides and shape"),
    ({"size": 5}, "data/0 has 16 bytes, not 5 torch.float32"),
    ({"size": 3}, "data/0 has 16 bytes, not 3 torch.float32"),
    ({"size": 2**60}, f"data/0 has 16 bytes, not {2**60} torch.float32"),
    ({"dtype": "HalfStorage"}, "data/0 has 16 bytes, not 4 torch.float16"),
    ({"dtype": "QInt8Storage"}, "torch QInt8Storage"),
    ({"key": "1"}, "no item named 'v/data/1'"),
    ({"key": "../data.pkl"}, "no item named 'v/data/../data.pkl'"),
], ids=str)
def test_a_tensor_that_is_not(tmp_path, wrong, said):
    with pytest.raises(LavinError, match=f"v.pt: not a readable CLIP archive .*{said}"):
        torchscript.read_tensors(archive_with(tmp_path, record(**wrong)))


def test_only_what_is_asked_for_is_read(tmp_path):
    both = record() + text("b") + record(key="there is none")
    path = archive_with(tmp_path, both)
    assert torchscript.read_tensors(path, "a").keys() == {"a"}
    with pytest.raises(LavinError, match="there is none"):
        torchscript.read_tensors(path)


def test_compressed_entries_are_refused(tmp_path):
    path = archive_with(tmp_path, record())
    entries = read_entries(path)
    for packed in ("v/data.pkl", "v/data/0"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                method = zipfile.ZIP_DEFLATED if name == packed else zipfile.ZIP_STORED
                archive.writestr(name, content, method)
        with pytest.raises(LavinError, match=f"v.pt: its entry {packed} is compressed"):
            torchscript.read_tensors(path)


def test_entries_that_lie_over_each_other_are_refused(tmp_path):
    path = archive_with(tmp_path, record(), {"v/data/1": bytes(2**16)})
    list_again(path, "v/data/1", [f"v/data/{i}" for i in range(2, 10)])
    with pytest.raises(LavinError, match="more bytes than the file"):
        torchscript.read_tensors(path)


# An archive as CLIP


def test_of_clip_only_the_image_encoder_is_read(lavin):
    state = checkpoints.read_clip_state(VIT)
    assert state and all(name.startswith("visual.") for name in state)
    assert torch.equal(lavin.vit.conv1.weight, state["visual.conv1.weight"].float())
