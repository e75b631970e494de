"""The page in a real browser: Debian's chromium, driven by playwright. Skipped without them.

    apt install chromium && pip install playwright

As a script, `python tests/test_page.py URL FOLDER` asks a running `python generate.py --serve`
about examples/magnets.png. It saves screenshots of the page in FOLDER: desktop and phone, light and
dark.
"""

import base64
import math
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MAGNETS = Path(__file__).parent.parent / "examples" / "magnets.png"
FLAGS = [
    "--no-sandbox",             # chromium needs it to run as root
    "--host-resolver-rules=MAP other.test 127.0.0.1",
]

if __name__ != "__main__":
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium"),
]

DROP_A_FILE = """() => {
  const transfer = new DataTransfer();
  transfer.items.add(new File(["no picture"], "x.png", { type: "image/png" }));
  const event = new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.querySelector("#drop").dispatchEvent(event);
}"""

# The contrast of texts with their backgrounds, as WCAG defines it.
CONTRASTS = """() => {
  const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const luminance = colour => {
    const [r, g, b] = colour.match(/\\d+/g).slice(0, 3).map(c => linear(c / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const style = id => getComputedStyle(document.querySelector(id));
  const card = style("#talk").backgroundColor;
  const button = style("#reset").backgroundColor;
  return [
    contrast(style("#shelf-title").color, style("body").backgroundColor),
    contrast(style("#reset").color, button),
    contrast(style("#turns").color, card),
    contrast(style("#hint").color, card),
    contrast(style("#ask").color, style("#ask").backgroundColor),
  ];
}"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def server():
    """A server with the small world's LLaMA, which answers text questions without an adapter."""
    import checkpoints
    from extras import serve
    from tiny import world

    lavin = checkpoints.load(world.PATHS["llama"], world.PATHS["vit"], max_seq_len=128)
    with serve.listen("127.0.0.1", 0, "tiny") as server:
        server.desk = serve.Desk(lavin, {"max_new_tokens": 12}, compiled=False)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def page(browser, server):
    """An open page. The test fails if a script on the page raises an error."""
    errors = []
    context = browser.new_context(has_touch=True)
    page = context.new_page()

    def on_error(error):
        errors.append(str(error))

    page.on("pageerror", on_error)
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    yield page
    assert errors == []
    context.close()


@pytest.fixture
def world_page(page, server):
    """The small world's page, which has a shelf and a drawing pad."""
    from tiny import shelf, world

    server.colours = world.COLOURS
    server.examples = shelf.examples()
    page.reload()
    page.wait_for_selector("#pad", state="visible")
    return page


@pytest.fixture
def asked(monkeypatch):
    """[(question, turns, pixels), …] in the order in which the desk gets them."""
    from extras import serve

    asked = []
    say = serve.Desk.say

    def noted_say(desk, question, turns, pixels):
        asked.append((question, turns, pixels))
        yield from say(desk, question, turns, pixels)

    monkeypatch.setattr(serve.Desk, "say", noted_say)
    return asked


