"""Pictures and captions for CLIP's pre-training, far more varied than the small world's.

    python -m tiny.album PNG             draw a few of them on a sheet

A picture shows equal things, or two things side by side or one above the other. A thing has a
shape, a colour, a size and a place. Its rotation, its stretch, its style (filled or an outline) and
its background vary from picture to picture. The caption does not mention them, so CLIP has to
ignore them.

CLIP learns by contrast: which caption of the batch belongs to this picture? If the pictures of a
batch differ in everything, their colours alone give the answer. So pictures come in groups that are
hard to tell apart. Within a group, all properties but two are the same, or nearly the same.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw, ImageFont

from extras.terminal import Parser, run
from files import write_atomically
from tiny import drawing
from tiny.drawing import POSITIONS, SIDE, corners, near
from tiny.world import COUNTS, is_new

SHAPES = (
    "circle", "square", "triangle", "star", "cross", "rectangle", "oval", "diamond", "ring",
    "hexagon", "half circle", "frame")
CHARACTERS = tuple("ABEFHKLMNPRTXYZ234579")
# Pre-training never shows these. bench/probe.py uses them to test what CLIP learned about shapes.
UNSEEN_SHAPES = ("heart", "moon", "arrow", "pentagon", "trapezoid", "drop")
COLOURS = {
    "red": drawing.COLOURS["red"],
    "orange": drawing.COLOURS["orange"],
    "yellow": drawing.COLOURS["yellow"],
    "green": drawing.COLOURS["green"],
    "teal": (20, 140, 140),
    "blue": drawing.COLOURS["blue"],
    "purple": drawing.COLOURS["purple"],
    "pink": (245, 150, 190),
    "brown": (130, 80, 35),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "white": (248, 248, 248),
}
SIZES = {"small": (6, 10), "middle": (12, 18), "large": (22, 42)}       # pixels, centre to edge
PLACES = {
    "top left": (-36, -36), "top": (0, -36), "top right": (36, -36),
    "left": (-36, 0), "centre": (0, 0), "right": (36, 0),
    "bottom left": (-36, 36), "bottom": (0, 36), "bottom right": (36, 36),
}
STYLES = ("filled", "filled", "rimmed", "outline", "inlaid")
BACKGROUNDS = ("plain", "plain", "gradient", "noise", "halves")


@dataclass
class Thing:
    """What the caption says of one thing."""
    shape: str
    colour: str
    size: str


# One thing


def contour(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a shape whose edge is about r pixels from its centre (x, y)."""
    if shape in ("square", "frame"):
        points = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "rectangle":
        points = [(-1.2, -0.6), (1.2, -0.6), (1.2, 0.6), (-1.2, 0.6)]
    elif shape == "oval":
        points = [(1.3 * a, 0.65 * b) for a, b in corners(0, 0, [1] * 30)]
    elif shape == "diamond":
        points = [(0, -1.3), (0.8, 0), (0, 1.3), (-0.8, 0)]
    elif shape == "triangle":
        points = corners(0, 0, [1.15] * 3)
    elif shape == "star":
        points = corners(0, 0, [1.2, 0.5] * 5)
    elif shape == "cross":
        a = 0.36
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
                  (-1, a), (-1, -a), (-a, -a)]
    elif shape == "hexagon":
        points = corners(0, 0, [1.05] * 6)
    elif shape == "half circle":
        points = [(a, b + 0.4) for a, b in corners(0, 0, [1.15] * 36) if b < 0.01]
        points.sort()
    elif shape in UNSEEN_SHAPES:
        points = unseen_contour(shape)
    else:                                                   # a circle or a ring
        points = corners(0, 0, [1.05] * 30)
    return [(x + r * a, y + r * b) for a, b in points]


def unseen_contour(shape: str) -> list[tuple[float, float]]:
    """The corners of one of UNSEEN_SHAPES around (0, 0), with its edge about 1 from there."""
    if shape == "heart":
        points = []
        for i in range(36):
            t = 2 * math.pi * i / 36
            height = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
            points.append((1.1 * math.sin(t) ** 3, -height / 15))
    elif shape == "moon":
        outer = corners(0, 0, [1.1] * 36)[:19]
        inner = [(0.45 * a, b) for a, b in reversed(outer)]
        points = [(a - 0.4, b) for a, b in outer + inner]
    elif shape == "arrow":
        points = [(-1, -0.3), (0.1, -0.3), (0.1, -0.9), (1.1, 0), (0.1, 0.9), (0.1, 0.3), (-1, 0.3)]
    elif shape == "pentagon":
        points = corners(0, 0, [1.1] * 5)
    elif shape == "trapezoid":
        points = [(-0.5, -0.7), (0.5, -0.7), (1.1, 0.7), (-1.1, 0.7)]
    else:                                                   # a drop: its point, then round below
        points = [(0, -1.3)]
        for a, b in corners(0, 0, [0.8] * 36):
            if 30 < math.degrees(math.atan2(a, -b)) % 360 < 330:
                points.append((a, b + 0.35))
    return points


