"""The embedded default: a small world, a LLaMA that has read about it and a CLIP that has seen it.

    python tiny.py               make tiny/scienceqa, as the first `python train.py --data sqa` does by itself
    python tiny.py --pretrain    make the two base models tiny/llama and tiny/ViT-tiny.pt anew (about an hour)

Nothing here is known to the model, the data or the loop: it only makes files in the official formats. The world has
pictures drawn by the functions below, and questions in ScienceQA's layout. LLaMA is pre-trained on text of that world:
facts, and questions about scenes that are described in words. CLIP is pre-trained contrastively on rendered scenes and
their captions, with a text tower that is then dropped. That the one learns to see through the other is LaVIN's work.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import files
import vit as clip
from adapters import Adapter, AdapterConfig
from files import LavinError, read_json, run, write_atomically
from model import LLaMA, LLaMAConfig

VERSION = 1                             # of the world: raise it with any change to what follows
ROOT = Path(__file__).absolute().parent / "tiny"
PATHS = {"llama": ROOT / "llama", "vit": ROOT / "ViT-tiny.pt", "data_root": ROOT / "scienceqa"}
# Of train.py, for models of this size and three minutes. Pictures this small are decoded sooner than handed over.
DEFAULTS = {"epochs": 3, "lr": 6e-3, "dropout": 0.0, "micro_batch": 32, "max_seq_len": 128, "workers": 0}
SIZES = (6000, 300, 600)                # problems of the splits train, val and test
TOKENIZER_DOCUMENTS = 20_000
SIDE = 128                              # pixels of a picture; CLIP sees them at 64


# The world: scenes, and what can be asked about them


@dataclass
class Item:
    """One question, and the scene that it is about."""
    skill: str
    subject: str
    question: str
    choices: list[str]                  # the right one first
    lecture: str
    solution: str
    hint: str = ""
    caption: str = ""                   # the scene in words
    draw: Callable | None = None        # draw(ImageDraw, Random) paints it; the Random moves it about


COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 205, 40),
           "purple": (145, 60, 175), "orange": (240, 140, 30)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
COUNTS = ("one", "two", "three", "four")
PLACES = {"top": (0, -30), "bottom": (0, 30), "left": (-30, 0), "right": (30, 0)}
DIRECTIONS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"
DARK = (60, 60, 60)


def pick(rng, right, others, k):
    """k choices, the right one first."""
    return [right, *rng.sample([other for other in others if other != right], k - 1)]


def blob(d, shape, x, y, r, fill):
    """One of SHAPES about (x, y), r pixels from the middle to its edge."""
    if shape == "circle":
        d.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        d.rectangle((x - r, y - r, x + r, y + r), fill)
    elif shape == "cross":
        d.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        d.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    else:
        corners = 3 if shape == "triangle" else 10
        lengths = [r * (0.45 if corners == 10 and i % 2 else 1.15) for i in range(corners)]
        angles = [2 * math.pi * i / corners for i in range(corners)]
        d.polygon([(x + s * math.sin(a), y - s * math.cos(a)) for s, a in zip(lengths, angles)], fill)


def is_new(shape, colour):
    """Is this pair kept for the test split? LLaMA has read of it, but no picture of it is shown in training."""
    return list(COLOURS).index(colour) == SHAPES.index(shape)


def things(rng, new):
    """Equal shapes in a row: how many, which colour, which shape, where."""
    pairs = [(shape, colour) for shape in SHAPES for colour in COLOURS if is_new(shape, colour) == new]
    (shape, colour), n, place = rng.choice(pairs), rng.randrange(1, 5), rng.choice(list(PLACES))
    plural = "s" if n > 1 else ""

    def draw(d, rng):
        dx, dy = PLACES[place]
        r, gap = rng.uniform(11, 13.5), rng.uniform(28, 31)
        for i in range(n):
            along = (i - (n - 1) / 2) * gap
            x, y = (64 + dx, 64 + along) if dx else (64 + along, 64 + dy)
            blob(d, shape, x + rng.uniform(-3, 3), y + rng.uniform(-3, 3), r, shade(colour, rng))

    skill, question, right, others = rng.choice([
        ("count", "How many things are there?", COUNTS[n - 1], COUNTS),
        ("colour", "Which colour is there?", colour, list(COLOURS)),
        ("shape", "Which shape is there?", shape, SHAPES),
        ("place", "Where are the things?", place, list(PLACES))])
    return Item(skill + (" (new combinations)" if new else ""), NATURAL, question, pick(rng, right, others, 4),
                "Things have a shape, a colour and a place.",
                f"There {'are' if n > 1 else 'is'} {COUNTS[n - 1]} {colour} {shape}{plural} at the {place}.",
                caption=f"{COUNTS[n - 1]} thing{plural}, {colour}, {shape}, {place}", draw=draw)


def shade(colour, rng):
    """A colour of the palette, a little off."""
    return tuple(min(255, max(0, round(c + rng.uniform(-15, 15)))) for c in COLOURS[colour])


def magnets(rng):
    poles = rng.choice(["north", "south"]), rng.choice(["north", "south"])
    differ = poles[0] != poles[1]

    def draw(d, rng):
        y, h, w, gap = rng.uniform(54, 74), rng.uniform(10, 20), rng.uniform(20, 26), rng.uniform(3, 9)
        for side, pole in zip((-1, 1), poles):
            for near, other in ((True, pole), (False, "south" if pole == "north" else "north")):
                edges = sorted(64 + side * (gap + w * k) for k in ((0, 1) if near else (1, 2)))
                d.rectangle((edges[0], y - h, edges[1], y + h), shade("red" if other == "north" else "blue", rng))

    right, wrong = ("attract", "repel") if differ else ("repel", "attract")
    return Item("magnets", NATURAL, "Will these magnets attract or repel each other?", [right, wrong],
                "Poles that differ attract. Poles that are alike repel.",
                f"The poles that face each other {'differ' if differ else 'are alike'}, so they {right}.",
                caption=f"two magnets, the poles {'differ' if differ else 'are alike'}", draw=draw)


def bars(rng):
    order = rng.sample(["red", "green", "blue", "yellow"], 3)           # from tall to short
    places = rng.sample(range(3), 3)

    def draw(d, rng):
        d.line((12, 112, 116, 112), DARK, 3)
        for colour, place, height in zip(order, places, (88, 54, 22)):
            x, top = 31 + 33 * place, 110 - height - rng.uniform(-7, 7)
            d.rectangle((x - 11, top, x + 11, 110), shade(colour, rng))

    return Item("bars", SOCIAL, "Which bar is the tallest?", pick(rng, order[0], order, 3), "Bars show numbers.",
                f"The {order[0]} bar is the tallest and the {order[2]} bar is the shortest.",
                caption=f"a bar chart, tall {order[0]}, middle {order[1]}, short {order[2]}", draw=draw)


def thermometer(rng):
    level = rng.randrange(1, 6)

    def draw(d, rng):
        x, y = rng.uniform(54, 74), rng.uniform(-3, 3)
        d.rounded_rectangle((x - 9, 8 + y, x + 9, 106 + y), 8, "white", DARK, 2)
        d.ellipse((x - 15, 96 + y, x + 15, 122 + y), shade("red", rng))
        d.rectangle((x - 5, 96 - 16 * level + y + rng.uniform(-2, 2), x + 5, 104 + y), shade("red", rng))
        for i in range(1, 6):
            d.line((x + 12, 96 - 16 * i + y, x + 20, 96 - 16 * i + y), DARK, 2)

    return Item("thermometer", NATURAL, "Which temperature does the thermometer show?",
                pick(rng, f"{level}0 degrees", [f"{i}0 degrees" for i in range(1, 6)], 4),
                "Thermometers measure heat.", f"The thermometer shows {level}0 degrees.",
                caption=f"a thermometer at {level}0 degrees", draw=draw)


def jars(rng):
    right = rng.choice(["left", "right", "neither"])
    high, low = rng.uniform(46, 66), rng.uniform(10, 28)
    levels = {"left": (high, low), "right": (low, high), "neither": (high, high)}[right]

    def draw(d, rng):
        for x, level in zip((36, 92), levels):
            d.rectangle((x - 17, 108 - level, x + 17, 108), shade("blue", rng))
            d.line([(x - 19, 30), (x - 19, 110), (x + 19, 110), (x + 19, 30)], DARK, 3)

    told = "both jars hold equal water" if right == "neither" else f"the {right} jar holds more water"
    return Item("jars", NATURAL, "Which jar holds more water?", pick(rng, right, ["left", "right", "neither"], 3),
                "Water that stands higher is more.", f"In the picture {told}, so the answer is {right}.",
                caption=f"two jars, {told}", draw=draw)


def compass(rng):
    direction = rng.choice(list(DIRECTIONS))

    def draw(d, rng):
        x, y, a = rng.uniform(60, 68), rng.uniform(60, 68), rng.uniform(-0.2, 0.2)
        d.ellipse((x - 48, y - 48, x + 48, y + 48), "white", DARK, 4)
        dx, dy = DIRECTIONS[direction]
        dx, dy = dx * math.cos(a) - dy * math.sin(a), dx * math.sin(a) + dy * math.cos(a)
        for length, colour in ((40, shade("red", rng)), (-40, (150, 150, 150))):
            d.polygon([(x + length * dx, y + length * dy), (x - 9 * dy, y + 9 * dx), (x + 9 * dy, y - 9 * dx)], colour)

    return Item("compass", SOCIAL, "In which direction does the needle point?", pick(rng, direction, DIRECTIONS, 4),
                "North is up, south is down, east is right and west is left.", f"The needle points {direction}.",
                caption=f"a compass, the needle points {direction}", draw=draw)


def treasure_map(rng):
    direction = rng.choice(list(DIRECTIONS))

    def draw(d, rng):
        dx, dy = (c * rng.uniform(30, 36) for c in DIRECTIONS[direction])
        x, y = 64 + rng.uniform(-10, 10), 64 + rng.uniform(-10, 10)
        hx, hy, tx, ty = x - dx, y - dy, x + dx, y + dy
        d.rectangle((hx - 12, hy - 4, hx + 12, hy + 14), shade("orange", rng))
        d.polygon([(hx - 15, hy - 4), (hx + 15, hy - 4), (hx, hy - 17)], shade("red", rng))
        d.rectangle((tx - 3, ty, tx + 3, ty + 16), (120, 80, 40))
        d.ellipse((tx - 13, ty - 16, tx + 13, ty + 7), shade("green", rng))

    return Item("map", SOCIAL, "In which direction from the house is the tree?", pick(rng, direction, DIRECTIONS, 4),
                "On a map north is up.", f"The tree is {direction} of the house.",
                caption=f"a map, the tree is {direction} of the house", draw=draw)


def particles(rng):
    states = {"solid": "in rows", "liquid": "close and loose", "gas": "far apart"}
    state = rng.choice(list(states))

    def draw(d, rng):
        d.rectangle((14, 14, 114, 114), "white", DARK, 3)
        grid = [(26 + 15.2 * (i % 6), 102 - 15.2 * (i // 6)) for i in range(36)]
        jitter = {"solid": 0.5, "liquid": 5, "gas": 5}[state]
        if state == "gas":
            grid = rng.sample([p for i, p in enumerate(grid) if (i + i // 6) % 2], 8)
        for x, y in grid if state != "liquid" else grid[:20]:
            blob(d, "circle", x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter) * (y < 100), 6,
                 shade("purple", rng))

    return Item("particles", NATURAL, "Which state of matter is this?", pick(rng, state, states, 3),
                "Particles are in rows in a solid, close and loose in a liquid, far apart in a gas.",
                f"The particles are {states[state]}, so this is a {state}.",
                caption=f"particles that are {states[state]}", draw=draw)


def food_chain(rng):
    prey, hunters = ("snail", "mouse", "bee"), ("fox", "bird", "snake")
    eaten, eater = rng.choice(prey), rng.choice(hunters)

    def draw(d, rng):
        y = 64 + rng.uniform(-8, 8)
        for x in (12, 19, 26):
            d.line((x, y + 14, x + rng.uniform(-4, 4), y - 14), shade("green", rng), 4)
        for x in (34, 80):
            d.line((x, y, x + 9, y), DARK, 2)
            d.polygon([(x + 8, y - 4), (x + 8, y + 4), (x + 13, y)], DARK)
        icon(d, eaten, 62 + rng.uniform(-2, 2), y + rng.uniform(-3, 3))
        icon(d, eater, 110 + rng.uniform(-2, 2), y + rng.uniform(-3, 3))

    question, right, others = rng.choice([(f"What does the {eater} eat?", eaten, prey),
                                          (f"What eats the {eaten}?", eater, hunters)])
    return Item("food chain", NATURAL, question, pick(rng, right, others, 3),
                "In a food chain each one eats the one before.",
                f"The {eaten} eats the grass and the {eater} eats the {eaten}.",
                caption=f"a food chain, grass, {eaten}, {eater}", draw=draw)


def icon(d, animal, x, y):
    """A small animal, looking left."""
    if animal == "snail":
        d.ellipse((x - 14, y + 4, x + 14, y + 12), (200, 170, 120))
        d.ellipse((x - 6, y - 12, x + 14, y + 8), (130, 80, 40))
    elif animal == "mouse":
        d.ellipse((x - 14, y - 7, x + 12, y + 9), (140, 140, 150))
        d.ellipse((x - 12, y - 13, x - 4, y - 4), (240, 170, 190))
    elif animal == "bee":
        d.ellipse((x - 13, y - 7, x + 13, y + 9), (240, 200, 30))
        for stripe in (-5, 4):
            d.rectangle((x + stripe, y - 6, x + stripe + 4, y + 8), "black")
    elif animal == "fox":
        d.polygon([(x - 14, y - 14), (x + 14, y - 14), (x, y + 14)], (235, 110, 20))
        d.polygon([(x - 5, y + 2), (x + 5, y + 2), (x, y + 13)], "white")
    elif animal == "bird":
        d.ellipse((x - 12, y - 8, x + 12, y + 10), (60, 110, 230))
        d.polygon([(x - 10, y - 4), (x - 10, y + 4), (x - 18, y)], (240, 180, 30))
    else:
        d.line([(x - 14, y + 8), (x - 7, y - 8), (x, y + 8), (x + 7, y - 8), (x + 14, y + 8)], (30, 130, 60), 6)


def flag(rng):
    top, bottom = rng.sample(list(COLOURS), 2)

    def draw(d, rng):
        x, y, h = rng.uniform(18, 26), rng.uniform(24, 34), rng.uniform(56, 64)
        d.line((x - 2, y - 8, x - 2, 124), DARK, 4)
        d.rectangle((x, y, x + 84, y + h / 2), shade(top, rng))
        d.rectangle((x, y + h / 2, x + 84, y + h), shade(bottom, rng))

    others = rng.sample([colour for colour in COLOURS if colour not in (top, bottom)], 2)
    return Item("flag", SOCIAL, "Which colour is the top stripe?", [top, bottom, *others],
                "Flags stand for lands.", f"The top stripe is {top} and the bottom stripe is {bottom}.",
                caption=f"a flag, top {top}, bottom {bottom}", draw=draw)


def traffic_light(rng):
    duties = {"red": "stop", "yellow": "wait", "green": "go"}
    lit = rng.choice(list(duties))

    def draw(d, rng):
        x, y = rng.uniform(56, 72), rng.uniform(-4, 4)
        d.rounded_rectangle((x - 22, 8 + y, x + 22, 120 + y), 8, (50, 50, 50))
        for i, colour in enumerate(duties):
            blob(d, "circle", x, 28 + 36 * i + y, 14, shade(colour, rng) if colour == lit else (95, 95, 95))

    return Item("traffic light", SOCIAL, "What should a driver do?", pick(rng, duties[lit], duties.values(), 3),
                "Red means stop, yellow means wait and green means go.",
                f"The light is {lit}, so a driver should {duties[lit]}.",
                caption=f"a traffic light that is {lit}", draw=draw)


# Questions in words alone


OPPOSITES = [pair.split() for pair in (
    "hot cold,big small,fast slow,light dark,hard soft,wet dry,old young,full empty,loud quiet,near far,rich poor,"
    "happy sad").split(",")]
PAST = [pair.split() for pair in (
    "run ran,see saw,go went,eat ate,give gave,take took,sing sang,swim swam,write wrote,fly flew,fall fell,"
    "buy bought").split(",")]
KINDS = {"fish": "trout salmon shark eel".split(), "insect": "ant beetle moth wasp".split(),
         "mammal": "horse whale bat dog".split(), "reptile": "lizard turtle crocodile viper".split()}
CAPITALS = [pair.split() for pair in (
    "Norland Tarn,Estia Velo,Morva Kess,Galdor Prim,Ulmia Dace,Sorrel Bant,Fenwick Lorn,Quill Osten").split(",")]
NAMES = "Mia Leo Zoe Max Ana Tom".split()
GOODS = "corn wool fish salt wood milk".split()
OBJECTS = "spoon cup box hat chair ring".split()
MATERIALS = "glass metal paper clay cloth stone".split()


def opposites(rng):
    word, right = rng.sample(rng.choice(OPPOSITES), 2)
    others = [w for pair in OPPOSITES for w in pair if w != word]
    return Item("opposites", LANGUAGE, f"What is the opposite of {word}?", pick(rng, right, others, 3),
                "Opposites are words that differ most.", f"The opposite of {word} is {right}.")


def past_tense(rng):
    word, right = rng.choice(PAST)
    return Item("past tense", LANGUAGE, f"What is the past tense of {word}?", pick(rng, right, [p for _, p in PAST], 3),
                "The past tense tells what has been.", f"The past tense of {word} is {right}.")


def kinds(rng):
    right = rng.choice(list(KINDS))
    animal = rng.choice(KINDS[right])
    return Item("kinds of animals", NATURAL, f"What kind of animal is a {animal}?", pick(rng, right, KINDS, 4),
                "Animals are of many kinds.", f"The {animal} is a kind of {right}.")


def capitals(rng):
    land, right = rng.choice(CAPITALS)
    return Item("capitals", SOCIAL, f"What is the capital of {land}?", pick(rng, right, [c for _, c in CAPITALS], 4),
                "Every land has one capital.", f"The capital of {land} is {right}.")


def goods(rng):
    name, (has, wants, *others) = rng.choice(NAMES), rng.sample(GOODS, 4)
    return Item("goods", SOCIAL, f"What does {name} want?", [wants, has, *others],
                "People trade what they have for what they want.", f"{name} wants {wants}.",
                f"{name} has {has} and wants {wants}.")


def owners(rng):
    giver, taker, other = rng.sample(NAMES, 3)
    thing = rng.choice(OBJECTS)
    return Item("reading", LANGUAGE, f"Who has the {thing} now?", [taker, giver, other],
                "Read the text with care.", f"{taker} has the {thing} now.", f"{giver} gave the {thing} to {taker}.")


def materials(rng):
    thing, (right, wrong, other) = rng.choice(OBJECTS), rng.sample(MATERIALS, 3)
    return Item("materials", NATURAL, f"What is the {thing} made of?", [right, wrong, other],
                "Things are made of materials.", f"The {thing} is made of {right}.",
                f"The {thing} is made of {right}, not of {wrong}.")


def described(rng):
    """A scene as the pictures show it, told in the hint."""
    item = seen(rng)
    return Item("described scenes", NATURAL, item.question, item.choices, item.lecture, item.solution,
                f"The picture shows {item.caption}.")


PICTURE_SKILLS = (things, things, things, things, magnets, bars, thermometer, jars, compass, treasure_map, particles,
                  food_chain, flag, traffic_light)         # `things` are four skills in one
TEXT_SKILLS = (opposites, opposites, past_tense, past_tense, kinds, capitals, goods, owners, materials, described)


def seen(rng, new=False):
    """A picture question. new: `things` show the combinations that are kept for the test split."""
    skill = rng.choice(PICTURE_SKILLS)
    return things(rng, new) if skill is things else skill(rng)


# The files of the world


def problem(item, rng, split):
    """An Item as ScienceQA writes it: {field: value}."""
    choices = rng.sample(item.choices, len(item.choices))
    hint = item.hint or ("Look at the picture." if item.draw and rng.random() < 0.5 else "")
    return {"question": item.question, "choices": choices, "answer": choices.index(item.choices[0]), "hint": hint,
            "image": "image.png" if item.draw else None, "task": "closed choice",
            "grade": f"grade{rng.randrange(1, 13)}", "subject": item.subject, "topic": item.skill,
            "category": item.skill, "skill": item.skill,
            "lecture": item.lecture, "solution": item.solution, "split": split}


def render(item, rng):
    """The picture of an Item's scene, SIDE × SIDE pixels."""
    light = rng.randrange(236, 256)
    picture = Image.new("RGB", (SIDE, SIDE), (light, light, light))
    item.draw(ImageDraw.Draw(picture), rng)
    return picture


