"""Benchmarks of the chatbot: MME (arXiv 2306.13394) and captions in the format of the COCO evaluation.

MME is a folder for each subtask; beside every picture, or in questions_answers_YN/ where the pictures are in images/,
lies a text of the same name with two lines, "question<tab>Yes" or "No". A subtask scores its accuracy in percent plus
its accuracy+, the percent of pictures of which both questions are answered rightly.
"""

from pathlib import Path

from data import Sample
from files import LavinError, read_json
from instructions import instruction_prompt, split_folder

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PICTURES = (".jpg", ".png", ".jpeg")


def load_mme(folder):
    """-> ([Sample], {its id, "subtask/picture/number": True for yes}). LavinError names what is wrong, with the line."""
    if not Path(folder).is_dir():
        raise LavinError(f"--data mme:{folder}: there is no such folder")
    samples, truths = [], {}
    for subtask in sorted(path for path in Path(folder).iterdir() if path.is_dir()):
        for picture in sorted(path for path in subtask.rglob("*") if path.suffix.lower() in PICTURES):
            beside, apart = picture.with_suffix(".txt"), subtask / "questions_answers_YN" / f"{picture.stem}.txt"
            questions = beside if beside.exists() else apart
            try:
                lines = questions.read_text(encoding="utf-8").strip().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise LavinError(f"{picture}: its questions, {questions.name}, cannot be read ({error})") from error
            for number, line in enumerate(lines, 1):
                question, _, answer = line.rpartition("\t")
                if not question.strip() or answer.strip().lower() not in ("yes", "no"):
                    raise LavinError(f"{questions} line {number}: not a question, a tab, and Yes or No")
                identity = f"{subtask.name}/{picture.stem}/{number}"
                samples.append(Sample(instruction_prompt(question.strip()), "", picture, identity))
                truths[identity] = answer.strip().lower() == "yes"
    if not samples:
        raise LavinError(f"--data mme:{folder}: holds no folder of pictures with questions")
    return samples, truths


def yes_or_no(text):
    """True, False, or None where a text begins with neither. MME looks at the first four letters."""
    start = text.strip().lower()[:4]
    return True if "yes" in start else False if "no" in start else None


def mme_scores(outputs, truths):
    """{id: text}, {id: truth} -> {subtask: (accuracy, accuracy+, their sum)}, percent; and under "perception" and
    "cognition" the sums over their subtasks."""
    right = {}
    for identity, truth in truths.items():
        subtask, picture, _ = identity.split("/")
        right.setdefault(subtask, {}).setdefault(picture, []).append(yes_or_no(outputs[identity]) == truth)
    scores = {}
    for subtask, pictures in right.items():
        single = [r for rs in pictures.values() for r in rs]
        accuracy, plus = 100 * sum(single) / len(single), 100 * sum(map(all, pictures.values())) / len(pictures)
        scores[subtask] = accuracy, plus, accuracy + plus
    return scores | {name: sum(scores[subtask][2] for subtask in subtasks if subtask in scores)
                     for name, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION))}


def mme_table(scores):
    rows = [f"{name:24}{accuracy:>10.2f}{plus:>11.2f}{total:>10.2f}"
            for name, (accuracy, plus, total) in ((n, s) for n, s in scores.items() if isinstance(s, tuple))]
    return "\n".join([f"{'subtask':24}{'accuracy':>10}{'accuracy+':>11}{'score':>10}", *rows,
                      *(f"{name:24}{scores[name]:>31.2f}" for name in ("perception", "cognition"))])


def load_captions(source, prompt):
    """FILE[:IMAGES], {"images": [{id, file_name}, …]} as in COCO's annotations -> [Sample], its id the picture's."""
    path, folder = split_folder(source)
    content, folder = read_json(path), Path(folder or Path(path).parent)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise LavinError(f'{path}: holds no list "images", as COCO\'s annotations do')
    samples = []
    for number, image in enumerate(images, 1):
        known = isinstance(image, dict) and isinstance(image.get("file_name"), str) and isinstance(image.get("id"), int | str)
        if not known or not (folder / image["file_name"]).is_file():
            raise LavinError(f'{path}: image {number} has no "id" or its "file_name" is not in {folder}')
        samples.append(Sample(instruction_prompt(prompt), "", folder / image["file_name"], image["id"]))
    return samples
