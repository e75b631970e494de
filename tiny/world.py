"""The small world: pictures and questions, made here, in ScienceQA's layout.

    python -m tiny.world                    make tiny/scienceqa, as the first training run does
    python -m tiny.world --sheet PREDICTIONS PNG
                                            draw some test problems with generate.py's answers

A skill is a function that takes a random generator and returns an Item: a question, its choices
and, for a picture question, how its scene is drawn. The scene's caption says in words all that the
picture shows. LLaMA reads captions in its pre-training (tiny/pretrain.py) and never sees a picture.
CLIP sees the pictures. That LLaMA learns to see through CLIP is LaVIN's work.

Everything is a function of the seed. The order in which the functions draw from their generator
is therefore part of the world: raise VERSION with any change to it.
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

VERSION = 1
ROOT = Path(__file__).absolute().parent
PATHS = {
    "llama": ROOT / "llama",
    "vit": ROOT / "ViT-tiny.pt",
    "data_root": ROOT / "scienceqa",
}
# train.py's flags for models of this size and a run of three minutes. No workers: to prepare a
# picture of this size takes less time than to send it from one process to another.
DEFAULTS = {
    "epochs": 3,
    "lr": 6e-3,
    "dropout": 0.0,
    "micro_batch": 32,
    "max_seq_len": 128,
    "workers": 0,
}
SPLITS = ("train", "val", "test")
SIZES = (6000, 300, 600)        # problems of each split
PICTURE_SIDE = 128              # pixels; CLIP sees a picture at 64

NATURAL = "natural science"
SOCIAL = "social science"
LANGUAGE = "language science"


@dataclass
class Item:
    """One question and, if it is about a picture, the scene to draw."""
    skill: str
    subject: str
    question: str
    choices: list[str]              # the right one first
    lecture: str
    solution: str
    hint: str = ""
    caption: str = ""               # the scene in words, "" without a picture
    draw: Callable | None = None    # draw(canvas, rng, *scene) paints it, a little differently
    scene: tuple = ()               # each time


def add_distractors(rng: Random, right: str, candidates: Iterable[str], n: int) -> list[str]:
    """n choices: the right one first, then wrong ones drawn from the candidates."""
    wrong = [candidate for candidate in candidates if candidate != right]
    return [right, *rng.sample(wrong, n - 1)]


# Colours and shapes. All coordinates are pixels, with y pointing down.

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (145, 60, 175),
    "orange": (240, 140, 30),
}
DARK = (60, 60, 60)
SHAPES = ("circle", "square", "triangle", "star", "cross")


def shade(colour: str, rng: Random) -> tuple[int, ...]:
    """A colour of the palette, a little off, as (red, green, blue)."""
    channels = []
    for channel in COLOURS[colour]:
        shifted = round(channel + rng.uniform(-15, 15))
        channels.append(min(255, max(0, shifted)))
    return tuple(channels)


def draw_shape(canvas, shape, x, y, r, fill):
    """One of SHAPES, centred at (x, y), r pixels from its centre to its edge."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill)
    elif shape == "cross":
        canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill)
        canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill)
    elif shape == "triangle":
        canvas.polygon(corners(x, y, [1.15 * r] * 3), fill)
    else:
        canvas.polygon(corners(x, y, [1.15 * r, 0.45 * r] * 5), fill)


def corners(x, y, distances):
    """Points at these distances from (x, y), at equal angles, clockwise from the top."""
    points = []
    for i, distance in enumerate(distances):
        angle = 2 * math.pi * i / len(distances)
        points.append((x + distance * math.sin(angle), y - distance * math.cos(angle)))
    return points


# The skills that need a picture


COUNTS = ("one", "two", "three", "four")
POSITIONS = {"top": (0, -30), "bottom": (0, 30), "left": (-30, 0), "right": (30, 0)}


def is_new(shape: str, colour: str) -> bool:
    """Is this pair kept for the test split? LLaMA reads about it, but no other picture shows it."""
    return list(COLOURS).index(colour) == SHAPES.index(shape)


