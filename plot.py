"""Line charts as PNG files, drawn with Pillow: the loss of a run, the routing weights of the layers."""

import math

from PIL import Image, ImageDraw, ImageFont

from files import write_atomically

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 800, 440, 70, 50, 20, 90
COLOURS = ("#1f5fbf", "#d9541e", "#9dbce6", "#f0b89c")


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= min((f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= n), default=10)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def lines(path, title, x_label, xs, series):
    """Draw series {name: [y for every x]} over xs; a y that is not finite is left out."""
    finite = [y for ys in series.values() for y in ys if math.isfinite(y)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.05 * (high - low) or 0.5
    low, high, first, last = low - margin, high + margin, min(xs), max(max(xs), min(xs) + 1e-9)

    def place(x, y):
        return (LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM))

    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    d, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    d.text((LEFT, 15), title, "black", font)
    d.text((WIDTH / 2, HEIGHT - BOTTOM + 26), x_label, "#606060", font, anchor="ma")
    for y in ticks(low, high):
        d.line([place(first, y), place(last, y)], "#e4e4e4")
        d.text((LEFT - 8, place(first, y)[1]), f"{y:.4g}", "#606060", font, anchor="rm")
    for x in [x for x in ticks(first, last, 8) if x == int(x)]:         # steps and layers are whole
        d.text((place(x, low)[0], HEIGHT - BOTTOM + 6), f"{x:.4g}", "#606060", font, anchor="ma")
    for i, ((name, ys), colour) in enumerate(zip(series.items(), COLOURS)):
        points = [place(x, y) for x, y in zip(xs, ys) if math.isfinite(y)]
        d.line(points, colour, 2)
        for x, y in points if len(points) < 50 else []:
            d.ellipse((x - 3, y - 3, x + 3, y + 3), colour)
        x = LEFT + i * (WIDTH - LEFT - RIGHT) / len(series)
        d.line((x, HEIGHT - 18, x + 20, HEIGHT - 18), colour, 3)
        d.text((x + 26, HEIGHT - 18), name, "black", font, anchor="lm")
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))
