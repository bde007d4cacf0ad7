"""docs/rewards.md shows the catalogue as the cards have it."""

import re
from pathlib import Path

from rewards import registry
from rewards.tools.cli import catalogue
from trainers.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_the_page_holds_the_catalogue_of_today():
    text = PAGE.read_text(encoding="utf-8")
    assert f"\n{catalogue()}\n" in text, "run `ddpo rewards list --markdown` and put the table into docs/rewards.md"


def test_the_catalogue_has_a_full_row_for_every_reward(capsys):
    assert main(["rewards", "list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert [row[0].strip("`") for row in cells[2:]] == sorted(registry.BUILT_IN)
    for name, *_, licence, origin in cells[2:]:
        assert licence and origin, name


def test_the_catalogue_does_not_depend_on_what_is_installed(monkeypatch):
    before = catalogue()
    monkeypatch.setattr("rewards.card.installed", lambda module: False)
    monkeypatch.setenv("PATH", "")
    assert catalogue() == before
