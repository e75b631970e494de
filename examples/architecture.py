"""The figure of LaVIN's architecture, written as SVG text.

    python -m examples.architecture examples/architecture.svg

The figure has three panels: the whole model, one of LLaMA's blocks with its router, and an adapter.
Lengths are in pixels. x goes to the right and y goes down. Each drawing function returns one SVG
element as text, or a list of them.
"""

import argparse
from html import escape
from pathlib import Path

from extras.terminal import Parser, run
from files import write_atomically
from vit import ViTConfig

WIDTH = 920
HEIGHT = 566
FILL = {"frozen": "#d9e3ee", "trained": "#ffb45c", "plain": "#ffffff"}
LINE = {"frozen": "#64809f", "trained": "#b35900", "plain": "#6e7781"}
INK = "#1f2328"
FAINT = "#59636e"
STYLE = f"""
text {{ font: 12px Helvetica, Arial, sans-serif; fill: {INK}; text-anchor: middle }}
.title {{ font-weight: bold; font-size: 13px }}
.note {{ font-size: 11px; fill: {FAINT} }}
.weight {{ font-weight: bold; fill: {LINE["trained"]} }}
.left {{ text-anchor: start }}
.right {{ text-anchor: end }}
.panel {{ fill: #f8f9fb; stroke: #d0d7de }}
path {{ fill: none; stroke-width: 1.3 }}
"""


# Elements


def text(x: float, y: float, words: str, style: str = "") -> str:
    """Words on the baseline y.

    x is their middle. With the style "left" it is their start, with "right" their end.
    """
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, kind: str,
              radius: float = 5) -> str:
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f'fill="{FILL[kind]}" stroke="{LINE[kind]}"/>')


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> list[str]:
    """A rectangle with one or two centred lines of text."""
    elements = [rectangle(x, y, width, height, kind)]
    for i, line in enumerate(lines):
        middle = y + height / 2 + 15 * (i - (len(lines) - 1) / 2)
        elements.append(text(x + width / 2, middle + 4, line))
    return elements


def path(*points: tuple[float, float], kind: str = "plain", end: str = "arrow") -> str:
    """A line through the points. end: what is drawn at the last point, "arrow" or "none"."""
    steps = " L ".join(f"{x:g} {y:g}" for x, y in points)
    marker = f' marker-end="url(#{kind})"' if end == "arrow" else ""
    return f'<path d="M {steps}" stroke="{LINE[kind]}"{marker}/>'


def trapezoid(x: float, y: float, width: float, left: float, right: float, words: str) -> list[str]:
    """A trained matrix that changes the width. left, right: its sides' heights. y: its middle."""
    corners = [(x, y - left / 2), (x + width, y - right / 2),
               (x + width, y + right / 2), (x, y + left / 2)]
    points = " ".join(f"{a:g},{b:g}" for a, b in corners)
    shape = (f'<polygon points="{points}" fill="{FILL["trained"]}" stroke="{LINE["trained"]}" '
             'stroke-linejoin="round"/>')
    return [shape, text(x + width / 2, y + 4, words)]


def operation(x: float, y: float, sign: str) -> list[str]:
    """A circle of radius 9 with + or × in it."""
    elements = [f'<circle cx="{x:g}" cy="{y:g}" r="9" fill="#ffffff" stroke="{LINE["plain"]}"/>']
    strokes = f"M {x - 5:g} {y:g} H {x + 5:g} M {x:g} {y - 5:g} V {y + 5:g}"
    turn = f' transform="rotate(45 {x:g} {y:g})"' if sign == "×" else ""
    elements.append(f'<path d="{strokes}" stroke="{INK}"{turn}/>')
    return elements


def panel(x: float, y: float, width: float, height: float, title: str) -> list[str]:
    return [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" '
            'class="panel"/>',
            text(x + 14, y + 23, title, "title left")]