def shape_colour_pairs(new):
    """The pairs that are kept for the test split, or all others."""
    pairs = []
    for shape in SHAPES:
        for colour in COLOURS:
            if is_new(shape, colour) == new:
                pairs.append((shape, colour))
    return pairs


def things(rng: Random, new: bool) -> Item:
    """Equal shapes in a row, and one of four skills: their number, colour, shape or position."""
    shape, colour = rng.choice(shape_colour_pairs(new))
    n = rng.randrange(1, 5)
    position = rng.choice(list(POSITIONS))
    count = COUNTS[n - 1]
    skill, question, right, candidates = rng.choice([
        ("count", "How many things are there?", count, COUNTS),
        ("colour", "Which colour is there?", colour, COLOURS),
        ("shape", "Which shape is there?", shape, SHAPES),
        ("place", "Where are the things?", position, POSITIONS),
    ])
    if new:
        skill += " (new combinations)"
    verb = "is" if n == 1 else "are"
    plural = "" if n == 1 else "s"
    return Item(
        skill, NATURAL, question, add_distractors(rng, right, candidates, 4),
        lecture="Things have a shape, a colour and a place.",
        solution=f"There {verb} {count} {colour} {shape}{plural} at the {position}.",
        caption=f"{count} thing{plural}, {colour}, {shape}, {position}",
        draw=draw_things, scene=(shape, colour, n, position))


def draw_things(canvas, rng, shape, colour, n, position):
    dx, dy = POSITIONS[position]
    r = rng.uniform(11, 13.5)
    gap = rng.uniform(28, 31)
    for i in range(n):
        along = (i - (n - 1) / 2) * gap
        if position in ("left", "right"):       # a column at a side, else a row
            x = 64 + dx
            y = 64 + along
        else:
            x = 64 + along
            y = 64 + dy
        x += rng.uniform(-3, 3)
        y += rng.uniform(-3, 3)
        draw_shape(canvas, shape, x, y, r, shade(colour, rng))


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
        draw=draw_magnets, scene=(left, right))


def draw_magnets(canvas, rng, left, right):
    """Two bar magnets whose poles `left` and `right` face each other."""
    y = rng.uniform(54, 74)
    h = rng.uniform(10, 20)
    w = rng.uniform(20, 26)
    gap = rng.uniform(3, 9)
    for side, pole in ((-1, left), (1, right)):
        near = 64 + side * gap
        middle = 64 + side * (gap + w)
        far = 64 + side * (gap + w * 2)
        draw_pole(canvas, rng, pole, near, middle, y, h)
        draw_pole(canvas, rng, "south" if pole == "north" else "north", middle, far, y, h)


def draw_pole(canvas, rng, pole, x1, x2, y, h):
    """Half a magnet: north is red, south is blue."""
    fill = shade("red" if pole == "north" else "blue", rng)
    canvas.rectangle((min(x1, x2), y - h, max(x1, x2), y + h), fill)


def bars(rng: Random) -> Item:
    order = rng.sample(["red", "green", "blue", "yellow"], 3)       # from tall to short
    columns = rng.sample(range(3), 3)
    tall, middle, short = order
    return Item(
        "bars", SOCIAL, "Which bar is the tallest?", add_distractors(rng, tall, order, 3),
        lecture="Bars show numbers.",
        solution=f"The {tall} bar is the tallest and the {short} bar is the shortest.",
        caption=f"a bar chart, tall {tall}, middle {middle}, short {short}",
        draw=draw_bars, scene=(order, columns))


def draw_bars(canvas, rng, order, columns):
    canvas.line((12, 112, 116, 112), DARK, 3)
    for colour, column, height in zip(order, columns, (88, 54, 22)):
        x = 31 + 33 * column
        top = 110 - height - rng.uniform(-7, 7)
        canvas.rectangle((x - 11, top, x + 11, 110), shade(colour, rng))


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
        draw=draw_thermometer, scene=(level,))


