"""The architecture figure: the committed file is what the script writes, and nothing sticks out."""

import sys
import xml.etree.ElementTree as ET

from conftest import ROOT
from examples import architecture

SVG = "{http://www.w3.org/2000/svg}"


def test_the_committed_figure_is_what_the_script_writes(tmp_path, monkeypatch, capsys):
    file = tmp_path / "figure.svg"
    monkeypatch.setattr(sys, "argv", ["architecture.py", str(file)])
    architecture.main()
    assert f"written: {file}" in capsys.readouterr().out
    committed = ROOT / "examples" / "architecture.svg"
    assert file.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8"), (
        "run python -m examples.architecture examples/architecture.svg")


def test_all_shapes_lie_within_the_figure():
    figure = ET.fromstring(architecture.draw())
    shapes = figure.findall(f"{SVG}rect")
    assert len(shapes) > 50
    for shape in shapes:
        x = float(shape.get("x", 0))
        y = float(shape.get("y", 0))
        assert 0 <= x and x + float(shape.get("width")) <= architecture.WIDTH
        assert 0 <= y and y + float(shape.get("height")) <= architecture.HEIGHT


def test_the_figure_shows_both_sequences_and_loads_nothing():
    text = architecture.draw()
    for words in ("Image:", "Image: N/A", "f₆", "projector", "router", "down", "up₀", "up₁"):
        assert f">{words}" in text, words
    for forbidden in ("<script", "href", "@import", "url(http"):
        assert forbidden not in text
