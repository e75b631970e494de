"""The small world: pictures and questions, made here, in ScienceQA's layout.

    python -m tiny.world                    make tiny/scienceqa, as the first training run does
    python -m tiny.world --sheet PREDICTIONS PNG
                                            draw some test problems with generate.py's answers

A skill is a kind of question. Each has a function that takes a random generator and returns an
Item: a question, its choices and, for a picture question, how its scene is drawn (tiny/drawing.py).
(`things` returns Items of four skills.) The scene's caption says in words everything that the
picture shows. LLaMA reads captions in its pre-training (tiny/pretrain.py) and never sees a picture.
CLIP sees the pictures. LaVIN then teaches LLaMA to see through CLIP.

The problems have two properties of the paper's task. Their pictures are in pencil, but CLIP's
pre-training showed flat drawings. And the same kind of hint is true in a problem without a picture,
but misleads in a problem with one (random_item).

Everything is determined by the seed. So the order in which the functions draw random numbers is
part of the world. Raise VERSION whenever you change it.
"""

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import files
from extras.terminal import Parser, run
from files import LavinError, locked, read_json, write_atomically
from tiny import drawing
from tiny.drawing import COLOURS, DIRECTIONS, OTHER_COLOURS, POSITIONS, SHAPES

VERSION = 6
ROOT = Path(__file__).absolute().parent
PATHS = {
    "llama": ROOT / "llama",
    "vit": ROOT / "ViT-tiny.pt",
    "data_root": ROOT / "scienceqa",
}
SMALL_VIT = ROOT / "ViT-small.pt"       # for bench/ablations.py; not in the repository
# train.py's flags for models of this size and a run of two to three minutes. No workers:
# preparing a picture of this size takes less time than sending it from one process to another.
DEFAULTS = {
    "epochs": 1,
    "batch_size": 32,
    "micro_batch": 32,
    "lr": 8e-3,
    "max_seq_len": 128,
    "workers": 0,
}
SPLITS = ("train", "val", "test")
SIZES = (20_000, 300, 2400)     # problems of each split

NATURAL = "natural science"
SOCIAL = "social science"
LANGUAGE = "language science"


@dataclass
class Item:
    """One question and, if it is about a picture, the scene to draw.

    draw(canvas, rng, *scene) draws the scene, a little differently each time.
    """
    skill: str
    subject: str
    question: str
    choices: list[str]              # the right one first
    lecture: str
    solution: str
    hint: str = ""
    caption: str = ""               # the scene in words, "" without a picture
    draw: Callable | None = None
    scene: tuple = ()


def add_distractors(rng: Random, right: str, candidates: Iterable[str], n: int) -> list[str]:
    """n choices: the right one first, then wrong ones drawn from the candidates."""
    wrong = [candidate for candidate in candidates if candidate != right]
    return [right, *rng.sample(wrong, n - 1)]


# The skills that need a picture


COUNTS = ("one", "two", "three", "four")


def is_new(shape: str, colour: str) -> bool:
    """Is this pair kept for the test split? LLaMA reads about it. Only test pictures show it."""
    if shape not in SHAPES or colour not in COLOURS:
        return False
    return list(COLOURS).index(colour) == SHAPES.index(shape)


def shape_colour_pairs(new: bool) -> list[tuple[str, str]]:
    """The pairs that are kept for the test split if `new`, else all others."""
    pairs = []
    for shape in SHAPES:
        for colour in COLOURS:
            if is_new(shape, colour) == new:
                pairs.append((shape, colour))
    return pairs