def draw_thermometer(canvas, rng, level):
    x = rng.uniform(54, 74)
    y = rng.uniform(-3, 3)
    canvas.rounded_rectangle((x - 9, 8 + y, x + 9, 106 + y), 8, "white", DARK, 2)
    canvas.ellipse((x - 15, 96 + y, x + 15, 122 + y), shade("red", rng))
    top = 96 - 16 * level + y + rng.uniform(-2, 2)
    canvas.rectangle((x - 5, top, x + 5, 104 + y), shade("red", rng))
    for i in range(1, 6):
        mark = 96 - 16 * i + y
        canvas.line((x + 12, mark, x + 20, mark), DARK, 2)


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
        draw=draw_jars, scene=levels[right])


def draw_jars(canvas, rng, left, right):
    """Two jars filled to these heights."""
    for x, level in ((36, left), (92, right)):
        canvas.rectangle((x - 17, 108 - level, x + 17, 108), shade("blue", rng))
        canvas.line([(x - 19, 30), (x - 19, 110), (x + 19, 110), (x + 19, 30)], DARK, 3)


DIRECTIONS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}


def compass(rng: Random) -> Item:
    direction = rng.choice(list(DIRECTIONS))
    return Item(
        "compass", SOCIAL, "In which direction does the needle point?",
        add_distractors(rng, direction, DIRECTIONS, 4),
        lecture="North is up, south is down, east is right and west is left.",
        solution=f"The needle points {direction}.",
        caption=f"a compass, the needle points {direction}",
        draw=draw_compass, scene=(direction,))


def draw_compass(canvas, rng, direction):
    x = rng.uniform(60, 68)
    y = rng.uniform(60, 68)
    angle = rng.uniform(-0.2, 0.2)
    canvas.ellipse((x - 48, y - 48, x + 48, y + 48), "white", DARK, 4)
    east, south = DIRECTIONS[direction]
    dx = east * math.cos(angle) - south * math.sin(angle)
    dy = east * math.sin(angle) + south * math.cos(angle)
    for length, fill in ((40, shade("red", rng)), (-40, (150, 150, 150))):
        tip = (x + length * dx, y + length * dy)
        canvas.polygon([tip, (x - 9 * dy, y + 9 * dx), (x + 9 * dy, y - 9 * dx)], fill)


def treasure_map(rng: Random) -> Item:
    direction = rng.choice(list(DIRECTIONS))
    return Item(
        "map", SOCIAL, "In which direction from the house is the tree?",
        add_distractors(rng, direction, DIRECTIONS, 4),
        lecture="On a map north is up.",
        solution=f"The tree is {direction} of the house.",
        caption=f"a map, the tree is {direction} of the house",
        draw=draw_map, scene=(direction,))


def draw_map(canvas, rng, direction):
    """The house lies on one side of the middle and the tree on the other."""
    east, south = DIRECTIONS[direction]
    dx = east * rng.uniform(30, 36)
    dy = south * rng.uniform(30, 36)
    middle_x = 64 + rng.uniform(-10, 10)
    middle_y = 64 + rng.uniform(-10, 10)
    x = middle_x - dx
    y = middle_y - dy
    canvas.rectangle((x - 12, y - 4, x + 12, y + 14), shade("orange", rng))
    canvas.polygon([(x - 15, y - 4), (x + 15, y - 4), (x, y - 17)], shade("red", rng))
    x = middle_x + dx
    y = middle_y + dy
    canvas.rectangle((x - 3, y, x + 3, y + 16), (120, 80, 40))
    canvas.ellipse((x - 13, y - 16, x + 13, y + 7), shade("green", rng))


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
        draw=draw_particles, scene=(state,))