def blocks(x: float, y: float, height: float, n: int, block: float) -> list[str]:
    """n transformer blocks in a row, each `block` wide and with an adapter in front of it."""
    adapter = block / 2
    elements = []
    for i in range(n):
        start = x + i * (adapter + block + 2)
        elements.append(rectangle(start, y, adapter, height, "trained", 1))
        elements.append(rectangle(start + adapter, y, block, height, "frozen", 1))
    return elements


# The whole model

FIRST = 206             # the middle of the first feature's column
COLUMN = 45             # from one feature's column to the next


def columns() -> list[float]:
    """The middle of each feature's column."""
    return [FIRST + COLUMN * i for i in range(ViTConfig().n_features)]


def picture(x: float, y: float) -> list[str]:
    """A drawing of 60 × 60 pixels: hills under a sun."""
    hills = f"{x},{y + 60} {x},{y + 44} {x + 20},{y + 22} {x + 34},{y + 40} "
    hills += f"{x + 44},{y + 30} {x + 60},{y + 48} {x + 60},{y + 60}"
    return [f'<rect x="{x}" y="{y}" width="60" height="60" fill="#e3f1fb"/>',
            f'<circle cx="{x + 44}" cy="{y + 16}" r="7" fill="#f2c94c"/>',
            f'<polygon points="{hills}" fill="#7fb08a"/>',
            f'<rect x="{x}" y="{y}" width="60" height="60" fill="none" '
            f'stroke="{LINE["plain"]}"/>']


