"""The labelling page in headless Chromium, driven by the DevTools protocol: keys, buttons, what is on the screen."""

import os
import threading

import pytest
from PIL import Image

from rewards.preferences.labels import LabelSession
from rewards.preferences.pairs import Pair, read_pairs
from rewards.preferences.server import LabelServer
from tests.browser import needs_chromium, opened

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def page(browser, tmp_path):
    """The page open on six pairs, one picture of each reddish, the other bluish."""
    for number in range(12):
        Image.new("RGB", (32, 32), (230 - number, 30, 30) if number % 2 == 0 else (30, 30, 230)).save(
            tmp_path / f"{number}.png"
        )
    pairs = [
        Pair(prompt=f"<b>red {i}</b>", a=tmp_path / f"{2 * i}.png", b=tmp_path / f"{2 * i + 1}.png") for i in range(6)
    ]
    with LabelSession(pairs, tmp_path / "labels.jsonl") as session, LabelServer(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        browser.call("Page.navigate", url=server.address)
        browser.wait("document.body && document.body.dataset.current", "0")
        yield session, tmp_path / "labels.jsonl"
        server.shutdown()
        thread.join()


def labels(path):
    return [pair.label for pair in read_pairs(path, labelled=True)]


def test_keys_record_the_picture_seen_on_that_side(browser, page):
    session, path = page
    for number, key in enumerate(["ArrowLeft", "ArrowRight", "t", "s"]):
        browser.press(key)
        browser.wait("document.body.dataset.current", str(number + 1))
    assert labels(path) == [float(session.a_is_left(0)), float(not session.a_is_left(1)), 0.5]
    assert session.progress().skipped == 1
    browser.wait("document.getElementById('count').textContent", "4 of 6, 1 skipped")
    browser.press("u")
    browser.wait("document.body.dataset.current", "3")
    browser.press("u")
    browser.wait("document.body.dataset.current", "2")
    assert len(labels(path)) == 2


def test_the_picture_that_is_red_on_the_screen_is_the_one_the_label_names(browser, page):
    session, path = page
    if folder := os.environ.get("DDPO_SCREENSHOTS"):
        browser.screenshot().save(f"{folder}/page.png")
    for number in range(6):
        box = browser.value(
            "(r => [r.x + r.width / 2, r.y + r.height / 2])(document.getElementById('left').getBoundingClientRect())"
        )
        red, _, blue = browser.screenshot().convert("RGB").getpixel((int(box[0]), int(box[1])))
        for kind in ("mousePressed", "mouseReleased"):
            browser.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)
        browser.wait("document.body.dataset.current", str(number + 1) if number < 5 else "done")
        assert labels(path)[-1] == float(red > blue)  # picture a is red
    assert browser.value("document.getElementById('done').hidden") is False
    assert set(labels(path)) == {0.0, 1.0}


def test_a_held_key_decides_one_pair_and_a_prompt_is_text_not_html(browser, page):
    session, path = page
    assert browser.value("document.getElementById('prompt').textContent") == "<b>red 0</b>"
    browser.press("ArrowLeft")
    browser.wait("document.body.dataset.current", "1")
    for _ in range(3):
        browser.press("ArrowLeft", repeat=True)
    assert browser.value("document.body.dataset.current") == "1"
    assert len(labels(path)) == 1


def test_a_pair_decided_in_another_window_is_not_decided_again(browser, page):
    session, path = page
    session.choose(0, "tie")
    browser.press("ArrowLeft")
    browser.wait("document.body.dataset.current", "1")
    assert labels(path) == [0.5]
    assert "Already decided" in browser.value("document.getElementById('message').textContent")


def test_resuming_shows_the_first_open_pair(browser, page):
    session, path = page
    session.choose(0, "left")
    browser.call("Page.reload")
    browser.wait("document.body && document.body.dataset.current", "1")
