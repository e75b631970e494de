"""How the small world's pictures are drawn: colours, shapes, scenes, and two styles.

A scene is first drawn flat, in plain colours on a light background. CLIP's pre-training shows only
flat pictures. The problems' pictures are then redrawn in another style: `pencil` puts outlines and
hatching on squared paper. CLIP has never seen this style. In the same way, ScienceQA's diagrams
differ from the web's photographs. All coordinates are in pixels, with y pointing down.
"""

import math
from random import Random

from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 128              # pixels of a picture; CLIP sees it at 64
MIDDLE = SIDE / 2
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (145, 60, 175),
    "orange": (240, 140, 30),
}
# Things have these colours too, but no text of the world names them.
OTHER_COLOURS = {
    "charcoal": (25, 25, 25),
    "ash": (130, 130, 130),
    "walnut": (120, 75, 35),
    "rose": (235, 120, 180),
    "turquoise": (30, 160, 165),
    "lime": (150, 200, 60),
    "indigo": (60, 40, 110),
    "maroon": (120, 20, 40),
}
PALETTE = COLOURS | OTHER_COLOURS
DARK = (60, 60, 60)
SHAPES = ("circle", "square", "triangle", "star", "cross")
POSITIONS = {"top": (0, -30), "bottom": (0, 30), "left": (-30, 0), "right": (30, 0)}
DIRECTIONS = {"north": (0, -1), "east": (1, 0), "south": (0, 1), "west": (-1, 0)}
LIGHTS = ("red", "yellow", "green")     # of a traffic light, from the top


def shade(colour: str, rng: Random) -> tuple[int, ...]:
    """One of COLOURS or OTHER_COLOURS, varied a little, as (red, green, blue)."""
    return near(PALETTE[colour], rng, 15)


def near(colour: tuple[int, ...], rng: Random, spread: float,
         lighter: float = 0) -> tuple[int, ...]:
    """A colour (red, green, blue), lighter by `lighter`, and each channel up to `spread` off."""
    channels = []
    for channel in colour:
        shifted = round(channel + lighter + rng.uniform(-spread, spread))
        channels.append(min(255, max(0, shifted)))
    return tuple(channels)


# Shapes


def draw_shape(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill) -> None:
    """One of SHAPES, centred at (x, y), about r pixels from there to its edge."""
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


def corners(x: float, y: float, distances: list[float]) -> list[tuple[float, float]]:
    """Points at these distances from (x, y), at equal angles, clockwise from the top."""
    points = []
    for i, distance in enumerate(distances):
        angle = 2 * math.pi * i / len(distances)
        points.append((x + distance * math.sin(angle), y - distance * math.cos(angle)))
    return points


# Scenes. Each function draws the scene of one skill of world.py on a canvas.


def draw_things(canvas, rng, shape, colour, n, position):
    """n equal shapes in a row, or in a column at the left or right side."""
    dx, dy = POSITIONS[position]
    r = rng.uniform(10.5, 12.5)
    gap = rng.uniform(29, 31)
    for i in range(n):
        along = (i - (n - 1) / 2) * gap
        x = MIDDLE + dx
        y = MIDDLE + dy
        if position in ("left", "right"):
            y += along
        else:
            x += along
        x += rng.uniform(-2, 2)
        y += rng.uniform(-2, 2)
        draw_shape(canvas, shape, x, y, r, shade(colour, rng))


def draw_magnets(canvas, rng, left, right):
    """Two bar magnets whose poles `left` and `right` face each other."""
    y = rng.uniform(54, 74)
    h = rng.uniform(10, 20)
    w = rng.uniform(20, 26)
    gap = rng.uniform(3, 9)
    x = MIDDLE - gap
    draw_pole(canvas, rng, left, x - w, x, y, h)
    draw_pole(canvas, rng, opposite_pole(left), x - 2 * w, x - w, y, h)
    x = MIDDLE + gap
    draw_pole(canvas, rng, right, x, x + w, y, h)
    draw_pole(canvas, rng, opposite_pole(right), x + w, x + 2 * w, y, h)


def opposite_pole(pole):
    return "south" if pole == "north" else "north"