def image_encoder() -> list[str]:
    """The picture, CLIP's ViT, the class tokens and the projector."""
    config = ViTConfig()
    elements = picture(84, 74)
    middle = 104
    elements += [
        text(114, 66, "picture"),
        text(FIRST - 40, 66, f"CLIP’s ViT-L/14: {config.layers} blocks; every token of the picture "
             "routes itself", "left"),
        path((144, middle), (FIRST - 40, middle)),
        path((FIRST - 36, middle), (columns()[-1], middle), end="none")]
    for x in columns():
        elements += blocks(x - 40, 74, 60, config.layers // config.n_features, 5)
        elements.append(f'<circle cx="{x}" cy="{middle}" r="2.5" fill="{INK}"/>')
        elements.append(path((x, middle), (x, 150)))
        elements.append(rectangle(x - 11, 150, 22, 16, "plain", 3))
        elements.append(path((x, 166), (x, 182)))
        elements.append(path((x, 208), (x, 230)))
    left = columns()[0] - 20
    right = columns()[-1] + 20
    elements += box(left, 182, right - left, 26, "trained", "projector: Linear → SiLU → Linear")
    elements += [
        text(right + 12, 162, "class token after every 4th block", "left note"),
        text(right + 12, 199, "6 features, brought to LLaMA’s width C", "left note")]
    return elements


def sequences() -> list[str]:
    """LLaMA's two kinds of sequences: with the features of a picture, and without."""
    top = 230
    end = columns()[-1] + 20
    elements = box(84, top, 44, 26, "plain", "BOS")
    elements += box(132, top, 50, 26, "plain", "Image:")
    for i, x in enumerate(columns()):
        elements += box(x - 20, top, 40, 26, "plain", f"f{chr(0x2081 + i)}")
    elements += box(end + 4, top, 80, 26, "plain", "prompt")
    elements += box(end + 88, top, 66, 26, "plain", "answer")
    elements += box(end + 158, top, 44, 26, "plain", "EOS")
    elements += [text(26, top + 11, "text and", "left"), text(26, top + 24, "picture", "left")]

    top = 266
    elements += box(84, top, 44, 26, "plain", "BOS")
    elements += box(132, top, 80, 26, "plain", "Image: N/A")
    elements += box(216, top, 80, 26, "plain", "prompt")
    elements += box(300, top, 66, 26, "plain", "answer")
    elements += box(370, top, 44, 26, "plain", "EOS")
    elements += [text(26, top + 17, "text only", "left"),
                 text(424, top + 17, "the loss counts the answer and EOS", "left note")]
    return elements


def language_model() -> list[str]:
    """The two modality tokens, and LLaMA's blocks. Both streams go through the blocks."""
    start = 706
    upper = 116
    lower = 261
    elements = [
        text(start, 66, "LLaMA: L blocks, two streams", "left"),
        path((662, 102), (672, 102), (672, 130), (662, 130), kind="trained", end="none"),
        path((672, upper), (start, upper), kind="trained"),
        path((662, 231), (672, 231), (672, 291), (662, 291), end="none"),
        path((672, lower), (start, lower)),
        path((start, upper), (start + 125, upper), kind="trained", end="none"),
        path((start, lower), (start + 156, lower))]
    elements += blocks(start, 74, 218, 3, 12)
    elements += blocks(start + 88, 74, 218, 2, 12)
    for y in (upper, lower):
        for i in range(3):
            elements.append(f'<circle cx="{start + 69 + 6 * i}" cy="{y}" r="1.8" fill="{INK}"/>')
    elements += box(560, 90, 102, 24, "trained", "text only")
    elements += box(560, 118, 102, 24, "trained", "text and picture")
    elements += [
        text(611, 82, "modality tokens", "note"),
        text(start + 160, lower - 3, "next", "left note"),
        text(start + 160, lower + 10, "token", "left note")]
    return elements


def legend(x: float, y: float) -> list[str]:
    return [rectangle(x, y, 22, 14, "frozen", 3),
            text(x + 28, y + 11, "frozen", "left"),
            rectangle(x + 86, y, 22, 14, "trained", 3),
            text(x + 114, y + 11, "trained (adapters, routers, projector, modality tokens)",
                 "left")]


# A block and the router


def modality_stream(y: float) -> list[str]:
    """The two modality tokens go through the block, and the router reads them."""
    elements = [
        text(26, y - 22, "the two modality tokens, each a sequence of its own", "left note"),
        rectangle(26, y - 11, 14, 10, "trained", 2),
        rectangle(26, y + 1, 14, 10, "trained", 2),
        path((40, y), (62, y), kind="trained"),
        path((112, y), (216, y), kind="trained"),
        path((164, y), (164, y + 32), kind="trained"),
        path((498, y), (552, y), kind="trained")]
    elements += box(62, y - 14, 50, 28, "frozen", "norm")
    elements += box(216, y - 14, 282, 28, "plain", "the same adapter, attention, feed-forward")
    elements += box(92, y + 32, 144, 40, "trained", "router", "softmax((y W + b) / τ)")
    elements += [
        path((164, y + 72), (164, y + 108), kind="trained"),
        text(498, y + 31, "attending to itself alone: wo(wv(·))", "note right"),
        text(172, y + 95, "w₀, w₁", "weight left"),
        text(220, y + 95, "of the sample’s modality, for all of its tokens", "left note")]
    return elements


def main_stream(y: float) -> list[str]:
    """x + attention(adapter(norm(x))), then x + feed_forward(norm(x))."""
    elements = [
        path((26, y), (62, y)),
        path((112, y), (132, y)),
        path((196, y), (216, y)),
        path((286, y), (305, y)),
        path((323, y), (345, y)),
        path((395, y), (412, y)),
        path((498, y), (514, y)),
        path((532, y), (552, y)),
        path((48, y), (48, y + 34), (314, y + 34), (314, y + 9)),
        path((334, y), (334, y + 34), (523, y + 34), (523, y + 9))]
    elements += box(62, y - 16, 50, 32, "frozen", "norm")
    elements += box(132, y - 16, 64, 32, "trained", "adapter")
    elements += box(216, y - 16, 70, 32, "frozen", "attention")
    elements += operation(314, y, "+")
    elements += box(345, y - 16, 50, 32, "frozen", "norm")
    elements += box(412, y - 16, 86, 32, "frozen", "feed-forward")
    elements += operation(523, y, "+")
    elements.append(text(26, y - 24, "tokens", "left note"))
    return elements


# An adapter


def adapter(x: float, y: float) -> list[str]:
    """`down`, the two experts, their weights, and the residual connection. y is the middle."""
    upper = y - 42
    lower = y + 42
    elements = [
        path((x, y), (x + 32, y)),
        path((x + 76, y), (x + 90, y), end="none"),
        path((x + 90, y), (x + 90, upper), (x + 106, upper)),
        path((x + 90, y), (x + 90, lower), (x + 106, lower)),
        path((x + 150, upper), (x + 169, upper)),
        path((x + 150, lower), (x + 169, lower)),
        path((x + 187, upper), (x + 212, upper), (x + 212, y - 9)),
        path((x + 187, lower), (x + 212, lower), (x + 212, y + 9)),
        path((x + 221, y), (x + 245, y)),
        path((x + 263, y), (x + 284, y)),
        path((x + 14, y), (x + 14, y + 86), (x + 254, y + 86), (x + 254, y + 9)),
        path((x + 178, upper - 30), (x + 178, upper - 9), kind="trained"),
        path((x + 178, lower + 30), (x + 178, lower + 9), kind="trained")]
    elements += trapezoid(x + 32, y, 44, 60, 24, "down")
    elements += trapezoid(x + 106, upper, 44, 24, 60, "up₀")
    elements += trapezoid(x + 106, lower, 44, 24, 60, "up₁")
    elements += operation(x + 178, upper, "×")
    elements += operation(x + 178, lower, "×")
    elements += operation(x + 212, y, "+")
    elements += operation(x + 254, y, "+")
    elements += [
        text(x + 178, upper - 35, "w₀", "weight"),
        text(x + 192, lower + 29, "w₁", "weight"),
        text(x + 4, y - 7, "y"),
        text(x + 83, y - 7, "h"),
        text(x + 232, y - 7, "s", "note"),
        text(x + 54, y + 46, "C → 8", "note"),
        text(x + 128, y + 4, "8 → C", "note")]
    return elements


# The figure


def defs() -> list[str]:
    """The style, and an arrowhead for each line colour that uses one."""
    elements = [f"<style>{STYLE}</style>", "<defs>"]
    for kind in ("plain", "trained"):
        elements.append(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
            'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
            f'<polygon points="0,0.6 8,4 0,7.4" fill="{LINE[kind]}"/></marker>')
    elements.append("</defs>")
    return elements


def draw() -> str:
    """The whole figure, as the text of an SVG file."""
    elements = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">',
        "<title>LaVIN: Mixture-of-Modality Adaptation of LLaMA and CLIP’s ViT</title>"]
    elements += defs()
    # A white background keeps the figure legible on a dark page.
    elements.append(f'<rect width="{WIDTH}" height="{HEIGHT}" rx="14" fill="#ffffff"/>')
    elements += panel(12, 12, 896, 294, "LaVIN")
    elements += legend(440, 25)
    elements += image_encoder()
    elements += sequences()
    elements += language_model()
    elements += panel(12, 318, 560, 236, "One of LLaMA’s blocks, and its router")
    elements += modality_stream(381)
    elements += main_stream(505)
    elements += panel(584, 318, 324, 236, "An adapter")
    elements.append(text(598, 362, "A(y; w) = y + s (w₀ up₀(h) + w₁ up₁(h))", "left"))
    elements.append(text(598, 379, "h = dropout(down(y))", "left note"))
    elements += adapter(602, 456)
    elements.append("</svg>")
    return "\n".join(elements) + "\n"


def main() -> None:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE")
    file = parser.parse_args().file
    write_atomically(file, lambda temporary: temporary.write_text(draw(), encoding="utf-8"))
    print(f"written: {file}")


if __name__ == "__main__":
    run(main)
