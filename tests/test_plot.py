"""The charts: what a reader must find in them, and which inputs must not break them."""

import json
import math

import pytest
from PIL import Image, ImageColor

from extras import evaluate, plot, runs
from extras.plot import BLUE, GREEN, GRID_GREY, LINE_GREY, ORANGE, PALE_BLUE, PALE_ORANGE, Series
from files import LavinError

NAN = float("nan")


def n_pixels(path, colour):
    """The number of pixels of a picture with exactly this colour."""
    picture = Image.open(path)
    counts = {rgb: n for n, rgb in picture.getcolors(picture.width * picture.height)}
    return counts.get(ImageColor.getrgb(colour), 0)


def draw(path, *series, x_range=(0, 10), **more):
    plot.chart(path, "Title", "x", "y", list(series), x_range, **more)
    return path


@pytest.fixture
def chart(tmp_path):
    return tmp_path / "chart.png"


# Ticks and scales


@pytest.mark.parametrize("low, high, n, expected", [
    (0, 10, 12, list(range(11))),
    (0.5, 5.5, 12, [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5]),
    (0, 5000, 12, list(range(0, 5001, 500))),
    (-0.03, 1.03, 8, [0, 0.25, 0.5, 0.75, 1]),
    (-7, 8, 8, [-5, -2.5, 0, 2.5, 5, 7.5]),
    (3e-7, 9e-7, 8, [3e-7, 4e-7, 5e-7, 6e-7, 7e-7, 8e-7, 9e-7]),
])
def test_ticks_are_round_numbers(low, high, n, expected):
    assert plot.ticks(low, high, n) == pytest.approx(expected)


@pytest.mark.parametrize("low, high, expected", [
    (0.01, 3, [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
    (0.0005, 3, [0.001, 0.01, 0.1, 1]),
])
def test_ticks_of_a_log_scale(low, high, expected):
    low += low / 100                    # 10^log10(low) may be smaller than low
    assert plot.log_ticks(math.log10(low), math.log10(high)) == pytest.approx(expected)


def test_ticks_of_a_log_scale_are_few_however_wide_it_is():
    found = plot.log_ticks(-300, 300)
    assert 5 <= len(found) <= 10
    ratios = [b / a for a, b in zip(found, found[1:])]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))


@pytest.mark.parametrize("ys, is_log", [
    ([2.5, 0.1], True),
    ([2.5, 0.3], False),                # a factor of 8
    ([2.5, 0.1, 0.0], False),           # 0 has no place on a log scale
    ([2.5, 0.1, -1.0], False),
    ([2.5, NAN, 1.0, float("inf")], False),
    ([0.0, 0.0], False),
])
def test_the_scale_is_log_where_the_values_ask_for_it(ys, is_log):
    axes = plot.make_axes([Series("a", range(len(ys)), ys, BLUE)], (0, 3), None, top=200)
    assert axes.is_log == is_log
    for y in ys:
        if math.isfinite(y):
            assert 200 < axes.point(0, y)[1] < plot.HEIGHT - plot.BOTTOM


# Lines


def test_size_and_colours(chart):
    xs = range(11)
    draw(chart,
         Series("a", xs, [0.1 * x for x in xs], BLUE),
         Series("b", xs, [1 - 0.1 * x for x in xs], ORANGE, marker="square"),
         Series("c", xs, [0.5] * 11, GREEN, dashed=True, marker="diamond"))
    assert Image.open(chart).size == (1600, 900)
    for colour in (BLUE, ORANGE, GREEN, GRID_GREY):
        assert n_pixels(chart, colour) > 500, colour
    assert n_pixels(chart, PALE_BLUE) == 0


def test_the_first_series_lies_on_top(chart):
    draw(chart, Series("a", [0, 10], [1, 1], BLUE), Series("b", [0, 10], [1, 1], ORANGE))
    assert n_pixels(chart, BLUE) > 5 * n_pixels(chart, ORANGE)      # ORANGE is only in the legend


def test_a_dashed_line_has_gaps(chart):
    solid = Series("a", [0, 10], [1, 1], BLUE)
    n_solid = n_pixels(draw(chart, solid), BLUE)
    dashed = Series("a", [0, 10], [1, 1], BLUE, dashed=True)
    n_dashed = n_pixels(draw(chart, dashed), BLUE)
    assert 0.4 * n_solid < n_dashed < 0.6 * n_solid


@pytest.mark.parametrize("marker", ["circle", "square", "diamond"])
def test_a_marker_is_drawn_at_every_point(chart, marker):
    ys = [1] * 11
    without = n_pixels(draw(chart, Series("a", range(11), ys, BLUE)), BLUE)
    some = n_pixels(draw(chart, Series("a", range(11), ys, BLUE, marker=marker)), BLUE)
    each = (some - without) / 12                                    # 11, and 1 in the legend
    assert 100 < each < 400


def test_what_is_not_finite_is_left_out(chart, tmp_path):
    other = tmp_path / "other.png"
    draw(chart, Series("a", [1, 2, 3, 4, 5], [1, NAN, float("inf"), -1e308, 2], BLUE))
    draw(other, Series("a", [1, 5], [1, 2], BLUE))
    assert chart.read_bytes() == other.read_bytes()
    draw(chart, Series("a", [1, 2], [NAN, NAN], BLUE))              # no point remains


