"""Line charts as PNG files, drawn with Pillow: the loss of a run, the routing weights by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from files import write_atomically

# In pixels: the picture, and the margins around the chart. The legend is in the lower margin.
WIDTH = 800
HEIGHT = 440
LEFT = 70
TOP = 50
RIGHT = 20
BOTTOM = 90
CHART_WIDTH = WIDTH - LEFT - RIGHT
CHART_HEIGHT = HEIGHT - TOP - BOTTOM

COLOURS = ("#1f5fbf", "#d9541e", "#9dbce6", "#f0b89c")
LARGEST = 1e300         # y of larger size, or infinite, or NaN, are left out
GREY = "#606060"
LIGHT_GREY = "#e4e4e4"


@dataclass
class Axes:
    """The range of the values that the chart shows."""
    first: float        # x at the left edge
    last: float         # x at the right edge
    low: float          # y at the bottom
    high: float         # y at the top

    def point(self, x, y):
        """The pixel of the value (x, y)."""
        across = (x - self.first) / (self.last - self.first)
        up = (y - self.low) / (self.high - self.low)
        return LEFT + across * CHART_WIDTH, HEIGHT - BOTTOM - up * CHART_HEIGHT


def make_axes(xs, series):
    """Axes on which all finite values of the series fit, with a margin above and below."""
    finite = []
    for ys in series.values():
        finite += [y for y in ys if abs(y) < LARGEST]
    if not finite:
        finite = [0.0]
    low = min(finite)
    high = max(finite)
    margin = 0.05 * (high - low) or 0.5         # a constant has no range of its own
    first = min(xs)
    last = max(max(xs), first + 1e-9)           # a single x must not divide by zero
    return Axes(first, last, low - margin, high + margin)


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """At most n + 1 round numbers from low to high, a power of ten or 2 or 5 times one apart."""
    power = 10 ** math.floor(math.log10((high - low) / n))
    step = 10 * power
    for factor in (1, 2, 5):
        if (high - low) / (power * factor) <= n:
            step = power * factor
            break
    start = math.ceil(low / step)
    end = math.floor(high / step + 1e-9)        # rounding must not lose a tick at the edge
    return [i * step for i in range(start, end + 1)]


def draw_axes(draw, font, axes):
    """Grid lines with their y on the left, and the x below."""
    for y in ticks(axes.low, axes.high):
        left = axes.point(axes.first, y)
        draw.line([left, axes.point(axes.last, y)], LIGHT_GREY)
        draw.text((LEFT - 8, left[1]), f"{y:.4g}", GREY, font, anchor="rm")
    for x in ticks(axes.first, axes.last, 8):
        if x == int(x):                         # steps and layers are whole numbers
            column = axes.point(x, axes.low)[0]
            draw.text((column, HEIGHT - BOTTOM + 6), f"{x:.4g}", GREY, font, anchor="ma")


def draw_series(draw, axes, xs, ys, colour):
    """One line, and dots on it where there are few points."""
    points = [axes.point(x, y) for x, y in zip(xs, ys) if abs(y) < LARGEST]
    draw.line(points, colour, 2)
    if len(points) < 50:
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour)


def draw_legend(draw, font, names):
    """A short line in its colour for each series, with its name, side by side."""
    y = HEIGHT - 18
    for i, name in enumerate(names):
        x = LEFT + i * CHART_WIDTH / len(names)
        draw.line((x, y, x + 20, y), COLOURS[i], 3)
        draw.text((x + 26, y), name, "black", font, anchor="lm")


def lines(path: str | Path, title: str, x_label: str, xs: Sequence[float],
          series: dict[str, Sequence[float]]) -> None:
    """Draw up to four series {name: [a y for every x]} over xs. A y that is not finite is left out.

    Raises LavinError if the file cannot be written.
    """
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    axes = make_axes(xs, series)
    draw.text((LEFT, 15), title, "black", font)
    draw.text((WIDTH / 2, HEIGHT - BOTTOM + 26), x_label, GREY, font, anchor="ma")
    draw_axes(draw, font, axes)
    for ys, colour in zip(series.values(), COLOURS):
        draw_series(draw, axes, xs, ys, colour)
    draw_legend(draw, font, list(series)[:len(COLOURS)])

    def save(temporary):
        picture.save(temporary, format="PNG")

    write_atomically(path, save)