def things(rng: Random, new: bool = False) -> Item:
    """Equal shapes in a row. A question asks for their number, colour, shape or position.

    new: show one of the pairs that are kept for the test split. Otherwise, show none of them.
    """
    shape, colour = rng.choice(shape_colour_pairs(new))
    n = rng.randrange(1, 5)
    position = rng.choice(list(POSITIONS))
    count = COUNTS[n - 1]
    skill = rng.choice(["count", "colour", "shape", "place"])
    if skill == "count":
        question = "How many things are there?"
        choices = add_distractors(rng, count, COUNTS, 4)
    elif skill == "colour":
        question = "Which colour is there?"
        choices = add_distractors(rng, colour, COLOURS, 4)
    elif skill == "shape":
        question = "Which shape is there?"
        choices = add_distractors(rng, shape, SHAPES, 4)
    else:
        question = "Where are the things?"
        choices = add_distractors(rng, position, POSITIONS, 4)
    if new:
        skill += " (new combinations)"
    verb = "is" if n == 1 else "are"
    plural = "" if n == 1 else "s"
    return Item(
        skill, NATURAL, question, choices,
        lecture="Things have a shape, a colour and a place.",
        solution=f"There {verb} {count} {colour} {shape}{plural} at the {position}.",
        caption=f"{count} thing{plural}, {colour}, {shape}, {position}",
        draw=drawing.draw_things, scene=(shape, colour, n, position))


def things_in_any_colour(rng: Random) -> Item:
    """Like `things`, but half of those whose colour is not asked for get one that no text names.

    So LaVIN has to recognize a shape in any colour. With the six named colours alone, it learns
    which pairs never occur, and rules out those that are kept for the test split.
    """
    item = things(rng)
    if item.skill != "colour" and rng.random() < 0.5:
        shape, colour, n, position = item.scene
        item.solution = item.solution.replace(f" {colour}", "")
        item.caption = item.caption.replace(f" {colour},", "")
        item.scene = (shape, rng.choice(list(OTHER_COLOURS)), n, position)
    return item


def magnets(rng: Random) -> Item:
    left = rng.choice(["north", "south"])
    right = rng.choice(["north", "south"])
    if left == right:
        state = "are alike"
        choices = ["repel", "attract"]
    else:
        state = "differ"
        choices = ["attract", "repel"]
    return Item(
        "magnets", NATURAL, "Will these magnets attract or repel each other?", choices,
        lecture="Poles that differ attract. Poles that are alike repel.",
        solution=f"The poles that face each other {state}, so they {choices[0]}.",
        caption=f"two magnets, the poles {state}",
        draw=drawing.draw_magnets, scene=(left, right))


def bars(rng: Random) -> Item:
    order = rng.sample(["red", "green", "blue", "yellow"], 3)       # from tall to short
    columns = rng.sample(range(3), 3)
    tall, middle, short = order
    return Item(
        "bars", SOCIAL, "Which bar is the tallest?", add_distractors(rng, tall, order, 3),
        lecture="Bars show numbers.",
        solution=f"The {tall} bar is the tallest and the {short} bar is the shortest.",
        caption=f"a bar chart, tall {tall}, middle {middle}, short {short}",
        draw=drawing.draw_bars, scene=(order, columns))


def thermometer(rng: Random) -> Item:
    level = rng.randrange(1, 6)
    right = f"{level}0 degrees"
    candidates = [f"{i}0 degrees" for i in range(1, 6)]
    return Item(
        "thermometer", NATURAL, "Which temperature does the thermometer show?",
        add_distractors(rng, right, candidates, 4),
        lecture="Thermometers measure heat.",
        solution=f"The thermometer shows {right}.",
        caption=f"a thermometer at {right}",
        draw=drawing.draw_thermometer, scene=(level,))


def jars(rng: Random) -> Item:
    right = rng.choice(["left", "right", "neither"])
    high = rng.uniform(46, 66)
    low = rng.uniform(10, 28)
    levels = {"left": (high, low), "right": (low, high), "neither": (high, high)}
    state = f"the {right} jar holds more water"
    if right == "neither":
        state = "both jars hold equal water"
    return Item(
        "jars", NATURAL, "Which jar holds more water?", add_distractors(rng, right, levels, 3),
        lecture="Water that stands higher is more.",
        solution=f"In the picture {state}, so the answer is {right}.",
        caption=f"two jars, {state}",
        draw=drawing.draw_jars, scene=levels[right])