def write_world(root, seed=0, sizes=None):
    """ScienceQA's layout under `root`: problems.json, pid_splits.json, captions.json, images/{split}/{id}/image.png."""
    problems, captions, splits = {}, {}, {}
    for split, size in zip(("train", "val", "test"), sizes or SIZES):
        rng, splits[split] = random.Random(f"{seed} {split}"), []
        for i in tqdm(range(size), desc=f"drawing {split}", unit=" problems", file=sys.stdout):
            item = rng.choice(TEXT_SKILLS)(rng) if i % 2 else seen(rng, new=split == "test" and rng.random() < 0.3)
            pid = str(len(problems) + 1)
            problems[pid] = problem(item, rng, split)
            splits[split].append(pid)
            if item.draw:
                captions[pid] = item.caption
                folder = root / "images" / split / pid
                folder.mkdir(parents=True)
                render(item, rng).save(folder / "image.png", compress_level=1)
    for name, content in (("problems", problems), ("pid_splits", splits), ("captions", {"captions": captions}),
                          ("world", {"version": VERSION})):
        (root / f"{name}.json").write_text(json.dumps(content, indent=1))


def make_folder(folder, write):
    """write(temporary folder), then rename: the whole folder is there or none of it. Replaces an older one.

    Two that make the same folder at the same time do not meet: each has a temporary folder of its own.
    """
    folder = Path(folder)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, RuntimeError) as error:            # torch.save reports a full disk as a RuntimeError
        raise LavinError(f"{folder}: cannot be made ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# LLaMA, pre-trained on text of the world


# To choose a letter is by far the hardest thing to learn here, and everything rests on it; it is taught in stages.
# (until step, share of registers, their links, share of drills among the rest, of TAUGHT among what then remains, of
# the kept pairs among scenes)
LINKS = (" is ", "? The answer is ", ". The answer is ")
CURRICULUM = ((360, 1, (" ",), 0), (560, 1, (" ", *LINKS), 0), (800, 0.3, LINKS, 1), (1400, 0.1, LINKS, 0.4),
              (math.inf, 0.03, LINKS, 1 / 7, 0.2, 1 / 6))
TAUGHT = (opposites, past_tense, kinds, kinds)          # whose facts are many
LLAMA_STEPS, CLIP_STEPS = 5000, 1600
WORDS = [*COLOURS, *SHAPES, *COUNTS, *PLACES, *DIRECTIONS, *NAMES, *GOODS, *OBJECTS, *MATERIALS, *KINDS,
         *[word for pair in OPPOSITES + PAST for word in pair], *[capital for _, capital in CAPITALS]]


def register(rng, links):
    """Options, and then ten times a word and its letter: the densest form of what every choice of a letter rests on."""
    words, link = rng.sample(WORDS, rng.randrange(2, 5)), rng.choice(links)
    options = " ".join(f"({letter}) {word}" for letter, word in zip(data.LETTERS, words))
    asked = [rng.randrange(len(words)) for _ in range(10)]
    return data.Sample(f"Options: {options}\nResponse:", " ".join(f"{words[i]}{link}{data.LETTERS[i]}." for i in asked))


def drill(rng):
    """The same as a question: find a word among options."""
    words = rng.sample(WORDS, rng.randrange(2, 5))
    return Item("drill", LANGUAGE, f"Which option says {words[0]}?", words, "", f"The option says {words[0]}.")


def document(rng, registers, links, drills, taught=0, new=0):
    """A text of the world -> (words in the picture's place or None, Sample).

    A scene is described, never shown, by remarks in any order: a picture has none.
    """
    if rng.random() < registers:
        return None, register(rng, links)
    if rng.random() < drills:
        item = drill(rng)
    elif taught and rng.random() < taught:
        item = rng.choice(TAUGHT)(rng)
    else:
        item = seen(rng, new and rng.random() < new) if rng.random() < 0.6 else rng.choice(TEXT_SKILLS)(rng)
    form = rng.choices(["QCM-ALE", "QCM-A", "QCM-EA", "Instruction"], [8, 3, 2, 2])[0]
    words = ", ".join(rng.sample(item.caption.split(", "), item.caption.count(", ") + 1)) or None
    if form == "Instruction":
        return words, data.Sample(f"Instruction: {item.question}\nResponse:", item.solution)
    written = problem(item, rng, "corpus") | ({} if form == "QCM-ALE" else {"lecture": ""})
    return words, data.Sample(*data.sqa_prompt(written, form))


def encode(words, sample, tokenizer):
    """-> (tokens, labels, slice of the description), spliced as data.encode does, a description where a picture goes."""
    tokens, labels = data.tokenize(sample, tokenizer, 512)
    prefix = tokenizer.encode("Image: N/A")
    if words is not None:
        prefix = data.picture_prefix(tokenizer) + tokenizer.encode(words)
    start = 1 + len(data.picture_prefix(tokenizer))
    return (tokens[:1] + prefix + tokens[1:], labels[:1] + [0] * len(prefix) + labels[1:],
            slice(start, 1 + len(prefix) if words else start))


def blur(words, rng):
    """Blur this description? Its words' vectors are then replaced by their mean: to read what was said from all of
    them at once, as from the few features of a picture, where it does not matter what was said of which."""
    return words is not None and "tall " not in words and "top " not in words and rng.random() < 0.5


def train_tokenizer(seed):
    """sentencepiece's model file, in bytes. LLaMA's settings: BPE, bytes for what is unknown, digits split."""
    rng = random.Random(f"{seed} tokenizer")
    documents = [document(rng, 0.1, LINKS, 0.3) for _ in range(TOKENIZER_DOCUMENTS)]
    lines = [line for words, s in documents for line in (f"Image: {words or 'N/A'}", s.prompt + s.answer)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=1024, byte_fallback=True,
        split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        allow_whitespace_only_pieces=True, minloglevel=2,
        user_defined_symbols=[f"▁({letter})" for letter in data.LETTERS])       # a letter right in front of its option
    return model.getvalue()


def initialise(module):
    """Random weights for a model that is to be pre-trained; its adapters, the identity, are left out of it."""
    for name, p in module.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            nn.init.constant_(p, float(name.endswith("weight")))        # norms are 1, biases 0
    for child in module.modules():
        if isinstance(child, Adapter):
            child.reset_parameters()
            child.requires_grad_(False)


def base(module):
    """{name: fp16 tensor} of what has been pre-trained."""
    return {name: p.detach().half() for name, p in module.named_parameters() if p.requires_grad}


def make_optimizer(module, beta):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], betas=(0.9, beta), weight_decay=0.1)