def draw_pole(canvas, rng, pole, x0, x1, y, h):
    """Half a magnet, from x0 to x1: north is red, south is blue."""
    fill = shade("red" if pole == "north" else "blue", rng)
    canvas.rectangle((x0, y - h, x1, y + h), fill)


def draw_bars(canvas, rng, order, columns):
    """A tall, a middle and a short bar, in this order of colours and in these columns."""
    canvas.line((12, 112, 116, 112), DARK, 3)
    heights = (88, 54, 22)
    for colour, column, height in zip(order, columns, heights):
        x = 31 + 33 * column
        top = 110 - height - rng.uniform(-7, 7)
        canvas.rectangle((x - 11, top, x + 11, 110), shade(colour, rng))


def draw_thermometer(canvas, rng, level):
    """A thermometer with five marks. Its liquid stands at mark `level`, 1 to 5."""
    x = rng.uniform(54, 74)
    y = rng.uniform(-3, 3)
    canvas.rounded_rectangle((x - 9, 8 + y, x + 9, 106 + y), 8, "white", DARK, 2)
    canvas.ellipse((x - 15, 96 + y, x + 15, 122 + y), shade("red", rng))
    top = 96 - 16 * level + y + rng.uniform(-2, 2)
    canvas.rectangle((x - 5, top, x + 5, 104 + y), shade("red", rng))
    for i in range(1, 6):
        mark = 96 - 16 * i + y
        canvas.line((x + 12, mark, x + 20, mark), DARK, 2)


def draw_jars(canvas, rng, left, right):
    """Two jars filled to these heights."""
    draw_jar(canvas, rng, 36, left)
    draw_jar(canvas, rng, 92, right)


def draw_jar(canvas, rng, x, level):
    canvas.rectangle((x - 17, 108 - level, x + 17, 108), shade("blue", rng))
    canvas.line([(x - 19, 30), (x - 19, 110), (x + 19, 110), (x + 19, 30)], DARK, 3)


def draw_compass(canvas, rng, direction):
    """A dial whose red needle points roughly in the direction."""
    x = rng.uniform(60, 68)
    y = rng.uniform(60, 68)
    angle = rng.uniform(-0.2, 0.2)
    canvas.ellipse((x - 48, y - 48, x + 48, y + 48), "white", DARK, 4)
    east, south = DIRECTIONS[direction]
    dx = east * math.cos(angle) - south * math.sin(angle)
    dy = east * math.sin(angle) + south * math.cos(angle)
    base = [(x - 9 * dy, y + 9 * dx), (x + 9 * dy, y - 9 * dx)]
    canvas.polygon([(x + 40 * dx, y + 40 * dy), *base], shade("red", rng))
    canvas.polygon([(x - 40 * dx, y - 40 * dy), *base], (150, 150, 150))


def draw_map(canvas, rng, direction):
    """A house and a tree on opposite sides of the middle. The tree lies in the direction."""
    east, south = DIRECTIONS[direction]
    dx = east * rng.uniform(30, 36)
    dy = south * rng.uniform(30, 36)
    middle_x = MIDDLE + rng.uniform(-10, 10)
    middle_y = MIDDLE + rng.uniform(-10, 10)
    draw_house(canvas, rng, middle_x - dx, middle_y - dy)
    draw_tree(canvas, rng, middle_x + dx, middle_y + dy)


def draw_house(canvas, rng, x, y):
    canvas.rectangle((x - 12, y - 4, x + 12, y + 14), shade("orange", rng))
    canvas.polygon([(x - 15, y - 4), (x + 15, y - 4), (x, y - 17)], shade("red", rng))


def draw_tree(canvas, rng, x, y):
    canvas.rectangle((x - 3, y, x + 3, y + 16), (120, 80, 40))
    canvas.ellipse((x - 13, y - 16, x + 13, y + 7), shade("green", rng))


def draw_particles(canvas, rng, state):
    """A box of 6 × 6 cells. A solid fills all of them, a liquid the lowest 20.

    A gas fills 8 cells. The cells are chosen at random from every other one, as on a checkerboard.
    """
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