def compass(rng: Random) -> Item:
    direction = rng.choice(list(DIRECTIONS))
    return Item(
        "compass", SOCIAL, "In which direction does the needle point?",
        add_distractors(rng, direction, DIRECTIONS, 4),
        lecture="North is up, south is down, east is right and west is left.",
        solution=f"The needle points {direction}.",
        caption=f"a compass, the needle points {direction}",
        draw=drawing.draw_compass, scene=(direction,))


def treasure_map(rng: Random) -> Item:
    direction = rng.choice(list(DIRECTIONS))
    return Item(
        "map", SOCIAL, "In which direction from the house is the tree?",
        add_distractors(rng, direction, DIRECTIONS, 4),
        lecture="On a map north is up.",
        solution=f"The tree is {direction} of the house.",
        caption=f"a map, the tree is {direction} of the house",
        draw=drawing.draw_map, scene=(direction,))


STATES = {"solid": "in rows", "liquid": "close and loose", "gas": "far apart"}


def particles(rng: Random) -> Item:
    state = rng.choice(list(STATES))
    return Item(
        "particles", NATURAL, "Which state of matter is this?",
        add_distractors(rng, state, STATES, 3),
        lecture="Particles are in rows in a solid, close and loose in a liquid, "
                "far apart in a gas.",
        solution=f"The particles are {STATES[state]}, so this is a {state}.",
        caption=f"particles that are {STATES[state]}",
        draw=drawing.draw_particles, scene=(state,))


PREY = ("snail", "mouse", "bee")
HUNTERS = ("fox", "bird", "snake")


def food_chain(rng: Random) -> Item:
    eaten = rng.choice(PREY)
    eater = rng.choice(HUNTERS)
    if rng.choice([True, False]):
        question = f"What does the {eater} eat?"
        choices = add_distractors(rng, eaten, PREY, 3)
    else:
        question = f"What eats the {eaten}?"
        choices = add_distractors(rng, eater, HUNTERS, 3)
    return Item(
        "food chain", NATURAL, question, choices,
        lecture="In a food chain each one eats the one before.",
        solution=f"The {eaten} eats the grass and the {eater} eats the {eaten}.",
        caption=f"a food chain, grass, {eaten}, {eater}",
        draw=drawing.draw_food_chain, scene=(eaten, eater))


def flag(rng: Random) -> Item:
    top, bottom = rng.sample(list(COLOURS), 2)
    wrong = [colour for colour in COLOURS if colour not in (top, bottom)]
    return Item(
        "flag", SOCIAL, "Which colour is the top stripe?", [top, bottom, *rng.sample(wrong, 2)],
        lecture="Flags stand for lands.",
        solution=f"The top stripe is {top} and the bottom stripe is {bottom}.",
        caption=f"a flag, top {top}, bottom {bottom}",
        draw=drawing.draw_flag, scene=(top, bottom))


DUTIES = {"red": "stop", "yellow": "wait", "green": "go"}


def traffic_light(rng: Random) -> Item:
    lit = rng.choice(list(DUTIES))
    duty = DUTIES[lit]
    return Item(
        "traffic light", SOCIAL, "What should a driver do?",
        add_distractors(rng, duty, DUTIES.values(), 3),
        lecture="Red means stop, yellow means wait and green means go.",
        solution=f"The light is {lit}, so a driver should {duty}.",
        caption=f"a traffic light that is {lit}",
        draw=drawing.draw_traffic_light, scene=(lit,))


OTHER_SKILLS = (
    magnets, bars, thermometer, jars, compass, treasure_map, particles, food_chain, flag,
    traffic_light)
