"""Every file stands on a floor, and imports only files on lower floors.

So a file can be understood from the files below it, and no imports form a circle. For example,
model.py needs only the operations of fast/ops.py from fast/, and nothing from extras/.
"""

import ast
import subprocess
import sys

import pytest

from conftest import ROOT

FLOORS = {
    1: ["router", "files", "fast/ops"],
    2: ["adapters", "data", "extras/neighbours", "extras/terminal", "extras/torchscript"],
    3: ["vit", "extras/values"],
    4: ["model", "extras/tokenizers"],
    5: ["fast/fold", "fast/quantize", "fast/ranks",
        "extras/board", "extras/gguf", "extras/hf", "extras/instructions", "extras/plot",
        "extras/scienceqa"],
    6: ["checkpoints", "fast/engine", "extras/flags", "tiny/drawing"],
    7: ["extras/evaluate", "extras/benchmarks", "extras/chat", "extras/resume",
        "extras/runs", "tiny/world"],
    8: ["extras/serve", "extras/choices", "extras/rows", "extras/estimate", "tiny/album",
        "tiny/corpus", "tiny/shelf"],
    9: ["train", "generate", "tiny/pretrain"],
    10: ["bench/ablations", "bench/asking", "bench/memory", "bench/peak_memory", "bench/probe",
         "bench/recipe", "bench/speed", "examples/architecture", "examples/flags",
         "examples/tour", "examples/easy_vqa", "examples/own_words", "examples/smollm2"],
    11: ["bench/reference"],
}
TOP_LEVEL = {"model", "adapters", "router", "vit", "data", "checkpoints", "files", "train",
             "generate"}
LONGEST_LINE = 100          # characters
LONGEST_FUNCTION = 45       # lines


# Parts of the checks. A file is named by its path without ".py": "fast/ops".


def read_sources():
    """{file: its source} for every .py file that is part of the repository."""
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).with_suffix("").as_posix()
        if not is_ignored(file):
            sources[file] = path.read_text(encoding="utf-8")
    return sources


def is_ignored(file):
    """Is the file in one of the folders that .gitignore lists?"""
    folder, _, rest = file.partition("/")
    if not rest:
        return False
    return folder in ("data", "weights") or folder.startswith(("out", "."))


def is_test(file):
    return file.startswith("tests/")


def is_package(file):
    return file.endswith("__init__")


def housed(sources):
    """The sources that need a floor: all except the tests and the packages' __init__.py."""
    kept = {}
    for file, source in sources.items():
        if not is_test(file) and not is_package(file):
            kept[file] = source
    return kept


def imports_of(source, files):
    """The members of `files` that a source imports, including imports within functions."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level > 0:
                raise ValueError(f"line {node.lineno}: relative import; write the full name")
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    paths = [name.replace(".", "/") for name in names]
    return {path for path in paths if path in files}


def floor_of(file):
    """The number of a file's floor, or None."""
    for floor, files in FLOORS.items():
        if file in files:
            return floor
    return None


def find_faults(imports):
    """{file: the files that it imports} -> one line for each fault."""
    faults = []
    for file, imported in imports.items():
        floor = floor_of(file)
        if floor is None:
            faults.append(f"{file}.py has no floor in tests/test_house.py")
            continue
        for other in sorted(imported):
            other_floor = floor_of(other)
            if other_floor is not None and other_floor >= floor:
                faults.append(f"{file}.py (floor {floor}) imports {other}.py (floor "
                              f"{other_floor}), which is not below it")
    return faults


def find_circle(imports):
    """{file: the files that it imports} -> a circle of files, which ends with its first, or []."""
    remaining = dict(imports)
    while True:
        free = []           # a file that imports no remaining file is in no circle
        for file, imported in remaining.items():
            if not imported & remaining.keys():
                free.append(file)
        if not free:
            break
        for file in free:
            del remaining[file]
    if not remaining:
        return []
    path = [min(remaining)]
    while True:
        following = min(remaining[path[-1]] & remaining.keys())
        if following in path:
            start = path.index(following)
            return [*path[start:], following]
        path.append(following)


def find_long_lines(sources):
    faults = []
    for file, source in sources.items():
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > LONGEST_LINE:
                faults.append(f"{file}.py:{number} has {len(line)} characters")
    return faults


def find_long_functions(sources):
    faults = []
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                n_lines = node.end_lineno - node.lineno + 1
                if n_lines > LONGEST_FUNCTION:
                    faults.append(f"{file}.py: {node.name} has {n_lines} lines")
    return faults


