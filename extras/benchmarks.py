"""Two benchmarks for the chatbot: MME (arXiv 2306.13394), and captions for COCO's evaluation.

MME has a folder for each subtask. Each picture has a text file of the same name, in the same
folder. If the pictures are in images/, the text files are in questions_answers_YN/. A text file has
two lines, "question<tab>Yes" or "question<tab>No". The score of a subtask is its accuracy plus its
accuracy+, both in percent. Accuracy+ is the share of pictures with both questions right.
"""

import os
from pathlib import Path

from data import Sample, check_unicode
from extras.instructions import instruction_prompt, split_folder
from files import LavinError, check_regular, inside, read_json

PERCEPTION = ("existence", "count", "position", "color", "posters",
              "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")
PICTURES = (".jpg", ".png", ".jpeg")


# MME


def read_questions(picture, subtask):
    """The questions about a picture in the folder `subtask` -> [(question, True for yes)]."""
    path = picture.with_suffix(".txt")
    if not path.exists():
        path = subtask / "questions_answers_YN" / f"{picture.stem}.txt"
    try:
        check_regular(path)
        text = path.read_text(encoding="utf-8")
    except (LavinError, OSError, UnicodeDecodeError) as error:
        reason = f"its questions file, {path.name}, cannot be read ({error})"
        raise LavinError(f"{picture}: {reason}") from error
    questions = []
    for number, line in enumerate(text.strip().splitlines(), 1):
        question, _, answer = line.rpartition("\t")
        question = question.strip()
        answer = answer.strip().lower()
        if not question or answer not in ("yes", "no"):
            raise LavinError(f"{path} line {number}: not a question, a tab, and Yes or No")
        questions.append((question, answer == "yes"))
    if len(questions) != 2:
        raise LavinError(f"{path}: MME asks two questions about a picture, not {len(questions)}")
    return questions


def load_mme(folder: str | Path) -> tuple[list[Sample], dict[str, bool]]:
    """Return ([Sample], {its id, "subtask/picture/number": True for yes}).

    Raises LavinError if something is missing or malformed. The error names the file and the line.
    """
    if not os.path.isdir(folder):
        raise LavinError(f"--data mme:{folder}: there is no such folder; "
                         "give the one that holds a folder for each subtask")
    samples = []
    truths = {}
    for subtask in sorted(Path(folder).iterdir()):
        if not subtask.is_dir():
            continue
        for picture in sorted(subtask.rglob("*")):
            if picture.suffix.lower() not in PICTURES:
                continue
            for number, (question, truth) in enumerate(read_questions(picture, subtask), 1):
                identity = f"{subtask.name}/{picture.stem}/{number}"
                if identity in truths:
                    raise LavinError(f"{picture}: {subtask.name} has another picture "
                                     "of the same name")
                prompt = instruction_prompt(question, has_picture=True)
                samples.append(Sample(prompt, "", picture, identity))
                truths[identity] = truth
    if not samples:
        raise LavinError(f"--data mme:{folder}: it holds no folder of pictures with questions")
    return samples, truths


def yes_or_no(text: str) -> bool | None:
    """True, False, or None if neither is in the first four characters, which MME looks at."""
    start = text.strip().lower()[:4]
    if "yes" in start:
        return True
    if "no" in start:
        return False
    return None


def mme_scores(outputs: dict[str, str], truths: dict[str, bool]) -> dict:
    """{id: text}, {id: truth} -> {subtask: (accuracy, accuracy+, their sum)}, in percent.

    "perception" and "cognition" hold the summed scores of their subtasks.
    """
    subtasks = {}                   # {subtask: {picture: [is this answer correct?]}}
    for identity, truth in truths.items():
        subtask, picture, _ = identity.split("/")
        pictures = subtasks.setdefault(subtask, {})
        pictures.setdefault(picture, []).append(yes_or_no(outputs[identity]) == truth)
    scores = {}
    for subtask, pictures in subtasks.items():
        n_questions = sum(len(answers) for answers in pictures.values())
        n_correct = sum(sum(answers) for answers in pictures.values())
        n_both = sum(all(answers) for answers in pictures.values())
        accuracy = 100 * n_correct / n_questions
        accuracy_plus = 100 * n_both / len(pictures)
        scores[subtask] = (accuracy, accuracy_plus, accuracy + accuracy_plus)
    perception = sum(scores[subtask][2] for subtask in PERCEPTION if subtask in scores)
    cognition = sum(scores[subtask][2] for subtask in COGNITION if subtask in scores)
    return scores | {"perception": perception, "cognition": cognition}


def mme_table(scores: dict) -> str:
    """The scores as text: a row for each subtask, then the two sums."""
    rows = [f"{'subtask':24}{'accuracy':>10}{'accuracy+':>11}{'score':>10}"]
    for name, value in scores.items():
        if isinstance(value, tuple):
            accuracy, accuracy_plus, total = value
            rows.append(f"{name:24}{accuracy:>10.2f}{accuracy_plus:>11.2f}{total:>10.2f}")
    for name in ("perception", "cognition"):
        rows.append(f"{name:24}{scores[name]:>31.2f}")
    return "\n".join(rows)


# Captions


def load_captions(source: str, prompt: str) -> list[Sample]:
    """FILE[:IMAGES] -> one Sample per picture, with this prompt and the picture's id.

    FILE has the form of COCO's annotations, {"images": [{id, file_name}, …]}. IMAGES is the folder
    of the pictures (default: the folder of FILE). Raises LavinError if something is missing or
    malformed.
    """
    path, folder = split_folder(source)
    if folder and not os.path.isdir(folder):
        raise LavinError(f"--data caption:{source}: there is no folder {folder}")
    folder = Path(folder or Path(path).parent)
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise LavinError(f'{path}: has no list "images"; COCO\'s annotations have one')
    prompt = instruction_prompt(prompt, has_picture=True)
    check_unicode(Sample(prompt))
    samples = {}
    for number, image in enumerate(images, 1):
        try:
            identity, picture = read_image(image, folder)
            if identity in samples:
                raise ValueError(f"has the same id as another one, {identity!r}")
        except ValueError as error:
            raise LavinError(f"{path}: image {number} {error}") from error
        samples[identity] = Sample(prompt, "", picture, identity)
    return list(samples.values())


def read_image(image, folder):
    """An entry of "images" -> (id, path of its picture). Raises ValueError if it has none."""
    if not isinstance(image, dict) or type(image.get("id")) not in (int, str):
        raise ValueError('has no "id" that is a number or text')
    name = image.get("file_name")
    if not isinstance(name, str):
        raise ValueError('has no "file_name"')
    path = inside(folder, name)
    if not os.path.isfile(path):
        raise ValueError(f'has a "file_name" that is not a file in {folder}')
    return image["id"], path