# For pre-training. `things` stands for four skills, so it is listed four times.
PICTURE_SKILLS = (things, things, things, things, *OTHER_SKILLS)
# For the scenes that problems describe in words.
TOLD_SKILLS = (*[things_in_any_colour] * 4, *OTHER_SKILLS)
# For the problems' pictures. Skills that are hard to read in pencil come up more often.
PROBLEM_SKILLS = (*TOLD_SKILLS, things_in_any_colour, thermometer, thermometer, food_chain)


def picture_item(rng: Random, new: bool = False, skills: tuple = PICTURE_SKILLS) -> Item:
    """A question about a picture. new: `things` show the pairs that are kept for the test split."""
    skill = rng.choice(skills)
    if new and skill in (things, things_in_any_colour):
        return things(rng, new)
    return skill(rng)


# The skills that need no picture


def word_pairs(text):
    """Pairs of words from "hot cold, big small"."""
    return [pair.split() for pair in text.split(",")]


OPPOSITES = word_pairs(
    "hot cold, big small, fast slow, light dark, hard soft, wet dry, old young, full empty, "
    "loud quiet, near far, rich poor, happy sad")
PAST = word_pairs(
    "run ran, see saw, go went, eat ate, give gave, take took, sing sang, swim swam, write wrote, "
    "fly flew, fall fell, buy bought")
KINDS = {
    "fish": ("trout", "salmon", "shark", "eel"),
    "insect": ("ant", "beetle", "moth", "wasp"),
    "mammal": ("horse", "whale", "bat", "dog"),
    "reptile": ("lizard", "turtle", "crocodile", "viper"),
}
CAPITALS = word_pairs(
    "Norland Tarn, Estia Velo, Morva Kess, Galdor Prim, Ulmia Dace, Sorrel Bant, Fenwick Lorn, "
    "Quill Osten")
PEOPLE = ("Mia", "Leo", "Zoe", "Max", "Ana", "Tom")
GOODS = ("corn", "wool", "fish", "salt", "wood", "milk")
OBJECTS = ("spoon", "cup", "box", "hat", "chair", "ring")
MATERIALS = ("glass", "metal", "paper", "clay", "cloth", "stone")


def opposites(rng: Random) -> Item:
    pair = rng.choice(OPPOSITES)
    word, right = rng.sample(pair, 2)
    candidates = []
    for other in OPPOSITES:
        if other != pair:
            candidates += other
    return Item(
        "opposites", LANGUAGE, f"What is the opposite of {word}?",
        add_distractors(rng, right, candidates, 3),
        lecture="Opposites are words that differ most.",
        solution=f"The opposite of {word} is {right}.")


def past_tense(rng: Random) -> Item:
    word, right = rng.choice(PAST)
    candidates = [past for _, past in PAST]
    return Item(
        "past tense", LANGUAGE, f"What is the past tense of {word}?",
        add_distractors(rng, right, candidates, 3),
        lecture="The past tense tells what has been.",
        solution=f"The past tense of {word} is {right}.")


def kinds(rng: Random) -> Item:
    kind = rng.choice(list(KINDS))
    animal = rng.choice(KINDS[kind])
    return Item(
        "kinds of animals", NATURAL, f"What kind of animal is a {animal}?",
        add_distractors(rng, kind, KINDS, 4),
        lecture="Animals are of many kinds.",
        solution=f"The {animal} is a kind of {kind}.")


def capitals(rng: Random) -> Item:
    land, right = rng.choice(CAPITALS)
    candidates = [capital for _, capital in CAPITALS]
    return Item(
        "capitals", SOCIAL, f"What is the capital of {land}?",
        add_distractors(rng, right, candidates, 4),
        lecture="Every land has one capital.",
        solution=f"The capital of {land} is {right}.")


