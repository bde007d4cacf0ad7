"""The documentation: pages are in the navigation, links lead somewhere, public names are described."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

import ddpo
import rewards
from trainers import config

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]


class SiteLoader(yaml.SafeLoader):
    """Reads the site's configuration; what it says of Python functions is left unread."""


SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
SITE = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=SiteLoader)


def name(path):
    return str(path.relative_to(ROOT))


def pages_of(entry):
    """The pages below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    parts = entry if isinstance(entry, list) else list(entry.values())
    return [page for part in parts for page in pages_of(part)]


def prose(text):
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE))


def anchors(text):
    """The anchors of a page's headings, as GitHub and the site make them."""
    lines = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#{1,6} ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def broken(path, text):
    """The links of a page, written relative to it, that lead nowhere."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        goal = (path.parent / file).resolve() if file else path
        if (file and not goal.exists()) or (anchor and anchor not in anchors(goal.read_text() if file else text)):
            yield target


def documented():
    """`(name on its page, object)` of all that the reference shows."""
    for page in sorted((DOCS / "reference").glob("*.md")):
        for block in re.split(r"^::: ", page.read_text(), flags=re.MULTILINE)[1:]:
            dotted = block.split()[0]
            members = re.search(r"members: \[(.*)\]", block)
            if members:
                module = importlib.import_module(dotted)
                yield from ((f"{dotted}.{member}", getattr(module, member)) for member in members[1].split(", "))
            else:
                module, _, last = dotted.rpartition(".")
                yield dotted, getattr(importlib.import_module(module), last)


REFERENCE = dict(documented())


def described_arguments(thing):
    """The arguments that a reader must know and those that the docstrings describe."""
    if dataclasses.is_dataclass(thing):
        wanted = [field.name for field in dataclasses.fields(thing) if field.init and field.name != "kind"]
        text = inspect.getdoc(thing) or ""
    else:
        function = thing if inspect.isfunction(thing) else thing.__init__
        signature = inspect.signature(function) if inspect.isfunction(function) else inspect.Signature()
        wanted = [argument for argument in signature.parameters if argument not in ("self", "args", "kwargs")]
        text = (inspect.getdoc(thing) or "") + "\n" + (inspect.getdoc(function) or "")
    return wanted, [word for word in wanted if re.search(rf"^\s+{word}:", text, flags=re.MULTILINE)]


def test_the_navigation_lists_every_page_once():
    listed = pages_of(SITE["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_every_internal_link_leads_to_a_file_and_a_heading(path):
    assert not list(broken(path, path.read_text()))


def test_pages_of_the_site_link_to_pages_of_the_site_alone():
    outside = [
        f"{name(path)}: {target}"
        for path in PAGES
        for target in re.findall(r"\]\(([^)\s#]+)", prose(path.read_text()))
        if "://" not in target and not (path.parent / target).resolve().is_relative_to(DOCS)
    ]
    assert not outside


def test_the_check_sees_a_missing_page_and_a_missing_heading():
    text = (
        "# One\n[a](#one) [b](#two) [c](training.md#algorithms) [d](training.md#no-such-heading) "
        "[e](none.md) `[f](none.md)`"
    )
    assert list(broken(DOCS / "new.md", text)) == ["#two", "training.md#no-such-heading", "none.md"]


@pytest.mark.parametrize("package", [ddpo, rewards, config], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package):
    shown = {id(thing) for thing in REFERENCE.values()}
    assert [public for public in package.__all__ if id(getattr(package, public)) not in shown] == []


@pytest.mark.parametrize("dotted", REFERENCE)
def test_what_the_reference_shows_is_described_with_all_its_arguments(dotted):
    thing = REFERENCE[dotted]
    wanted, described = described_arguments(thing)
    assert inspect.getdoc(thing)
    assert described == wanted