def update(module, optimizer, loss, done, lr):
    """One step, `done` of the way: the rate rises over a twentieth of the steps, then half a cosine to a twentieth."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(done * 20, 0.05 + 0.475 * (1 + math.cos(math.pi * done)))
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def letter_loss(llama, rows, tokenizer):
    """Weighted cross-entropy of documents: 0.1 for what is asked, 1 for what is answered, 8 for letters in it.

    rows: (tokens, labels, slice to be blurred) -> (loss, which letters come out right, a bool for each).
    """
    longest = max(len(tokens) for tokens, *_ in rows)
    x, y = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for i, (tokens, labels, _) in enumerate(rows):
        x[i, :len(tokens)], y[i, :len(labels)] = torch.tensor(tokens), torch.tensor(labels)
    embedded = llama.tok_embeddings(x[:, :-1])
    for i, (_, _, blurred) in enumerate(rows):
        if blurred.stop > blurred.start:
            embedded[i, blurred] = embedded[i, blurred].mean(0)
    logits = llama.output(llama(embedded, halves(llama, len(rows))))
    x, y = x[:, 1:], y[:, 1:]
    letters = torch.isin(y, torch.tensor(tokenizer.encode("A B C D")))
    weight = 0.1 * (x != 0) + 0.9 * (y != 0) + 7 * letters
    loss = F.cross_entropy(logits.flatten(0, 1), x.flatten(), reduction="none") @ weight.flatten() / weight.sum()
    return loss, (logits.argmax(-1) == x)[letters]


@torch.no_grad()
def letter_scores(llama, tokenizer, n):
    """{skill: percent of new questions for which the right letter is likeliest}; scenes are described."""
    rng, scores = random.Random("letter scores"), {}
    for _ in range(n * (len(PICTURE_SKILLS) + len(TEXT_SKILLS))):
        item = rng.choice(PICTURE_SKILLS + TEXT_SKILLS)
        item = things(rng, False) if item is things else item(rng)
        sample = data.Sample(*data.sqa_prompt(problem(item, rng, "corpus"), "QCM-A"))
        scores.setdefault(item.skill, []).append((*encode(item.caption or None, sample, tokenizer)[:2], slice(0, 0)))
    return {skill: round(100 * letter_loss(llama, rows, tokenizer)[1].float().mean().item(), 1)
            for skill, rows in sorted(scores.items())}


def halves(llama, n):
    """Routing weights for adapters that do nothing."""
    return torch.full((len(llama.layers), n, 1, 2), 0.5)


def pretrain_llama(folder, steps, seed=0, batch_size=32, lr=1e-3, n_scored=100):
    torch.manual_seed(seed)
    rng, blur_rng = random.Random(f"{seed} corpus"), random.Random(f"{seed} blur")
    (folder / "tokenizer.model").write_bytes(train_tokenizer(seed))
    tokenizer = data.load_tokenizer(folder)
    params = {"dim": 128, "n_layers": 5, "n_heads": 4, "multiple_of": 32, "norm_eps": 1e-5, "vocab_size": -1}
    llama = LLaMA(LLaMAConfig(**params | {"vocab_size": tokenizer.vocab_size()}), AdapterConfig())
    llama.tok_embeddings.weight.requires_grad_(True)
    initialise(llama)
    # What all embeddings have in common lets attention go by place alone, and equal wq and wk by sameness: the two
    # parts of finding a word again and what stands beside it. Without these, no step of 600 found it.
    nn.init.normal_(llama.tok_embeddings.weight, mean=0.5, std=0.5)
    for layer in llama.layers:
        layer.attention.wk.weight.data.copy_(layer.attention.wq.weight)
    optimizer = make_optimizer(llama, beta=0.95)
    right, batches, bar = 0.0, [], tqdm(range(steps), desc="LLaMA", file=sys.stdout)
    for step in bar:
        if not batches:             # four at a time, cut by length: less padding
            stage = next(stage for until, *stage in CURRICULUM if step < until)
            rows = []
            for _ in range(4 * batch_size):
                words, sample = document(rng, *stage)
                tokens, labels, described = encode(words, sample, tokenizer)
                rows.append((tokens, labels, described if blur(words, blur_rng) else slice(0, 0)))
            rows.sort(key=lambda row: len(row[0]))
            batches = rng.sample([rows[i:i + batch_size] for i in range(0, len(rows), batch_size)], 4)
        loss, found = letter_loss(llama, batches.pop(), tokenizer)
        update(llama, optimizer, loss, step / steps, lr)
        right += 0.02 * (found.float().mean().item() - right)
        bar.set_postfix_str(f"loss {loss.item():.3f} letters {100 * right:.1f} %", refresh=False)
    torch.save(base(llama), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params | {"version": VERSION}))
    return letter_scores(llama, tokenizer, n_scored)


# CLIP, pre-trained on pictures of the world


CLIP_CONFIG = clip.ViTConfig(width=128, layers=12, patch=16, resolution=64)


class Towers(nn.Module):
    """CLIP: the image encoder with its way into the common space, and a small LLaMA that reads captions."""

    def __init__(self, vit, vocab_size, common=64):
        super().__init__()
        self.visual = clip.VisionTransformer(vit, AdapterConfig())
        self.ln_post = clip.LayerNorm(vit.width)
        self.proj = nn.Parameter(torch.empty(vit.width, common))
        reader = LLaMAConfig(common, n_layers=2, n_heads=2, vocab_size=vocab_size, multiple_of=32)
        self.text = LLaMA(reader, AdapterConfig())
        self.text.tok_embeddings.weight.requires_grad_(True)
        self.text.output.requires_grad_(False)          # makes words of what it reads: not asked here
        initialise(self)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels, captions, lengths):
        """pixels (N, 3, R, R), captions (M, T) of `lengths` tokens (M,) -> how well they go together, (F, N, M): one
        answer for each of the features that LaVIN will take, where CLIP asks for the last alone."""
        images = F.normalize(self.ln_post(self.visual(pixels).transpose(0, 1)) @ self.proj, dim=-1)     # (F, N, common)
        x = self.text(self.text.tok_embeddings(captions), halves(self.text, len(captions)))
        texts = F.normalize(x[torch.arange(len(x)), lengths - 1], dim=-1)
        return images @ texts.T * self.log_scale.exp().clamp(max=100)


def album(n, rng, resolution, new=False):
    """n rendered scenes -> {skill: [(pixels, caption)]}, pixels (3, R, R) in bytes."""
    scenes = {}
    for _ in tqdm(range(n), desc="drawing", unit=" pictures", file=sys.stdout):
        item = seen(rng, new)
        picture = render(item, rng).resize((resolution, resolution), Image.Resampling.BICUBIC)
        skill = "things" if " thing" in item.caption else item.skill
        scenes.setdefault(skill, []).append((np.asarray(picture), item.caption))
    return scenes


def pairs(chosen, tokenizer):
    """[(pixels, caption)] -> normalised pixels (N, 3, R, R), the M captions that differ as tokens (M, T), their
    lengths (M,), and which of them each picture has (N,)."""
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in chosen])).permute(0, 3, 1, 2).float() / 255
    captions = sorted({caption for _, caption in chosen})
    tokens = [torch.tensor(tokenizer.encode(caption)) for caption in captions]
    return ((pixels - data.IMAGENET_MEAN) / data.IMAGENET_STD, nn.utils.rnn.pad_sequence(tokens, batch_first=True),
            torch.tensor([len(t) for t in tokens]), torch.tensor([captions.index(caption) for _, caption in chosen]))


def contrast(scores, match):
    """CLIP's loss for scores (F, N, M): picture i has the caption match[i]; a caption, all pictures that have it."""
    positives = F.one_hot(match, scores.shape[-1]).float()              # (N, M)
    of_pictures = -(scores.log_softmax(2) * positives).sum(2).mean()
    of_captions = -(scores.log_softmax(1) * positives / positives.sum(0)).sum(1).mean()
    return (of_pictures + of_captions) / 2