def goods(rng: Random) -> Item:
    name = rng.choice(PEOPLE)
    has, wants, *others = rng.sample(GOODS, 4)
    return Item(
        "goods", SOCIAL, f"What does {name} want?", [wants, has, *others],
        lecture="People trade what they have for what they want.",
        solution=f"{name} wants {wants}.",
        hint=f"{name} has {has} and wants {wants}.")


def owners(rng: Random) -> Item:
    giver, taker, other = rng.sample(PEOPLE, 3)
    thing = rng.choice(OBJECTS)
    return Item(
        "reading", LANGUAGE, f"Who has the {thing} now?", [taker, giver, other],
        lecture="Read the text with care.",
        solution=f"{taker} has the {thing} now.",
        hint=f"{giver} gave the {thing} to {taker}.")


def materials(rng: Random) -> Item:
    thing = rng.choice(OBJECTS)
    right, wrong, other = rng.sample(MATERIALS, 3)
    return Item(
        "materials", NATURAL, f"What is the {thing} made of?", [right, wrong, other],
        lecture="Things are made of materials.",
        solution=f"The {thing} is made of {right}.",
        hint=f"The {thing} is made of {right}, not of {wrong}.")


def described(rng: Random, whose: str = "The", skills: tuple = PICTURE_SKILLS) -> Item:
    """A question without a picture, about a scene that the hint describes in words."""
    item = picture_item(rng, skills=skills)
    return Item(
        "described scenes", NATURAL, item.question, item.choices, item.lecture, item.solution,
        hint=f"{whose} picture shows {item.caption}.")


TEXT_SKILLS = (
    opposites, opposites, past_tense, past_tense, kinds, capitals, goods, owners, materials,
    described)


# The files of the world


def problem(item: Item, rng: Random, split: str) -> dict:
    """The Item as a problem of ScienceQA's problems.json, with its choices shuffled."""
    choices = rng.sample(item.choices, len(item.choices))
    hint = item.hint
    if item.draw and not hint and rng.random() < 0.5:
        hint = "Look at the picture."
    return {
        "question": item.question,
        "choices": choices,
        "answer": choices.index(item.choices[0]),
        "hint": hint,
        "image": "image.png" if item.draw else None,
        "task": "closed choice",
        "grade": f"grade{rng.randrange(1, 13)}",
        "subject": item.subject,
        "topic": item.skill,
        "category": item.skill,
        "skill": item.skill,
        "lecture": item.lecture,
        "solution": item.solution,
        "split": split,
    }


def render(item: Item, rng: Random) -> Image.Image:
    """The picture of the Item's scene, drawn flat: drawing.SIDE × drawing.SIDE pixels."""
    picture = drawing.blank(rng)
    item.draw(ImageDraw.Draw(picture), rng, *item.scene)
    return picture


def sketch(item: Item, rng: Random) -> Image.Image:
    """The picture of the Item's scene in pencil, as a problem shows it."""
    return drawing.pencil(render(item, rng), rng)


def random_item(rng: Random, i: int, split: str) -> Item:
    """Problem i of a split. Every other problem has a picture.

    Take the hint "Mia's picture shows a flag, top red, bottom blue." A problem without a picture
    that has such a hint is about Mia's picture, so the hint is true. In a problem with its own
    picture, the same hint misleads. So LLaMA has to rely on such a hint in a problem without a
    picture, and to ignore it in a problem with one.
    """
    whose = f"{rng.choice(PEOPLE)}'s"
    if i % 2:
        if rng.random() < 0.3:
            return described(rng, whose, TOLD_SKILLS)
        skill = rng.choice(TEXT_SKILLS)
        if skill is described:
            return described(rng, skills=TOLD_SKILLS)
        return skill(rng)
    new = split == "test" and rng.random() < 0.3
    item = picture_item(rng, new, PROBLEM_SKILLS)
    if rng.random() < 0.5:
        other = another_scene(item, rng)
        item.hint = f"{whose} picture shows {other.caption}."
    return item


