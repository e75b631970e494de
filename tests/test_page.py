"""page.html in a real browser: Debian's chromium, driven by playwright, where both are installed; else skipped.

    apt install chromium && pip install playwright

As a script, `python tests/test_page.py URL FOLDER` asks a running serve.py about examples/magnets.png and leaves pictures of the
page in FOLDER, at desktop and phone width, light and dark.
"""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright") if __name__ != "__main__" else None
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs Debian's chromium")]
ROOT = Path(__file__).parent.parent
MAGNETS = ROOT / "examples" / "magnets.png"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server():
    """The small world's LLaMA, which needs no adapter to answer in words."""
    import serve
    import tiny
    from model import LaVIN
    lavin = LaVIN.load(tiny.PATHS["llama"], tiny.PATHS["vit"], max_seq_len=128)
    with serve.Server(("127.0.0.1", 0), serve.Desk(lavin, {"max_new_tokens": 12}, False), "tiny") as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def page(browser, server):
    """An open page on which nothing goes wrong unseen."""
    wrong, context = [], browser.new_context()
    page = context.new_page()
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    yield page
    assert wrong == []
    context.close()


def ask(page, question, wait=True):
    page.fill("#question", question)
    page.press("#question", "Enter")
    if wait:
        page.wait_for_selector("#ask:text-is('Ask')")
    return page.locator("#turns .answer").all_inner_texts()


def test_ask_and_follow_up_and_start_over(page):
    first = ask(page, "Which colour is the sky?")
    assert len(first) == 1 and len(first[0]) > 3
    assert len(ask(page, "Why?")) == 2
    assert page.evaluate("turns.length") == 2
    page.click("#reset")
    assert page.locator("#turns .answer").count() == 0 and page.evaluate("turns.length") == 0
    assert ask(page, "Which colour is the sky?") == first                   # nothing is left of what was said before


def test_a_picture_is_shown_asked_about_and_removed(page):
    words = page.locator("#bars").inner_text()
    assert "in words alone" in page.locator("#route").inner_text() and page.locator("#bars div").count() == 5
    page.set_input_files("#file", MAGNETS)
    page.wait_for_selector("#picture", state="visible")
    assert "with a picture" in page.locator("#route").inner_text() and page.locator("#bars").inner_text() != words
    assert len(ask(page, "Will these magnets attract or repel each other?")) == 1
    page.click("#remove")
    assert page.locator("#picture").is_hidden() and page.locator("#turns .answer").count() == 0


def test_dropping_a_file(page):
    page.evaluate("""() => {
        const transfer = new DataTransfer();
        transfer.items.add(new File(["no picture"], "x.png", { type: "image/png" }));
        document.querySelector("#drop").dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
    }""")
    page.wait_for_selector("#remove", state="visible")                      # taken, though it is no picture
    ask(page, "What is it?")
    assert "not a picture" in page.locator("#turns .error").inner_text()


def test_a_file_that_is_too_large(page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(15_000_000))
    page.set_input_files("#file", large)
    assert "larger than 14 MB" in page.locator("#turns .error").inner_text() and page.locator("#picture").is_hidden()


def test_text_is_text(page):
    ask(page, "<b id=evil>bold</b>")
    assert page.locator("#evil").count() == 0 and "<b id=evil>" in page.locator("#turns .asked").inner_text()


def test_a_second_tab_waits_and_is_told(page, server, browser, monkeypatch):
    from decode import Decoder
    go_on, step = threading.Event(), Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda d, ids: go_on.wait(20) and step(d, ids))
    ask(page, "Which colour is the sky?", wait=False)
    while not server.desk.queue.waiting:
        time.sleep(0.01)
    other = browser.new_page()
    other.goto(page.url)
    ask(other, "Why?", wait=False)
    other.wait_for_selector("text=1 other comes first")
    go_on.set()
    for tab in (page, other):
        tab.wait_for_selector("#ask:text-is('Ask')")
        assert tab.locator("#turns .answer").count() == 1 and tab.locator("#turns .error").count() == 0
    other.close()


def test_stop(page, server, monkeypatch):
    from decode import Decoder
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda d, ids: time.sleep(0.3) or step(d, ids))
    ask(page, "Which colour is the sky?", wait=False)
    page.wait_for_selector("#turns .answer:not(:text-is('…'))")
    page.click("#ask")
    page.wait_for_selector("text=(stopped)")
    assert page.evaluate("turns.length") == 1 and page.locator("#ask").inner_text() == "Ask"


def test_a_server_that_has_gone(page, server):
    page.route("**/ask", lambda route: route.abort())
    ask(page, "Which colour is the sky?")
    assert "cannot be reached" in page.locator("#turns .error").inner_text()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window_and_text_can_be_read(page, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.set_input_files("#file", MAGNETS)
    ask(page, "Why " + "so" * 200 + "?")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    contrast = page.evaluate("""() => {
        const light = colour => colour.match(/\\d+/g).slice(0, 3).map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), style = id => getComputedStyle(document.querySelector(id));
        const card = light(style("#talk").backgroundColor);
        return [ratio(light(style("#turns").color), card), ratio(light(style("#hint").color), card), ratio(light(style("#ask").color), light(style("#ask").backgroundColor))];
    }""")
    assert min(contrast) >= 4.5, contrast                                   # WCAG AA


def pictures(url, folder):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, width, height in (("desktop", 1000, 640), ("phone", 390, 800)):
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                page.goto(url)
                page.set_input_files("#file", MAGNETS)
                page.wait_for_selector("#picture", state="visible")
                ask(page, "Will these magnets attract or repel each other?")
                page.screenshot(path=Path(folder, f"{name}-{scheme}.png"))


if __name__ == "__main__":
    pictures(*sys.argv[1:])
