"""Charts as PNG files, drawn with Pillow: the loss of a run, the routing weights by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from files import write_atomically

# Pillow does not antialias lines. So a chart is drawn at twice its size and then reduced to
# 1600 × 900. All lengths here are in pixels of the large drawing.
WIDTH = 3200
HEIGHT = 1800
LEFT = 230
RIGHT = 90
BOTTOM = 190
TEXT = 54               # font size
ROW = 84                # height of a row of the legend
SAMPLE = 120            # length of a line in the legend
DASH = 40

LARGEST = 1e300         # larger, infinite and NaN values of y are left out
BLACK = "#202020"
GREY = "#606060"
LINE_GREY = "#c4c4c4"
GRID_GREY = "#e6e6e6"

# Okabe and Ito's colours, which colour-blind readers can tell apart, and two paler ones.
BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PALE_BLUE = "#97c6e0"
PALE_ORANGE = "#f0b27e"


@dataclass
class Series:
    """Values that are drawn as a line, with or without markers."""
    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    width: int = 8
    dashed: bool = False
    marker: str | None = None               # "circle", "square" or "diamond"
    ends: Sequence[float] | None = None     # if given: vertical lines instead, from y to end


@dataclass
class Axes:
    """The ranges of x and y, and their place. On a log scale, low and high are log10 of y."""
    first: float            # x at the left edge
    last: float             # x at the right edge
    low: float              # y at the bottom
    high: float             # y at the top
    is_log: bool
    top: int                # pixel row of the upper edge

    def point(self, x, y):
        """The pixel of the value (x, y)."""
        if self.is_log:
            y = math.log10(y)
        across = (x - self.first) / (self.last - self.first)
        up = (y - self.low) / (self.high - self.low)
        bottom = HEIGHT - BOTTOM
        return LEFT + across * (WIDTH - LEFT - RIGHT), bottom - up * (bottom - self.top)


def make_axes(all_series, x_range, y_range, top):
    """Axes that fit all values. The y scale is log if the largest is over 10 times the smallest."""
    if y_range:
        return Axes(*x_range, *y_range, False, top)
    finite = []
    for series in all_series:
        for y in [*series.ys, *(series.ends or [])]:
            if abs(y) < LARGEST:
                finite.append(y)
    low = min(finite, default=0.0)
    high = max(finite, default=0.0)
    is_log = low > 0 and high / 10 > low
    if is_log:
        low = math.log10(low)
        high = math.log10(high)
    margin = 0.05 * (high - low) or 0.5         # a constant series has no range
    return Axes(*x_range, low - margin, high + margin, is_log, top)


def ticks(low: float, high: float, n: int) -> list[float]:
    """At most n + 1 round numbers from low to high: the multiples of 1, 2.5 or 5 times 10^k."""
    power = 10 ** math.floor(math.log10((high - low) / n))
    step = 10 * power
    for factor in (1, 2.5, 5):
        if (high - low) / (power * factor) <= n:
            step = power * factor
            break
    start = math.ceil(low / step)
    end = math.floor(high / step + 1e-9)        # rounding must not lose a tick at the edge
    return [i * step for i in range(start, end + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most 10 powers of ten from 10^low to 10^high. If few fit, also 2 and 5 times these."""
    first = math.floor(low)
    last = math.floor(high)
    factors = (1, 2, 5) if high - low < 3 else (1,)
    found = []
    for exponent in range(first, last + 1, math.ceil((last - first + 1) / 10)):
        for factor in factors:
            if low <= exponent + math.log10(factor) <= high:
                found.append(factor * 10.0 ** exponent)
    return found


def draw_axes(draw, font, axes, x_label, y_label):
    """Draw a light grid, ticks with their numbers, two axis lines, and the axis labels."""
    right = WIDTH - RIGHT
    bottom = HEIGHT - BOTTOM
    rows = log_ticks(axes.low, axes.high) if axes.is_log else ticks(axes.low, axes.high, 8)
    for y in rows:
        row = axes.point(axes.first, y)[1]
        draw.line((LEFT, row, right, row), GRID_GREY, 3)
        draw.line((LEFT - 14, row, LEFT, row), GREY, 4)
        draw.text((LEFT - 26, row), f"{y:.6g}", GREY, font, anchor="rm")
    for x in ticks(axes.first, axes.last, 12):
        if x == int(x):                         # steps and layers are whole numbers
            column = axes.point(x, 1)[0]
            draw.line((column, bottom, column, bottom + 14), GREY, 4)
            draw.text((column, bottom + 24), f"{int(x):,}", GREY, font, anchor="ma")
    draw.line((LEFT, axes.top, LEFT, bottom, right, bottom), GREY, 4)
    draw.text(((LEFT + right) / 2, HEIGHT - 16), x_label, BLACK, font, anchor="md")

    label = Image.new("L", (bottom - axes.top, 72))
    ImageDraw.Draw(label).text((label.width / 2, 36), y_label, 255, font, anchor="mm")
    draw.bitmap((4, axes.top), label.transpose(Image.Transpose.ROTATE_90), BLACK)