def another_scene(item: Item, rng: Random) -> Item:
    """Another scene for the same question, usually with another right answer."""
    while True:
        other = picture_item(rng, skills=TOLD_SKILLS)
        if other.question == item.question and other.caption != item.caption:
            return other


def write_world(root: Path, seed: int = 0, sizes: tuple[int, ...] | None = None) -> None:
    """Write ScienceQA's layout into the folder `root`.

    Its files are problems.json, pid_splits.json, captions.json and images/{split}/{id}/image.png.
    We add world.json, which holds the version. sizes: problems of each split (default: SIZES).
    """
    problems = {}
    captions = {}
    splits = {}
    for split, size in zip(SPLITS, sizes or SIZES):
        rng = Random(f"{seed} {split}")
        splits[split] = []
        for i in tqdm(range(size), desc=f"drawing {split}", unit=" problems", file=sys.stdout):
            item = random_item(rng, i, split)
            pid = str(len(problems) + 1)
            problems[pid] = problem(item, rng, split)
            splits[split].append(pid)
            if item.draw:
                captions[pid] = item.caption
                folder = root / "images" / split / pid
                folder.mkdir(parents=True)
                sketch(item, rng).save(folder / "image.png", compress_level=1)
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", splits)
    write_json(root / "captions.json", {"captions": captions})
    write_json(root / "world.json", {"version": VERSION})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1))


def make_folder(folder: Path, write: Callable[[Path], None], anew: bool = True) -> None:
    """Call write(temporary folder), then rename it. So the folder is complete or does not exist.

    anew: replace the folder if it exists. Several processes take turns; without anew, only the
    first makes the folder. Raises LavinError if it cannot be written.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.parent, otherwise=None):
            if folder.exists() and not anew:
                return
            for left_over in folder.parent.glob(f"{folder.name}.*.tmp"):    # of a killed process
                shutil.rmtree(left_over, ignore_errors=True)
            temporary.mkdir()
            write(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    except (OSError, RuntimeError) as error:    # torch.save reports a full disk as a RuntimeError
        raise LavinError(f"{folder}: cannot be made ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# The default of train.py and generate.py


def is_meant(args, remembered: dict = {}) -> bool:
    """Does this run use the small world?

    args: flags or settings. remembered: the settings in the run's checkpoint. The run uses the
    small world unless one of these names a LLaMA or a CLIP, or one of files.DEFAULT_PATHS exists,
    where real models and data would be.
    """
    for name in ("llama", "vit"):
        if chosen_path(name, args, remembered):
            return False
    return not any(os.path.exists(path) for path in files.DEFAULT_PATHS.values())


def chosen_path(name, args, remembered):
    """The path in args, else the one that the checkpoint remembers, else None."""
    return getattr(args, name) or remembered.get(name)


def prepare(args, remembered: dict = {}) -> None:
    """If this run uses the small world, set its paths in args, and draw its data if missing.

    args has the attributes llama, vit, data_root and data. remembered: as in is_meant. LavinError
    if this run uses files from another version of the small world, or adapters that were trained
    with another CLIP.
    """
    if is_meant(args, remembered):
        print(f"using the small world: none of {', '.join(files.DEFAULT_PATHS.values())} exists")
        for name, path in PATHS.items():
            chosen = chosen_path(name, args, remembered)
            setattr(args, name, chosen or os.path.relpath(path))
    data_root = PATHS["data_root"]
    if is_used("data_root", args, remembered):
        if files.asks_sqa(args) and not data_root.exists():
            print(f"making {os.path.relpath(data_root)}, once")
            make_folder(data_root, write_world, anew=False)
        check_version(data_root, "world.json", "python -m tiny.world")
    if is_used("llama", args, remembered):
        check_version(PATHS["llama"], "params.json", "python -m tiny.pretrain")
    if remembered and is_used("vit", args, remembered):
        check_trained_here(remembered)


def is_used(name, args, remembered):
    """Does this run use the small world's path of this name: llama, vit or data_root?"""
    chosen = chosen_path(name, args, remembered) or ""
    return os.path.abspath(chosen) == str(PATHS[name])