def assert_none(faults):
    assert not faults, "\n" + "\n".join(faults)


# The repository


@pytest.fixture(scope="module")
def sources():
    return read_sources()


@pytest.fixture(scope="module")
def imports(sources):
    files = housed(sources)
    return {file: imports_of(source, files) for file, source in files.items()}


def test_every_import_points_to_a_lower_floor(imports):
    assert len(imports) > 20
    assert_none(find_faults(imports))


def test_no_files_import_each_other_in_a_circle(imports):
    circle = find_circle(imports)
    assert not circle, " -> ".join(circle)


def test_nothing_else_stands_at_the_top_level(imports):
    top_level = {file for file in imports if "/" not in file}
    assert top_level == TOP_LEVEL


def test_every_file_of_the_table_exists(imports):
    for floor, files in FLOORS.items():
        for file in files:
            assert file in imports, f"floor {floor}: there is no {file}.py"


def test_packages_hold_nothing_but_a_docstring(sources):
    packages = [file for file in sources if is_package(file) and not is_test(file)]
    assert len(packages) == 5
    for file in packages:
        body = ast.parse(sources[file]).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{file}.py"


LOADED = """
import sys
from pathlib import Path
import model

for name, module in sorted(sys.modules.items()):
    file = getattr(module, "__file__", None)
    ours = file and Path(file).is_relative_to(Path.cwd())
    if ours and "site-packages" not in file:        # where README's .venv keeps the packages
        print(name)
if "torch._dynamo" in sys.modules:                  # the compiler: two seconds to import
    print("torch._dynamo")
"""


def test_a_reader_of_the_model_needs_six_other_files():
    """These are our modules that `import model` loads in a fresh process, besides package fast.

    It does not load the compiler.
    """
    result = subprocess.run([sys.executable, "-c", LOADED], cwd=ROOT, capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    below = {"router", "adapters", "vit", "data", "files", "fast.ops"}
    assert set(result.stdout.split()) == {"model", "fast"} | below


def test_no_line_is_too_long(sources):
    assert_none(find_long_lines(sources))


def test_no_function_is_too_long(sources):
    assert_none(find_long_functions(housed(sources)))


# The checks themselves can fail


def test_every_form_of_import_is_seen():
    source = """
import math, data
import fast.ops as ops
from files import LavinError
from fast.fold import fold
from extras import hf, plot

def late():
    import extras.serve
    if True:
        from tiny import world as small

class C:
    from vit import ViTConfig
"""
    imported = {"data", "fast/ops", "files", "fast/fold", "extras/hf", "extras/plot",
                "extras/serve", "tiny/world", "vit"}
    assert imports_of(source, imported | {"train", "extras/chat"}) == imported
    with pytest.raises(ValueError, match="relative"):
        imports_of("from . import ops", {"fast/ops"})


def test_an_arrow_that_does_not_point_down_is_found():
    assert find_faults({"model": {"data", "fast/ops"}, "train": {"model", "extras/serve"}}) == []
    upwards = find_faults({"data": {"files", "extras/hf"}})
    assert upwards == ["data.py (floor 2) imports extras/hf.py (floor 5), which is not below it"]
    level = find_faults({"extras/plot": {"extras/hf"}})
    assert len(level) == 1
    assert len(find_faults({"bench/speed": {"bench/recipe"}})) == 1


def test_a_file_without_a_floor_is_found():
    assert find_faults({"extras/new": set()}) == [
        "extras/new.py has no floor in tests/test_house.py"]
    assert len(find_faults({"new": {"data"}, "other/new": set()})) == 2


def test_a_circle_is_found():
    straight = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert find_circle(straight) == []
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c", "b"]
    assert find_circle({"a": {"a"}}) == ["a", "a"]


def test_long_lines_and_functions_are_found():
    line = "x" * LONGEST_LINE
    assert find_long_lines({"a": f"short\n{line}\n"}) == []
    assert find_long_lines({"a": f"short\n{line}x\n"}) == ["a.py:2 has 101 characters"]
    body = "    pass\n" * (LONGEST_FUNCTION - 1)
    assert find_long_functions({"a": f"def f():\n{body}"}) == []
    nested = f"class C:\n  def f():\n{body}    pass\n"
    assert find_long_functions({"a": nested}) == ["a.py: f has 46 lines"]