def ask(page, question, wait=True):
    """Ask a question -> the texts of all answers on the page."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector("#ask:text-is('Ask')")
    return page.locator("#turns .answer").all_inner_texts()


def error_text(page):
    return page.locator("#turns .error").inner_text()


def test_ask_and_follow_up_and_start_over(page):
    assert page.get_attribute("#question", "placeholder") and page.input_value("#question") == ""
    first = ask(page, "Which colour is the sky?")
    assert len(first) == 1 and len(first[0]) > 3
    assert len(ask(page, "Why?")) == 2
    assert page.evaluate("turns.length") == 2
    page.click("#reset")
    assert page.locator("#turns .answer").count() == 0
    assert page.evaluate("turns.length") == 0
    assert ask(page, "Which colour is the sky?") == first       # the earlier turns have no effect


def test_a_picture_is_shown_asked_about_and_removed(page):
    page.wait_for_selector("#bars div")
    in_words = page.locator("#bars").inner_text()
    assert "text only" in page.locator("#route").inner_text()
    assert page.locator("#bars div").count() == 5
    page.set_input_files("#file", MAGNETS)
    page.wait_for_selector("#picture", state="visible")
    assert "with a picture" in page.locator("#route").inner_text()
    assert page.locator("#bars").inner_text() != in_words
    assert len(ask(page, "Will these magnets attract or repel each other?")) == 1
    page.click("#remove")
    assert page.locator("#picture").is_hidden()
    assert page.locator("#turns .answer").count() == 0


def test_dropping_a_file(page):
    page.evaluate(DROP_A_FILE)
    page.wait_for_selector("#remove", state="visible")          # taken, though not a picture
    ask(page, "What is it?")
    assert "not a picture" in error_text(page)


def test_a_file_that_is_too_large(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(15_000_000))
    page.set_input_files("#file", large)
    assert "larger than 14 MB" in error_text(page)
    assert page.locator("#picture").is_hidden()


def test_text_is_text(page):
    ask(page, "<b id=evil>bold</b>")
    assert page.locator("#evil").count() == 0
    assert "<b id=evil>" in page.locator("#turns .asked").inner_text()


def test_a_second_tab_waits_and_is_told(page, server, browser, held_steps):
    from conftest import wait_until

    ask(page, "Which colour is the sky?", wait=False)
    wait_until(lambda: server.desk.queue.waiting)
    other = browser.new_page()
    other.goto(page.url)
    ask(other, "Why?", wait=False)
    other.wait_for_selector("text=1 question is ahead of yours")
    held_steps.set()
    for tab in (page, other):
        tab.wait_for_selector("#ask:text-is('Ask')")
        assert tab.locator("#turns .answer").count() == 1
        assert tab.locator("#turns .error").count() == 0
    other.close()


def test_stop(page, monkeypatch):
    from fast.engine import Engine

    step = Engine.step

    def slow_step(engine, ids):
        time.sleep(0.3)
        return step(engine, ids)

    monkeypatch.setattr(Engine, "step", slow_step)
    ask(page, "Which colour is the sky?", wait=False)
    page.wait_for_selector("#turns .answer:not(:text-is('…'))")
    page.click("#ask")
    page.wait_for_selector("text=(stopped)")
    assert page.evaluate("turns.length") == 1
    assert page.locator("#ask").inner_text() == "Ask"


def test_turns_that_do_not_fit_are_reported_and_not_sent_again(page):
    for _ in range(12):
        ask(page, "Which colour is the sky, and which colour is the grass?")
    notes = page.locator("#turns .note").all_inner_texts()
    assert any("no longer fit the model's context" in note for note in notes)
    assert 0 < page.evaluate("turns.length") < 12


def test_a_server_that_is_busy(page, monkeypatch):
    from extras import serve

    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 0)
    ask(page, "Which colour is the sky?")
    assert "too many connections" in error_text(page)


def test_no_page_can_show_ours_in_a_frame(page, browser):
    assert page.locator("#ask").count() == 1
    other = browser.new_page()
    other.set_content(f"<iframe src='{page.url}'></iframe>", wait_until="load")
    assert other.frames[1].locator("#ask").count() == 0
    other.close()


def test_a_site_whose_name_leads_to_this_machine_is_refused(browser, server):
    other = browser.new_page()
    response = other.goto(f"http://other.test:{server.server_port}/")
    assert response.status == 421 and "not by 'other.test" in other.content()
    other.close()


def test_a_server_that_has_gone(page):
    def abort(route):
        route.abort()

    page.route("**/ask", abort)
    ask(page, "Which colour is the sky?")
    assert "cannot be reached" in error_text(page)


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_can_be_read(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.set_input_files("#file", MAGNETS)
    ask(page, "Why " + "so" * 200 + "?")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    contrasts = page.evaluate(CONTRASTS)
    assert min(contrasts) >= 4.5, contrasts                     # WCAG AA


# The drawing pad


GROUND = (248, 248, 248)
N_DRAWN = """ink.getImageData(0, 0, 128, 128).data
  .filter((channel, i) => i % 4 === 1 && channel < 144).length"""
# The area of a stamp, in squares whose side is the distance from its centre to its edge.
AREAS = {
    "circle": math.pi,
    "square": 4,
    "triangle": 3 * 1.15**2 * math.sin(math.radians(120)) / 2,
    "star": 10 * 1.15 * 0.45 * math.sin(math.radians(36)) / 2,
    "cross": 4 * 0.66 - 0.66**2,
}


def choose(page, tool, colour):
    page.get_by_label(tool, exact=True).check()
    page.get_by_label(colour, exact=True).check()


def on_screen(page, x, y):
    """The position of the canvas's pixel (x, y) in the window."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    return box["x"] + x * box["width"] / 128, box["y"] + y * box["height"] / 128


