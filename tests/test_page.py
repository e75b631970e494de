"""The page in a real browser: Debian's chromium, driven by playwright. Skipped without both.

    apt install chromium && pip install playwright

As a script, `python tests/test_page.py URL FOLDER` asks a running `python generate.py --serve`
about examples/magnets.png. It leaves pictures of the page in FOLDER: desktop and phone, light and
dark.
"""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MAGNETS = Path(__file__).parent.parent / "examples" / "magnets.png"
FLAGS = [
    "--no-sandbox",             # as root, chromium starts in no other way
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

# WCAG's contrast of the texts with what is behind them.
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
  return [
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
    """The small world's LLaMA, which needs no adapter to answer in words."""
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
    """An open page. The test fails if a script on it has."""
    errors = []
    context = browser.new_context()
    page = context.new_page()

    def on_error(error):
        errors.append(str(error))

    page.on("pageerror", on_error)
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    yield page
    assert errors == []
    context.close()


def ask(page, question, wait=True):
    """Ask -> the texts of all answers on the page."""
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
    assert ask(page, "Which colour is the sky?") == first       # nothing is left of what was said


def test_a_picture_is_shown_asked_about_and_removed(page):
    page.wait_for_selector("#bars div")
    in_words = page.locator("#bars").inner_text()
    assert "in words alone" in page.locator("#route").inner_text()
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
    page.wait_for_selector("#remove", state="visible")          # taken, though it is no picture
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
    ask(page, "Which colour is the sky?", wait=False)
    while not server.desk.queue.waiting:
        time.sleep(0.01)
    other = browser.new_page()
    other.goto(page.url)
    ask(other, "Why?", wait=False)
    other.wait_for_selector("text=1 other comes first")
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


def test_turns_that_do_not_fit_are_told_and_not_sent_again(page):
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


def take_pictures(url, folder):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, width, height in (("desktop", 1000, 640), ("phone", 390, 800)):
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