def draw_food_chain(canvas, rng, eaten, eater):
    """Grass, an animal that eats it, and one that eats this animal, with arrows between them."""
    y = MIDDLE + rng.uniform(-8, 8)
    for x in (12, 19, 26):
        tip = x + rng.uniform(-4, 4)
        canvas.line((x, y + 14, tip, y - 14), shade("green", rng), 4)
    draw_arrow(canvas, 34, y)
    draw_arrow(canvas, 80, y)
    draw_animal(canvas, rng, eaten, 62, y)
    draw_animal(canvas, rng, eater, 110, y)


def draw_arrow(canvas, x, y):
    canvas.line((x, y, x + 9, y), DARK, 2)
    canvas.polygon([(x + 8, y - 4), (x + 8, y + 4), (x + 13, y)], DARK)


def draw_animal(canvas, rng, animal, x, y):
    """A small animal, looking left."""
    x += rng.uniform(-2, 2)
    y += rng.uniform(-3, 3)
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


def draw_flag(canvas, rng, top, bottom):
    """A flag of two stripes on a pole."""
    x = rng.uniform(18, 26)
    y = rng.uniform(24, 34)
    h = rng.uniform(56, 64)
    canvas.line((x - 2, y - 8, x - 2, 124), DARK, 4)
    canvas.rectangle((x, y, x + 84, y + h / 2), shade(top, rng))
    canvas.rectangle((x, y + h / 2, x + 84, y + h), shade(bottom, rng))


def draw_traffic_light(canvas, rng, lit):
    """Three lights in a dark box, one of them lit."""
    x = rng.uniform(56, 72)
    y = rng.uniform(-4, 4)
    canvas.rounded_rectangle((x - 22, 8 + y, x + 22, 120 + y), 8, (50, 50, 50))
    for i, colour in enumerate(LIGHTS):
        fill = (95, 95, 95)
        if colour == lit:
            fill = shade(colour, rng)
        draw_shape(canvas, "circle", x, 28 + 36 * i + y, 14, fill)


# The two styles


def blank(rng: Random) -> Image.Image:
    """The light background of a flat picture."""
    light = rng.randrange(236, 256)
    return Image.new("RGB", (SIDE, SIDE), (light, light, light))


def pencil(flat: Image.Image, rng: Random) -> Image.Image:
    """A flat picture, redrawn with coloured pencils: shaded, outlined, on squared paper.

    The colour in the upper left corner counts as the background, where the paper stays bare.
    """
    picture = squared_paper(rng)
    background = Image.new("RGB", flat.size, flat.getpixel((0, 0)))
    difference = ImageChops.difference(flat, background).convert("L")
    inside = difference.point(lambda value: 255 if value > 12 else 0)
    lightly = inside.point(lambda value: 2 * value // 3)
    picture.paste(flat, mask=lightly)
    picture.paste(flat, mask=ImageChops.multiply(inside, hatching(rng)))
    edges = flat.filter(ImageFilter.FIND_EDGES).convert("L")
    outline = edges.point(lambda value: 255 if value > 30 else 0)
    grey = rng.randint(60, 100)
    picture.paste((grey, grey, grey), mask=outline.filter(ImageFilter.GaussianBlur(0.6)))
    return picture


def squared_paper(rng: Random) -> Image.Image:
    tint = rng.randint(225, 245)
    paper = Image.new("RGB", (SIDE, SIDE), (tint, tint - 5, tint - 22))
    canvas = ImageDraw.Draw(paper)
    gap = rng.uniform(9, 14)
    at = rng.uniform(0, gap)
    while at < SIDE:
        canvas.line((at, 0, at, SIDE), (170, 190, 225))
        canvas.line((0, at, SIDE, at), (170, 190, 225))
        at += gap
    return paper


def hatching(rng: Random) -> Image.Image:
    """A mask of slanted strokes: 255 where the pencil touches the paper, else 0."""
    mask = Image.new("L", (SIDE, SIDE), 0)
    canvas = ImageDraw.Draw(mask)
    slope = math.tan(rng.uniform(0.5, 1.1))
    period = rng.uniform(5, 7)
    shift = SIDE / slope        # how far a stroke moves to the right on its way up
    x = -shift
    while x < SIDE:
        canvas.line((x, SIDE, x + shift, 0), 255, 2)
        x += period
    return mask