def test_a_single_point_and_a_constant_can_be_seen(chart):
    legend = n_pixels(draw(chart, Series("a", [5], [NAN], BLUE)), BLUE)
    assert n_pixels(draw(chart, Series("a", [5], [3.0], BLUE)), BLUE) > legend + 20
    assert n_pixels(draw(chart, Series("a", [0, 10], [0, 0], BLUE)), BLUE) > legend + 1000


def test_marks_are_vertical_lines(chart):
    series = Series("a", [0, 10], [0, 1], BLUE)
    without = n_pixels(draw(chart, series), LINE_GREY)      # antialiased letters have this grey
    draw(chart, series, marks={2.5: "first", 5: "second"})
    assert n_pixels(chart, LINE_GREY) > without + 2 * 600


def test_names_may_be_anything(chart):
    name = "x" * 10_000 + "\x00\u202e\udcff日本\n\ny"
    series = [Series(name, [0, 1], [0, 1], BLUE), Series("", [0, 1], [1, 0], ORANGE)]
    plot.chart(chart, name, "x", "y", series, (0, 1))
    assert n_pixels(chart, BLUE) > 500 and n_pixels(chart, ORANGE) > 500


def test_a_chart_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "chart.png"
    with pytest.raises(LavinError) as caught:
        draw(path, Series("a", [0, 1], [0, 1], BLUE))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}: cannot be written")


# The two pictures


def write_metrics(out, n_steps, steps_per_epoch, sources=()):
    """Write metrics.jsonl for a run whose loss falls like 1 / step, with noise."""
    lines = []
    for step in range(1, n_steps + 1):
        loss = (1 + 0.3 * math.sin(step ** 2)) / step
        lines.append({"step": step, "epoch": step / steps_per_epoch, "loss": loss})
        if step % steps_per_epoch == 0 and sources:
            lines.append({"step": step, "held_out": dict.fromkeys(sources, 1.5 / step)})
    lines.append({"step": n_steps, "split": "val", "AVG": 50.0})
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_losses_of_a_run(tmp_path):
    write_metrics(tmp_path, n_steps=30, steps_per_epoch=10, sources=["sqa", "jsonl:rows.jsonl"])
    runs.draw_losses(tmp_path)
    for colour in (BLUE, PALE_BLUE, ORANGE, GREEN, LINE_GREY):      # LINE_GREY: epochs' ends
        assert n_pixels(tmp_path / "loss.png", colour) > 500, colour


def test_a_run_that_held_nothing_out_and_ended_no_epoch(tmp_path):
    write_metrics(tmp_path, n_steps=9, steps_per_epoch=10)
    runs.draw_losses(tmp_path)
    assert n_pixels(tmp_path / "loss.png", BLUE) > 500
    for colour in (ORANGE, GREEN, LINE_GREY):
        assert n_pixels(tmp_path / "loss.png", colour) < 100, colour    # few: only edges of letters


def test_many_steps_and_epochs_make_no_large_file(tmp_path):
    write_metrics(tmp_path, n_steps=5000, steps_per_epoch=50, sources=["sqa"])
    runs.draw_losses(tmp_path)
    assert (tmp_path / "loss.png").stat().st_size < 150_000
    assert n_pixels(tmp_path / "loss.png", LINE_GREY) < 12 * 800    # 10 of 100 epochs are marked


def test_the_running_mean_is_over_the_steps_on_both_sides():
    losses = [6.0, 4.0, 2.0, 0.0, 3.0, 13.0]
    mean = runs.loss_series(range(1, 7), losses, {})[0]
    assert mean.name == "mean of 5 steps"
    assert mean.ys == pytest.approx([4.0, 3.0, 3.0, 4.4, 4.5, 16 / 3])


@pytest.mark.parametrize("n_layers", [1, 5, 40])
def test_the_routing_of_a_model(tmp_path, n_layers):
    path = tmp_path / "routing.png"
    evaluate.draw_routing(path, [0.9] * n_layers, [0.2] * n_layers, [0.52] * n_layers,
                          [0.48] * n_layers)
    for colour in (BLUE, ORANGE, PALE_BLUE, PALE_ORANGE):
        assert n_pixels(path, colour) > 50, colour
    assert n_pixels(path, LINE_GREY) > 300 * n_layers               # the lines of the distances
    assert path.stat().st_size < 150_000


def test_modalities_that_are_routed_alike_can_both_be_seen(tmp_path):
    """Without routing, all weights are one half. The squares can be seen under the circles."""
    path = tmp_path / "routing.png"
    visible = []
    for n_layers in (1, 2):
        evaluate.draw_routing(path, *[[0.5] * n_layers] * 4)
        visible.append(n_pixels(path, ORANGE))
    assert visible[1] > visible[0] + 60


def test_the_line_of_distances(capsys):
    evaluate.print_distances([0.9, 0.25, 0.5], [0.2, 0.75, 0.5])
    assert capsys.readouterr().out == (
        "distance between text and picture: 0.700 0.500 0.000 · mean 0.400 · "
        "largest 0.700, layer 1\n")
