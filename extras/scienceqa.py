"""ScienceQA's files: problems.json, pid_splits.json, captions.json and the pictures, all checked.

    DIR/problems.json                           {id: problem}
    DIR/pid_splits.json                         {"train": [id, …], "val": …, "test": …}
    DIR/captions.json                           {"captions": {id: text}}
    DIR/images/{train,val,test}/{id}/image.png

Anything wrong raises a LavinError that names the file, the problem and the field.
"""

import re
from pathlib import Path

from data import LETTERS, Sample, check_format, is_unicode, sqa_prompt
from extras.values import short
from files import LavinError, check_regular, inside, read_json

SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}


def problem_fault(problem) -> str | None:
    """What is wrong with a problem of problems.json, or None."""
    texts = ("question", "hint", "lecture", "solution", "split", "subject", "grade")
    if not isinstance(problem, dict):
        return "is not an object"
    for field in (*texts, "choices", "answer", "image"):
        if field not in problem:
            return f"lacks the field {field!r}"
        if field in texts and not is_unicode(problem[field]):
            return f"has a {field!r} that is not Unicode text"
    choices = problem["choices"]
    answer = problem["answer"]
    only_text = isinstance(choices, list) and all(is_unicode(choice) for choice in choices)
    if not only_text or not 1 <= len(choices) <= len(LETTERS):
        return f"does not have 1 to {len(LETTERS)} texts as choices"
    if type(answer) is not int or not 0 <= answer < len(choices):
        return f"has the answer {short(answer)}, outside its {len(choices)} choices"
    if problem["subject"] not in SUBJECTS:
        return f"has the subject {problem['subject']!r}, which is not one of ScienceQA's"
    if not re.fullmatch("grade[0-9]{1,2}", problem["grade"]):
        return f"has the grade {problem['grade']!r}, which is not one of ScienceQA's"
    if not isinstance(problem["image"], str | None):
        return f"has the image {short(problem['image'])}, which is neither a file name nor null"
    return None


def read_problems(root: Path) -> dict:
    """problems.json -> {id: problem}, every field checked."""
    path = root / "problems.json"
    problems = read_json(path)
    if not isinstance(problems, dict):
        raise LavinError(f"{path}: must be an object, as in ScienceQA")
    for pid, problem in problems.items():
        fault = problem_fault(problem)
        if fault:
            raise LavinError(f"{path}: problem {pid} {fault}")
    return problems


def split_fault(pids, problems) -> str | None:
    """What is wrong with a split of pid_splits.json, or None."""
    if not isinstance(pids, list):
        return "is not a list of ids"
    seen = set()
    for pid in pids:
        if type(pid) not in (str, int):
            return f"holds {short(pid)}, which is not an id"
        pid = str(pid)
        if pid not in problems:
            return f"names problem {pid}, which problems.json lacks"
        if pid in seen:
            return f"names problem {pid} twice"
        seen.add(pid)
    return None


def read_split(root: Path, split: str, problems: dict) -> list[str]:
    """The ids of a split from pid_splits.json. All splits are checked, not only this one."""
    path = root / "pid_splits.json"
    splits = read_json(path)
    if not isinstance(splits, dict):
        raise LavinError(f"{path}: must be an object, as in ScienceQA")
    for name, pids in splits.items():
        fault = split_fault(pids, problems)
        if fault:
            raise LavinError(f"{path}: split {name!r} {fault}")
    if split not in splits:
        raise LavinError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
    if not splits[split]:
        raise LavinError(f"{path}: split {split!r} is empty")
    return [str(pid) for pid in splits[split]]


def read_captions(root: Path) -> dict[str, str]:
    """captions.json -> {id: text}."""
    path = root / "captions.json"
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("captions"), dict):
        raise LavinError(f'{path}: must be an object with an object "captions", as in ScienceQA')
    for pid, caption in content["captions"].items():
        if not is_unicode(caption):
            raise LavinError(f"{path}: the caption of problem {pid} is not Unicode text")
    return content["captions"]


def find_image(root: Path, pid: str, problem: dict) -> Path | None:
    """The path of a problem's picture. Raises LavinError if it is not a file in images/."""
    if not problem["image"]:
        return None
    try:
        path = inside(root / "images", f"{problem['split']}/{pid}/{problem['image']}")
        check_regular(path)
    except (ValueError, LavinError) as error:
        raise LavinError(f"{root}/problems.json: problem {pid}: {error}") from error
    return path


def load_sqa(root: str | Path, split: str, format: str = "QCM-ALE",
             use_captions: bool = False,
             use_images: bool = True) -> tuple[dict, list[Sample]]:
    """One split of ScienceQA -> ({id: problem}, [Sample]). Captions go into the context."""
    check_format(format)
    root = Path(root)
    problems = read_problems(root)
    pids = read_split(root, split, problems)
    captions = read_captions(root) if use_captions else {}
    chosen = {pid: problems[pid] for pid in pids}
    samples = []
    for pid, problem in chosen.items():
        image = find_image(root, pid, problem) if use_images else None
        prompt, answer = sqa_prompt(problem, format, captions.get(pid, ""))
        samples.append(Sample(prompt, answer, image, pid))
    return chosen, samples