def turned(points, x, y, angle, stretch):
    """Points stretched sideways and then turned around (x, y)."""
    cos = math.cos(angle)
    sin = math.sin(angle)
    result = []
    for a, b in points:
        a = (a - x) * stretch
        b = b - y
        result.append((x + cos * a - sin * b, y + sin * a + cos * b))
    return result


def paint(canvas: ImageDraw.ImageDraw, rng: Random, thing: Thing, x, y, r, behind, style) -> None:
    """Draw one thing. behind: the colour inside an outline, and in a ring's or frame's hole."""
    fill = tone(thing.colour, rng)
    if thing.shape in CHARACTERS:
        font = ImageFont.load_default(max(10, 2.4 * r))
        canvas.text((x, y), thing.shape, fill, font, anchor="mm")
        return
    angle = rng.gauss(0, 0.15)
    if rng.random() < 0.15:
        angle = rng.uniform(-math.pi, math.pi)
    if thing.shape in ("square", "diamond"):        # a large angle turns one into the other
        angle = rng.uniform(-0.2, 0.2)
    stretch = rng.uniform(0.85, 1.18)
    if thing.shape in ("circle", "ring", "square", "frame"):    # stretched: an oval, a rectangle
        stretch = 1
    elif thing.shape in ("triangle", "rectangle", "oval"):
        stretch = rng.uniform(1, 1.6)

    def points(scale):
        return turned(contour(thing.shape, x, y, scale * r), x, y, angle, stretch)

    has_hole = thing.shape in ("ring", "frame")
    if style == "outline" and not has_hole and r > 9:
        canvas.polygon(points(1), behind, fill, rng.choice([2, 3]))
        return
    rim = fill
    if style == "rimmed":
        rim = rng.choice([(0, 0, 0), (90, 90, 90), (255, 255, 255)])
    canvas.polygon(points(1), fill, rim, 2)
    if has_hole:
        canvas.polygon(points(0.55), behind)
    elif style == "inlaid" and r > 14:
        canvas.polygon(points(0.6), tone(thing.colour, rng))


def tone(colour: str, rng: Random) -> tuple[int, ...]:
    """A colour, a little off and a little lighter or darker, as (red, green, blue)."""
    light = rng.uniform(-32, 32)
    return near(COLOURS[colour], rng, 20, lighter=light)


# A picture


def background(rng: Random, colours: list[str]) -> tuple[Image.Image, tuple[int, ...]]:
    """A picture without things, and its main colour. It avoids the given colours."""
    others = [colour for colour in COLOURS if colour not in colours]
    if "white" not in colours and rng.random() < 0.5:
        others = ["white"]                          # most drawings are on light paper
    first = tone(rng.choice(others), rng)
    side = (SIDE, SIDE)
    picture = Image.new("RGB", side, first)
    kind = rng.choice(BACKGROUNDS)
    second = tuple(min(255, max(0, channel + rng.randint(-30, 30))) for channel in first)
    if kind == "gradient":
        mask = Image.linear_gradient("L").resize(side).rotate(rng.choice([0, 90, 180, 270]))
        picture.paste(second, mask=mask)
    elif kind == "noise":
        noise = Image.effect_noise((32, 32), rng.uniform(20, 60)).resize(side)
        picture.paste(second, mask=noise)
    elif kind == "halves":
        horizon = rng.randrange(SIDE)
        picture.paste(second, (0, horizon, *side))
    return picture, first


def places_for(rng: Random, n: int, place: str, r: float) -> list[tuple[float, float]]:
    """n random points around a place, more than 2.3 r apart."""
    dx, dy = PLACES[place]
    reach = 14 if n == 1 else 1.6 * r * math.sqrt(n)
    points = []
    while len(points) < n:
        x = 64 + dx + rng.uniform(-reach, reach)
        y = 64 + dy + rng.uniform(-reach, reach)
        x = min(127 - r, max(r, x))
        y = min(127 - r, max(r, y))
        if all(math.hypot(x - a, y - b) > 2.3 * r for a, b in points):
            points.append((x, y))
        reach *= 1.03                               # so that there is room in the end
    return points