def draw_particles(canvas, rng, state):
    """A box of 6 × 6 cells. A solid fills all, a liquid the lowest 20, a gas 8 of every other."""
    canvas.rectangle((14, 14, 114, 114), "white", DARK, 3)
    cells = []
    for i in range(36):
        if state != "gas" or (i + i // 6) % 2:
            cells.append((26 + 15.2 * (i % 6), 102 - 15.2 * (i // 6)))
    if state == "gas":
        cells = rng.sample(cells, 8)
    if state == "liquid":
        cells = cells[:20]
    jitter = 0.5 if state == "solid" else 5
    for x, y in cells:
        dx = rng.uniform(-jitter, jitter)
        dy = rng.uniform(-jitter, jitter)
        if y >= 100:            # the lowest row stays on the floor
            dy = 0
        draw_shape(canvas, "circle", x + dx, y + dy, 6, shade("purple", rng))


PREY = ("snail", "mouse", "bee")
HUNTERS = ("fox", "bird", "snake")


def food_chain(rng: Random) -> Item:
    eaten = rng.choice(PREY)
    eater = rng.choice(HUNTERS)
    question, right, candidates = rng.choice([
        (f"What does the {eater} eat?", eaten, PREY),
        (f"What eats the {eaten}?", eater, HUNTERS),
    ])
    return Item(
        "food chain", NATURAL, question, add_distractors(rng, right, candidates, 3),
        lecture="In a food chain each one eats the one before.",
        solution=f"The {eaten} eats the grass and the {eater} eats the {eaten}.",
        caption=f"a food chain, grass, {eaten}, {eater}",
        draw=draw_food_chain, scene=(eaten, eater))


def draw_food_chain(canvas, rng, eaten, eater):
    y = 64 + rng.uniform(-8, 8)
    for x in (12, 19, 26):
        tip = x + rng.uniform(-4, 4)
        canvas.line((x, y + 14, tip, y - 14), shade("green", rng), 4)
    for x in (34, 80):
        canvas.line((x, y, x + 9, y), DARK, 2)
        canvas.polygon([(x + 8, y - 4), (x + 8, y + 4), (x + 13, y)], DARK)
    for animal, x in ((eaten, 62), (eater, 110)):
        dx = rng.uniform(-2, 2)
        dy = rng.uniform(-3, 3)
        draw_animal(canvas, animal, x + dx, y + dy)


def draw_animal(canvas, animal, x, y):
    """A small animal, looking left."""
    if animal == "snail":
        canvas.ellipse((x - 14, y + 4, x + 14, y + 12), (200, 170, 120))
        canvas.ellipse((x - 6, y - 12, x + 14, y + 8), (130, 80, 40))
    elif animal == "mouse":
        canvas.ellipse((x - 14, y - 7, x + 12, y + 9), (140, 140, 150))
        canvas.ellipse((x - 12, y - 13, x - 4, y - 4), (240, 170, 190))
    elif animal == "bee":
        canvas.ellipse((x - 13, y - 7, x + 13, y + 9), (240, 200, 30))
        canvas.rectangle((x - 5, y - 6, x - 1, y + 8), "black")
        canvas.rectangle((x + 4, y - 6, x + 8, y + 8), "black")
    elif animal == "fox":
        canvas.polygon([(x - 14, y - 14), (x + 14, y - 14), (x, y + 14)], (235, 110, 20))
        canvas.polygon([(x - 5, y + 2), (x + 5, y + 2), (x, y + 13)], "white")
    elif animal == "bird":
        canvas.ellipse((x - 12, y - 8, x + 12, y + 10), (60, 110, 230))
        canvas.polygon([(x - 10, y - 4), (x - 10, y + 4), (x - 18, y)], (240, 180, 30))
    else:
        bends = [(x - 14, y + 8), (x - 7, y - 8), (x, y + 8), (x + 7, y - 8), (x + 14, y + 8)]
        canvas.line(bends, (30, 130, 60), 6)


def flag(rng: Random) -> Item:
    top, bottom = rng.sample(list(COLOURS), 2)
    wrong = [colour for colour in COLOURS if colour not in (top, bottom)]
    return Item(
        "flag", SOCIAL, "Which colour is the top stripe?", [top, bottom, *rng.sample(wrong, 2)],
        lecture="Flags stand for lands.",
        solution=f"The top stripe is {top} and the bottom stripe is {bottom}.",
        caption=f"a flag, top {top}, bottom {bottom}",
        draw=draw_flag, scene=(top, bottom))


def draw_flag(canvas, rng, top, bottom):
    x = rng.uniform(18, 26)
    y = rng.uniform(24, 34)
    h = rng.uniform(56, 64)
    canvas.line((x - 2, y - 8, x - 2, 124), DARK, 4)
    canvas.rectangle((x, y, x + 84, y + h / 2), shade(top, rng))
    canvas.rectangle((x, y + h / 2, x + 84, y + h), shade(bottom, rng))


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
        draw=draw_traffic_light, scene=(lit,))


def draw_traffic_light(canvas, rng, lit):
    x = rng.uniform(56, 72)
    y = rng.uniform(-4, 4)
    canvas.rounded_rectangle((x - 22, 8 + y, x + 22, 120 + y), 8, (50, 50, 50))
    for i, colour in enumerate(DUTIES):
        fill = (95, 95, 95)
        if colour == lit:
            fill = shade(colour, rng)
        draw_shape(canvas, "circle", x, 28 + 36 * i + y, 14, fill)


# `things` stands there four times because it is four skills.
PICTURE_SKILLS = (
    things, things, things, things, magnets, bars, thermometer, jars, compass, treasure_map,
    particles, food_chain, flag, traffic_light)


def picture_item(rng: Random, new: bool = False) -> Item:
    """A question about a picture. new: `things` show the pairs that are kept for the test split."""
    skill = rng.choice(PICTURE_SKILLS)
    if skill is things:
        return things(rng, new)
    return skill(rng)


# The skills that need words alone


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
NAMES = ("Mia", "Leo", "Zoe", "Max", "Ana", "Tom")
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
    name = rng.choice(NAMES)
    has, wants, *others = rng.sample(GOODS, 4)
    return Item(
        "goods", SOCIAL, f"What does {name} want?", [wants, has, *others],
        lecture="People trade what they have for what they want.",
        solution=f"{name} wants {wants}.",
        hint=f"{name} has {has} and wants {wants}.")


def owners(rng: Random) -> Item:
    giver, taker, other = rng.sample(NAMES, 3)
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


def described(rng: Random) -> Item:
    """A question about a scene that the hint describes in words, without a picture."""
    item = picture_item(rng)
    return Item(
        "described scenes", NATURAL, item.question, item.choices, item.lecture, item.solution,
        hint=f"The picture shows {item.caption}.")


TEXT_SKILLS = (
    opposites, opposites, past_tense, past_tense, kinds, capitals, goods, owners, materials,
    described)


# The files of the world


def problem(item: Item, rng: Random, split: str) -> dict:
    """The Item as a problem of ScienceQA's problems.json, its choices shuffled."""
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
    """The picture of the Item's scene, PICTURE_SIDE × PICTURE_SIDE pixels."""
    light = rng.randrange(236, 256)
    picture = Image.new("RGB", (PICTURE_SIDE, PICTURE_SIDE), (light, light, light))
    item.draw(ImageDraw.Draw(picture), rng, *item.scene)
    return picture


def draw_item(rng, i, split):
    """Problem i of a split: every other one has a picture."""
    if i % 2:
        skill = rng.choice(TEXT_SKILLS)
        return skill(rng)
    new = split == "test" and rng.random() < 0.3
    return picture_item(rng, new)


def write_world(root: Path, seed: int = 0, sizes: tuple[int, ...] | None = None) -> None:
    """Write ScienceQA's layout into the folder `root`.

    Its files are problems.json, pid_splits.json, captions.json and images/{split}/{id}/image.png.
    world.json, which says the version, is ours. sizes: problems of each split (default: SIZES).
    """
    problems = {}
    captions = {}
    splits = {}
    for split, size in zip(SPLITS, sizes or SIZES):
        rng = Random(f"{seed} {split}")
        splits[split] = []
        for i in tqdm(range(size), desc=f"drawing {split}", unit=" problems", file=sys.stdout):
            item = draw_item(rng, i, split)
            pid = str(len(problems) + 1)
            problems[pid] = problem(item, rng, split)
            splits[split].append(pid)
            if item.draw:
                captions[pid] = item.caption
                folder = root / "images" / split / pid
                folder.mkdir(parents=True)
                render(item, rng).save(folder / "image.png", compress_level=1)
    write_json(root / "problems.json", problems)
    write_json(root / "pid_splits.json", splits)
    write_json(root / "captions.json", {"captions": captions})
    write_json(root / "world.json", {"version": VERSION})


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1))


def make_folder(folder: Path, write: Callable[[Path], None], anew: bool = True) -> None:
    """Call write(temporary folder), then rename it, so that the folder is complete or not there.

    anew: replace a folder that is there. Of several processes that make the same folder, one works
    and the others wait. LavinError if the folder cannot be written.
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

    It does unless a model is named in args (flags or settings with the attributes llama, vit,
    data_root and data), or remembered (the settings in the run's checkpoint), or something lies
    where real models and data would, in files.DEFAULTS.
    """
    for name in ("llama", "vit"):
        if chosen_path(name, args, remembered):
            return False
    return not any(os.path.exists(path) for path in files.DEFAULTS.values())


def chosen_path(name, args, remembered):
    """The path that args name, or the one that the checkpoint remembers, or None."""
    return getattr(args, name) or remembered.get(name)


def prepare(args, remembered: dict = {}) -> None:
    """Set the small world's paths in args if it is meant, and draw its data if they are missing.

    LavinError if this run uses files of the small world that another version made.
    """
    if is_meant(args, remembered):
        print(f"embedded default: none of {', '.join(files.DEFAULTS.values())} is here")
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


def is_used(name, args, remembered):
    """Does this run take the small world's llama, vit or data_root?"""
    chosen = chosen_path(name, args, remembered) or ""
    return os.path.abspath(chosen) == str(PATHS[name])


def check_version(folder, name, command):
    """LavinError if the folder exists, but its file of that name does not state this VERSION."""
    path = folder / name
    if not folder.exists():
        return
    stated = read_json(path) if path.exists() else None
    if not isinstance(stated, dict) or stated.get("version") != VERSION:
        raise LavinError(
            f"{folder}: made by another version of the small world than this code's, {VERSION}; "
            f"{command} makes it anew")


# A sheet of answers


ANSWER_SIZE = (560, 170)        # pixels of one problem on the sheet
SHEET_PICTURE_SIDE = 150


def sheet(predictions: str, path: str, n: int = 8) -> None:
    """Draw n test problems, each of another picture skill, with what the model wrote about them.

    predictions: the file that generate.py --predictions wrote. path: the PNG file to write.
    """
    problems = read_json(PATHS["data_root"] / "problems.json")
    outputs = read_json(predictions)["outputs"]
    first_of_skill = {}
    for pid in outputs:
        if problems[pid]["image"]:
            first_of_skill.setdefault(problems[pid]["skill"], pid)
    pids = list(first_of_skill.values())[:n]
    width, height = ANSWER_SIZE
    picture = Image.new("RGB", (2 * width, height * math.ceil(len(pids) / 2)), "white")
    for i, pid in enumerate(pids):
        x = width * (i % 2) + 10
        y = height * (i // 2) + 10
        draw_answer(picture, x, y, pid, problems[pid], outputs[pid])
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
    print(f"written: {path}")


def draw_answer(sheet, x, y, pid, problem, output):
    """One problem at (x, y): its picture, question and options, the output green if it is right."""
    image = Image.open(PATHS["data_root"] / "images" / problem["split"] / pid / "image.png")
    size = (SHEET_PICTURE_SIDE, SHEET_PICTURE_SIDE)
    sheet.paste(image.resize(size, Image.Resampling.BICUBIC), (x, y))
    options = []
    for letter, choice in zip(data.LETTERS, problem["choices"]):
        options.append(f"({letter}) {choice}")
    is_right = data.sqa_answer(output) == problem["answer"]
    colour = "#107030" if is_right else "#b02020"
    canvas = ImageDraw.Draw(sheet)
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