def click(page, x, y):
    page.mouse.click(*on_screen(page, x, y))


def drag(page, start, end):
    page.mouse.move(*on_screen(page, *start))
    page.mouse.down()
    page.mouse.move(*on_screen(page, *end), steps=5)
    page.mouse.up()


def colour_at(page, x, y):
    """The colour (red, green, blue) of the canvas's pixel (x, y)."""
    pixel = page.evaluate(f"[...ink.getImageData({x}, {y}, 1, 1).data]")
    return tuple(pixel[:3])


def n_drawn(page):
    """The number of canvas pixels that are closer to red than to the background: little green."""
    return page.evaluate(N_DRAWN)


def sees(page, asked):
    """Did the last question come with the current drawing?"""
    import torch

    from extras import serve

    drawing = page.evaluate("drawing()").removeprefix("data:image/png;base64,")
    pixels = asked[-1][2]
    return torch.equal(pixels, serve.read_picture(drawing, pixels.shape[-1]))


def wait_for_answer(page):
    page.wait_for_selector("#ask:text-is('Ask')")


def test_there_is_a_stamp_for_each_shape(world_page):
    from tiny import world

    for shape in world.SHAPES:
        choose(world_page, shape, "red")
        click(world_page, 64, 64)
        assert colour_at(world_page, 64, 64) == world.COLOURS["red"]
        area = AREAS[shape] * 13**2
        assert abs(n_drawn(world_page) - area) < 0.1 * area, shape
        world_page.click("#clear")
        assert n_drawn(world_page) == 0


def test_a_stamp_follows_until_it_is_let_go(world_page):
    from tiny import world

    choose(world_page, "star", "purple")
    drag(world_page, (30, 30), (90, 90))
    assert colour_at(world_page, 30, 30) == GROUND
    assert colour_at(world_page, 90, 90) == world.COLOURS["purple"]


def test_brush_and_bar_and_eraser(world_page):
    from tiny import world

    choose(world_page, "brush", "blue")
    click(world_page, 20, 20)
    drag(world_page, (20, 100), (110, 100))
    for x, y in ((20, 20), (20, 100), (65, 100), (110, 100)):
        assert colour_at(world_page, x, y) == world.COLOURS["blue"]
    choose(world_page, "bar", "green")
    drag(world_page, (50, 60), (70, 30))
    for x, y in ((52, 32), (68, 58)):
        assert colour_at(world_page, x, y) == world.COLOURS["green"]
    assert colour_at(world_page, 60, 64) == GROUND
    click(world_page, 100, 40)
    for y in (16, 64):
        assert colour_at(world_page, 100, y) == world.COLOURS["green"]
    choose(world_page, "brush", "eraser")
    drag(world_page, (65, 90), (65, 110))
    assert colour_at(world_page, 65, 100) == GROUND
    assert colour_at(world_page, 30, 100) == world.COLOURS["blue"]


def test_undo_and_clear(world_page):
    click(world_page, 30, 30)
    click(world_page, 90, 90)
    world_page.click("#clear")
    assert colour_at(world_page, 30, 30) == colour_at(world_page, 90, 90) == GROUND
    world_page.click("#undo")
    assert colour_at(world_page, 90, 90) != GROUND
    world_page.click("#undo")
    assert colour_at(world_page, 30, 30) != GROUND and colour_at(world_page, 90, 90) == GROUND
    world_page.click("#undo")
    world_page.click("#undo")                                   # there is nothing more to undo
    assert n_drawn(world_page) == 0


def test_drawing_with_the_keyboard(world_page):
    from tiny import world

    world_page.get_by_label("red", exact=True).focus()
    world_page.keyboard.press("ArrowRight")                     # to the next colour
    world_page.focus("#canvas")
    world_page.keyboard.press("ArrowLeft")
    assert world_page.locator("#pen").is_visible()
    for _ in range(4):
        world_page.keyboard.press("ArrowLeft")
        world_page.keyboard.press("ArrowDown")
    world_page.keyboard.press("Enter")
    assert colour_at(world_page, 64 - 20, 64 + 16) == world.COLOURS["green"]