def row_for(rng: Random, n: int, place: str, r: float) -> list[tuple[float, float]]:
    """n points in a row, or in a column at a side, as in the small world."""
    dx, dy = PLACES[place]
    gap = r * rng.uniform(2.3, 2.7)
    points = []
    for i in range(n):
        along = (i - (n - 1) / 2) * gap + rng.uniform(-0.1, 0.1) * r
        across = rng.uniform(-0.2, 0.2) * r
        if dx:
            points.append((64 + dx + across, 64 + along))
        else:
            points.append((64 + along, 64 + dy + across))
    return points


def several(rng: Random, thing: Thing, n: int, place: str) -> tuple[Image.Image, str]:
    """n equal things around a place -> the picture and its caption."""
    picture, behind = background(rng, [thing.colour])
    canvas = ImageDraw.Draw(picture)
    low, high = SIZES[thing.size]
    r = rng.uniform(low, high)
    # More than 50 / r things in a row would not fit.
    is_row = 1 < n < 50 / r and place in POSITIONS and rng.random() < 0.5
    arrange = row_for if is_row else places_for
    style = rng.choice(STYLES)
    for x, y in arrange(rng, n, place, r):
        paint(canvas, rng, thing, x, y, r, behind, style)
    return picture, f"{COUNTS[n - 1]} {thing.size} {thing.colour} {thing.shape}, {place}"


def pair(rng: Random, one: Thing, other: Thing) -> tuple[Image.Image, str]:
    """Two things, side by side or one above the other -> the picture and its caption."""
    picture, behind = background(rng, [one.colour, other.colour])
    canvas = ImageDraw.Draw(picture)
    is_beside = rng.random() < 0.5
    half = rng.uniform(26, 36)
    style = rng.choice(STYLES)
    for thing, side in ((one, -1), (other, 1)):
        r = rng.uniform(11, 21)
        x = 64 + rng.uniform(-8, 8)
        y = 64 + rng.uniform(-8, 8)
        if is_beside:
            x += side * half
        else:
            y += side * half
        paint(canvas, rng, thing, x, y, r, behind, style)
    relation = "left of" if is_beside else "above"
    return picture, f"{one.colour} {one.shape} {relation} {other.colour} {other.shape}"


# A group of pictures that are hard to tell apart


def group(n: int, rng: Random) -> list[tuple[Image.Image, str]]:
    """n pairs (picture, caption). All properties but two are the same, or nearly the same.

    Shape is usually one of those two, because it is the hardest to see.
    """
    pools = {
        "shape": CHARACTERS if rng.random() < 0.1 else SHAPES,
        "colour": tuple(COLOURS),
        "size": tuple(SIZES),
        "n": (1, 2, 3, 4),
        "place": tuple(PLACES),
    }
    varied = rng.sample(["colour", "size", "n", "place"], 2)
    if rng.random() < 0.85:
        varied[0] = "shape"
    for name, pool in pools.items():
        if name not in varied:
            pools[name] = rng.sample(pool, rng.choice([1, 1, 2]))
    make = random_several
    if "shape" in varied and rng.random() < 0.2:
        make = random_pair                          # a caption of two colours and two shapes
    return [make(rng, pools) for _ in range(n)]


def random_several(rng, pools):
    thing = random_thing(rng, pools)
    n = rng.choice(pools["n"])
    place = rng.choice(pools["place"])
    if n > 1 and thing.size == "large":             # there is room for only one large thing
        thing.size = "middle"
    return several(rng, thing, n, place)


def random_pair(rng, pools):
    return pair(rng, random_thing(rng, pools), random_thing(rng, pools))


def random_thing(rng: Random, pools) -> Thing:
    """A thing from the pools, but never a pair that the world keeps for its test split."""
    while True:
        thing = Thing(
            rng.choice(pools["shape"]), rng.choice(pools["colour"]), rng.choice(pools["size"]))
        if not is_new(thing.shape, thing.colour):
            return thing
        # The pools may hold only pairs that are kept. Another colour helps.
        pools = pools | {"colour": tuple(COLOURS)}


# A sheet of them


def main() -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("path", type=Path, metavar="PNG")
    args = parser.parse_args()
    rng = Random(0)
    sheet = Image.new("RGB", (8 * SIDE, 6 * SIDE))
    for row in range(6):
        for column, (picture, _) in enumerate(group(8, rng)):
            sheet.paste(picture, (column * SIDE, row * SIDE))
    write_atomically(args.path, lambda temporary: sheet.save(temporary, format="PNG"))


if __name__ == "__main__":
    run(main)
