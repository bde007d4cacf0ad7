"""The built documentation site: complete, whole without a network, and searched from disk."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import needs_chromium, opened

ROOT = Path(__file__).parents[1]
RESULTS = "[...document.querySelectorAll('*')].filter(e => e.shadowRoot?.querySelector('dialog'))[0]?.shadowRoot"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built as `make docs` does, in a copy of what it is made of."""
    copy = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "mkdocs.yml", copy)
    for part in ("docs", "ddpo", "rewards", "trainers"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return copy / "site"


def html(site, page):
    """A page's text without tags, spaces as one."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", (site / page).read_text()))


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    loaded = r'<(?:script|img|iframe|source)[^>]*?\ssrc="([^"]*)"|<link[^>]*?\shref="([^"]*)"'
    found = {one or two for page in pages for one, two in re.findall(loaded, page.read_text())}
    styles = {url for file in site.rglob("*.css") for url in re.findall(r"url\(([^)]*)\)", file.read_text())}
    assert len(pages) > 20 and found
    assert [url for url in found | styles if re.match(r"""["']?(https?:)?//""", url)] == []


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("policy", ["log_prob", "(B,) float64, in nats", "Raises:", "UntraceableError", "(B, *latent)"]),
        ("rewards", ["(B, 3, H, W)", "in [0, 1]", "RewardError"]),
        ("configuration", ["group_size", "learning_rate"]),
        ("training", ["resume", "Returns:"]),
    ],
)
def test_the_reference_shows_shapes_units_and_errors(site, page, said):
    text = html(site, f"reference/{page}.html")
    assert [words for words in said if words not in text] == []


def test_the_search_knows_pages_and_docstrings(site):
    items = json.loads((site / "search.json").read_text())["items"]
    places = {item["location"].partition("#")[0] for item in items if "cost-to-go" in item["text"]}
    assert {"training.html", "reference/objectives.html"} & places
    assert {str(page.relative_to(site)) for page in site.rglob("*.html")} - {"404.html"} <= {
        item["location"].partition("#")[0] for item in items
    }


@needs_chromium
def test_a_page_opened_from_disk_finds_what_is_searched_for(site, tmp_path):
    with opened(tmp_path) as browser:
        browser.call("Page.navigate", url=(site / "index.html").as_uri())
        browser.wait("document.querySelector('.md-search__button') !== null && document.readyState", "complete")
        browser.value("document.querySelector('.md-search__button').click()")
        browser.wait(f"Boolean({RESULTS}?.querySelector('input'))", True)
        browser.call("Input.insertText", text="Lagrangian")
        browser.wait(f"/Several rewards/.test({RESULTS}.querySelector('dialog').innerText)", True)