def test_drawing_with_a_finger(world_page):
    world_page.set_viewport_size({"width": 390, "height": 800})
    world_page.touchscreen.tap(*on_screen(world_page, 30, 30))
    assert colour_at(world_page, 30, 30) != GROUND
    choose(world_page, "brush", "red")
    start = on_screen(world_page, 20, 60)
    end = on_screen(world_page, 20, 110)
    scrolled = world_page.evaluate("scrollY")
    fingers = world_page.context.new_cdp_session(world_page)
    for kind, places in (("touchStart", [start]), ("touchMove", [end]), ("touchEnd", [])):
        points = [{"x": x, "y": y} for x, y in places]
        fingers.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    for y in (60, 85, 110):
        assert colour_at(world_page, 20, y) != GROUND
    assert world_page.evaluate("scrollY") == scrolled           # the touch drew, without scrolling


def test_asking_about_the_drawing(world_page, asked):
    world_page.click("#ask-drawing")
    assert "You have not drawn anything yet" in error_text(world_page) and not asked
    click(world_page, 30, 30)
    world_page.click("#ask-drawing")
    wait_for_answer(world_page)
    assert asked[-1][:2] == ("Which shape is there?", []) and sees(world_page, asked)
    assert world_page.locator("#turns .answer").count() == 1
    assert world_page.locator("#picture").is_visible()
    click(world_page, 90, 90)
    world_page.fill("#question", "How many things are there?")
    world_page.click("#ask-drawing")
    wait_for_answer(world_page)
    assert asked[-1][:2] == ("How many things are there?", []) and sees(world_page, asked)
    assert world_page.input_value("#question") == ""


def test_a_question_means_the_picture_that_came_last(world_page, asked):
    click(world_page, 30, 30)
    ask(world_page, "Which colour is there?")
    assert sees(world_page, asked)
    ask(world_page, "Why?")
    assert sees(world_page, asked) and len(asked[-1][1]) == 1   # same drawing, next turn
    click(world_page, 90, 90)
    world_page.set_input_files("#file", MAGNETS)
    world_page.wait_for_function("image && image.length > 0 && turns.length === 0")
    ask(world_page, "Will these magnets attract or repel each other?")
    assert not sees(world_page, asked)
    world_page.click("#remove")
    ask(world_page, "Which colour is the sky?")
    assert asked[-1][2] is None


# The shelf


def test_a_click_asks_about_a_picture_of_the_shelf(world_page, server, asked):
    import torch

    from extras import serve

    assert world_page.locator("#examples button").count() == len(server.examples)
    for i in (1, 2):
        world_page.locator("#examples button").nth(i).click()
        wait_for_answer(world_page)
        question, turns, pixels = asked[-1]
        example = server.examples[i]
        assert (question, turns) == (example["question"], [])
        assert torch.equal(pixels, serve.read_picture(example["picture"], pixels.shape[-1]))
        assert world_page.locator("#turns .asked").all_inner_texts() == [question]
        shown = world_page.get_attribute("#picture", "src")
        assert base64.b64decode(shown.partition(",")[2]) == base64.b64decode(example["picture"])


def test_another_model_has_neither_pad_nor_shelf(page):
    page.wait_for_selector("#bars div")
    assert page.locator("#ask").is_visible()
    assert page.locator("#pad").is_hidden() and page.locator("#shelf").is_hidden()


@pytest.mark.parametrize("width", [1366, 1000, 800, 720, 390, 320])
def test_pad_and_shelf_fit_the_window(world_page, width):
    world_page.set_viewport_size({"width": width, "height": 800})
    click(world_page, 30, 30)
    world_page.click("#ask-drawing")
    wait_for_answer(world_page)
    assert world_page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    pad = world_page.locator("#pad").bounding_box()
    talk = world_page.locator("#talk").bounding_box()
    is_one_column = pad["x"] == talk["x"]
    assert is_one_column == (width <= 720)


def take_pictures(url, folder):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, width, height in (("desktop", 1000, 820), ("phone", 390, 800)):
            for scheme in ("light", "dark"):
                viewport = {"width": width, "height": height}
                page = browser.new_page(viewport=viewport, color_scheme=scheme)
                page.goto(url)
                page.set_input_files("#file", MAGNETS)
                page.wait_for_selector("#picture", state="visible")
                ask(page, "Will these magnets attract or repel each other?")
                page.screenshot(path=Path(folder, f"{name}-{scheme}.png"))


if __name__ == "__main__":
    _, url, folder = sys.argv
    take_pictures(url, folder)