def pretrain_clip(path, steps, seed=0, batch_size=96, lr=1e-3, n_pictures=24_000, n_scored=2000):
    torch.manual_seed(seed)
    rng = random.Random(f"{seed} album")
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=train_tokenizer(seed))
    towers = Towers(CLIP_CONFIG, tokenizer.vocab_size())
    scenes = album(n_pictures, rng, CLIP_CONFIG.resolution)
    optimizer = make_optimizer(towers, beta=0.98)
    right = 0.0
    bar = tqdm(range(steps), desc="CLIP", file=sys.stdout)
    for step in bar:
        skills = rng.sample(sorted(scenes), 2) + ["things"]             # scenes of a kind are hard to tell apart
        chosen = [scene for skill in skills for scene in rng.sample(scenes[skill], batch_size // 3)]
        *inputs, match = pairs(chosen, tokenizer)
        scores = towers(*inputs)
        loss = contrast(scores, match)
        update(towers, optimizer, loss, step / steps, lr)
        right += 0.02 * ((scores[-1].argmax(1) == match).float().mean().item() - right)
        bar.set_postfix_str(f"loss {loss.item():.3f} captions {100 * right:.1f} %", refresh=False)
    named = {"visual." + name.removeprefix("visual.").replace("resblocks.", "transformer.resblocks."): tensor
             for name, tensor in base(towers).items() if name.startswith(("visual.", "ln_post.", "proj"))}
    write_atomically(path, lambda temporary: torch.save(named, temporary))
    return {"new combinations" if new else skill: score for new in (False, True)
            for skill, score in caption_scores(towers, tokenizer, new, n_scored).items()
            if not new or skill == "things"}


@torch.no_grad()
def caption_scores(towers, tokenizer, new, n):
    """{skill: percent of new pictures whose own caption is likeliest among all of that skill's}."""
    scenes, scores = album(n, random.Random(f"caption scores {new}"), CLIP_CONFIG.resolution, new), {}
    for skill in sorted(scenes):
        *inputs, match = pairs(scenes[skill], tokenizer)
        scores[skill] = round(100 * (towers(*inputs)[-1].argmax(1) == match).float().mean().item(), 1)
    return scores


# The default of both scripts


def is_meant(args, remembered={}):
    """Take the embedded default? Where no model is named or remembered, and nothing lies where real ones would."""
    named = any(getattr(args, name) or remembered.get(name) for name in ("llama", "vit"))
    return not named and not any(os.path.exists(path) for path in files.DEFAULTS.values())


def prepare(args, remembered={}):
    """Set the paths in args to the embedded default's where that is meant; make its data, check its version."""
    if is_meant(args, remembered):
        print(f"embedded default: none of {', '.join(files.DEFAULTS.values())} is here")
        for name in PATHS:
            setattr(args, name, getattr(args, name) or remembered.get(name) or os.path.relpath(PATHS[name]))
    taken = {name for name, path in PATHS.items()
             if os.path.abspath(getattr(args, name) or remembered.get(name) or "") == str(path)}
    if "data_root" in taken and files.asks_sqa(args) and not PATHS["data_root"].exists():
        print(f"making {os.path.relpath(PATHS['data_root'])}, once")
        make_folder(PATHS["data_root"], write_world)
    for name, path, remedy in (("data_root", PATHS["data_root"] / "world.json", "python tiny.py makes it anew"),
                               ("llama", PATHS["llama"] / "params.json", "python tiny.py --pretrain makes it anew")):
        made = name in taken and path.parent.exists()
        if made and not (path.exists() and read_json(path).get("version") == VERSION):
            raise LavinError(f"{path.parent}: made by another version of tiny.py than this, {VERSION}; {remedy}")


def sheet(predictions, path, n=8):
    """Draw n test problems with what the model wrote about them, one for each of n picture skills."""
    problems = read_json(PATHS["data_root"] / "problems.json")
    outputs, chosen = read_json(predictions)["outputs"], {}
    for pid in outputs:
        if problems[pid]["image"]:
            chosen.setdefault(problems[pid]["skill"], pid)
    size, font, small = 150, ImageFont.load_default(15), ImageFont.load_default(13)
    pids = list(chosen.values())[:n]
    picture = Image.new("RGB", (2 * 560, (size + 20) * -(-len(pids) // 2)), "white")
    d = ImageDraw.Draw(picture)
    for i, pid in enumerate(pids):
        p, (x, y) = problems[pid], (560 * (i % 2) + 10, (size + 20) * (i // 2) + 10)
        image = Image.open(PATHS["data_root"] / "images" / p["split"] / pid / "image.png")
        picture.paste(image.resize((size, size), Image.Resampling.BICUBIC), (x, y))
        right = data.sqa_answer(outputs[pid]) == p["answer"]
        options = "  ".join(f"({letter}) {choice}" for letter, choice in zip(data.LETTERS, p["choices"]))
        d.text((x + size + 15, y), textwrap.fill(p["question"], 48), "black", font)
        d.text((x + size + 15, y + 42), textwrap.fill(options, 52), "#606060", small)
        d.text((x + size + 15, y + 84), textwrap.fill(outputs[pid], 56), "#107030" if right else "#b02020", small)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    print(f"written: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pretrain", nargs="*", choices=["llama", "clip"],
                        help="make the base models, or one of them, instead of the data")
    parser.add_argument("--sheet", nargs=2, metavar=("PREDICTIONS", "PNG"),
                        help="draw a few test problems with the answers that generate.py --predictions wrote")
    args = parser.parse_args()
    if args.sheet:
        sheet(*args.sheet)
    elif args.pretrain is None:
        make_folder(PATHS["data_root"], write_world)
    else:
        scores = {}
        if "llama" in args.pretrain or not args.pretrain:
            make_folder(PATHS["llama"], lambda folder: scores.update(llama=pretrain_llama(folder, LLAMA_STEPS)))
        if "clip" in args.pretrain or not args.pretrain:
            scores["clip"] = pretrain_clip(PATHS["vit"], CLIP_STEPS)
        path = ROOT / "scores.json"
        text = json.dumps((read_json(path) if path.exists() else {}) | scores, indent=1)
        write_atomically(path, lambda temporary: temporary.write_text(text))
        print(text)


if __name__ == "__main__":
    run(main)