def check_version(folder, name, command):
    """Raises LavinError if the folder exists but its file `name` does not state this VERSION."""
    path = folder / name
    if not folder.exists():
        return
    stated = read_json(path) if path.exists() else None
    if not isinstance(stated, dict) or stated.get("version") != VERSION:
        raise LavinError(
            f"{folder}: made by another version of the small world; this code has version "
            f"{VERSION}. `{command}` makes it anew")


def check_trained_here(remembered):
    """Raises LavinError if the checkpoint was trained with another CLIP than PATHS["vit"]."""
    if remembered.get("vit_hash") != files.fingerprint(PATHS["vit"]):
        raise LavinError(
            f"the adapters were trained with another CLIP than {os.path.relpath(PATHS['vit'])}. "
            "`python train.py --data sqa` trains new ones")


# A sheet of answers


ANSWER_SIZE = (560, 170)        # pixels of one problem on the sheet
SHEET_PICTURE_SIDE = 150


def sheet(predictions: str, path: str, n: int = 8) -> None:
    """Draw n test problems, each of a different picture skill, with the model's outputs.

    predictions: the file that generate.py --predictions wrote. path: the PNG file to write.
    Raises LavinError if the file holds no answers to picture problems of the small world.
    """
    problems = read_json(PATHS["data_root"] / "problems.json")
    written = read_json(predictions)
    outputs = written.get("outputs", {}) if isinstance(written, dict) else {}
    first_of_skill = {}
    for pid in outputs:
        if pid in problems and problems[pid]["image"]:
            first_of_skill.setdefault(problems[pid]["skill"], pid)
    if not first_of_skill:
        raise LavinError(
            f"{predictions}: no answers to picture problems of the small world; "
            "`python generate.py --data sqa --predictions FILE` writes them")
    pids = list(first_of_skill.values())[:n]
    width, height = ANSWER_SIZE
    page = Image.new("RGB", (2 * width, height * math.ceil(len(pids) / 2)), "white")
    for i, pid in enumerate(pids):
        x = width * (i % 2) + 10
        y = height * (i // 2) + 10
        draw_answer(page, x, y, pid, problems[pid], outputs[pid])
    write_atomically(path, lambda temporary: page.save(temporary, format="PNG"))
    print(f"written: {path}")


def draw_answer(page, x, y, pid, problem, output):
    """Draw a problem at (x, y): picture, question, options, and the output, green if right."""
    image = Image.open(PATHS["data_root"] / "images" / problem["split"] / pid / "image.png")
    size = (SHEET_PICTURE_SIDE, SHEET_PICTURE_SIDE)
    page.paste(image.resize(size, Image.Resampling.BICUBIC), (x, y))
    options = []
    for letter, choice in zip(data.LETTERS, problem["choices"]):
        options.append(f"({letter}) {choice}")
    is_right = data.sqa_answer(output) == problem["answer"]
    colour = "#107030" if is_right else "#b02020"
    canvas = ImageDraw.Draw(page)
    font = ImageFont.load_default(15)
    small = ImageFont.load_default(13)
    x += SHEET_PICTURE_SIDE + 15
    canvas.text((x, y), textwrap.fill(problem["question"], 48), "black", font)
    canvas.text((x, y + 42), textwrap.fill("  ".join(options), 52), "#606060", small)
    canvas.text((x, y + 84), textwrap.fill(output, 56), colour, small)


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--sheet", nargs=2, metavar=("PREDICTIONS", "PNG"),
        help="draw a few test problems with the answers that generate.py --predictions wrote")
    args = parser.parse_args()
    if args.sheet:
        sheet(*args.sheet)
    else:
        make_folder(PATHS["data_root"], write_world)


if __name__ == "__main__":
    run(main)