def draw_marks(draw, font, axes, marks):
    """Draw faint vertical lines with their names above them."""
    for x, name in marks.items():
        column = axes.point(x, 1)[0]
        draw.line((column, axes.top, column, HEIGHT - BOTTOM), LINE_GREY, 3)
        draw.text((column, axes.top - 8), name, GREY, font, anchor="rd")


def draw_line(draw, points, series):
    """Draw a line through the points. If dashed, it has a dash on both sides of every point."""
    if len(points) < 2:
        for point in points:                    # a single point makes no line
            draw.circle(point, series.width, series.colour)
        return
    if not series.dashed:
        draw.line(points, series.colour, series.width, joint="curve")
        return
    for (x, y), (next_x, next_y) in zip(points, points[1:]):
        n = 2 * round(math.hypot(next_x - x, next_y - y) / (2 * DASH)) + 1      # dashes and gaps
        across = (next_x - x) / n
        down = (next_y - y) / n
        for i in range(0, n, 2):
            dash = (x + i * across, y + i * down, x + (i + 1) * across, y + (i + 1) * down)
            draw.line(dash, series.colour, series.width)


def draw_marker(draw, x, y, series):
    if series.marker == "circle":
        draw.circle((x, y), 16, series.colour)
    elif series.marker == "square":
        draw.rectangle((x - 18, y - 18, x + 18, y + 18), series.colour)
    elif series.marker == "diamond":
        draw.polygon((x - 24, y, x, y - 24, x + 24, y, x, y + 24), series.colour)


def draw_series(draw, axes, series):
    ends = series.ends or series.ys
    points = []
    for x, y, end in zip(series.xs, series.ys, ends):
        if abs(y) < LARGEST and abs(end) < LARGEST:
            points.append(axes.point(x, y))
            if series.ends:
                draw.line((points[-1], axes.point(x, end)), series.colour, series.width)
    if series.ends:
        return
    draw_line(draw, points, series)
    for x, y in points:
        draw_marker(draw, x, y, series)


def draw_legend(draw, font, all_series):
    """Draw a sample and the name of each series, in columns below the title -> the lower edge."""
    names = [one_line(series.name) for series in all_series]
    width = max(draw.textlength(name, font) for name in names) + SAMPLE + 90
    n_columns = max(1, int((WIDTH - LEFT) / width))
    y = 120 - ROW / 2
    for i, (series, name) in enumerate(zip(all_series, names)):
        x = LEFT + i % n_columns * width
        if i % n_columns == 0:
            y += ROW
        middle = x + SAMPLE / 2
        piece = [(x, y), (x + SAMPLE, y)]
        if series.ends:
            piece = [(middle, y - 26), (middle, y + 26)]
        draw_line(draw, piece, series)
        draw_marker(draw, middle, y, series)
        draw.text((x + SAMPLE + 24, y), name, BLACK, font, anchor="lm")
    return int(y + ROW / 2)


def one_line(text):
    """Text cut to fit on one line. It keeps the end, which says more if the text is a path."""
    return " ".join(text.split())[-70:]


def chart(path: str | Path, title: str, x_label: str, y_label: str, series: list[Series],
          x_range: tuple[float, float], y_range: tuple[float, float] | None = None,
          marks: dict[float, str] | None = None) -> None:
    """Draw a chart of 1600 × 900 pixels. The first series lies on top of the others.

    x_range and y_range: the values at the edges of the chart. All data must lie within. Without a
    y_range, the chart fits all y, on a log scale if needed. A y that is not finite is left out.
    marks: vertical lines, {x: name}. Raises LavinError if the file cannot be written.
    """
    drawing = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(drawing)
    font = ImageFont.load_default(TEXT)
    draw.text((LEFT, 24), one_line(title), BLACK, ImageFont.load_default(TEXT + 12))
    lower_edge = draw_legend(draw, font, series)
    axes = make_axes(series, x_range, y_range, top=lower_edge + (90 if marks else 40))
    draw_axes(draw, font, axes, x_label, y_label)
    draw_marks(draw, font, axes, marks or {})
    for one in reversed(series):
        draw_series(draw, axes, one)
    picture = drawing.reduce(2)

    def save(temporary):
        picture.save(temporary, format="PNG")

    write_atomically(path, save)
