"""The table of docs/models.md is what `python -m tests.pipelines --docs` writes, and its rows in short."""

import re
from collections import Counter

import pytest

from tests.pipelines.build import Row
from tests.pipelines.outcomes import BUGS, KINDS, Outcome, kind_of, outcome
from tests.pipelines.rows import ROWS
from tests.pipelines.table import BEGIN, DOCS, END, count_kinds, replaced_section, table

QUICK = (
    "StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "QwenImage", "Wan", "WanImageToVideo",
    "FluxFill", "FluxControl", "StableDiffusionInpaint", "StableDiffusionControlNet", "FluxKontextInpaint",
)  # fmt: skip


def documented() -> dict[str, tuple[str, str]]:
    """The cells of the table, by title."""
    section = DOCS.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")]
    cells = {title[2:]: (guided, unguided.removesuffix(" |")) for title, guided, unguided in lines}
    return {title: found for title, found in cells.items() if found != ("with guidance", "without")}


def test_the_documented_table_has_every_row_once_and_no_bug():
    found = documented()
    assert list(found) == [row.title for group in dict.fromkeys(row.group for row in ROWS) for row in ROWS
                           if row.group == group]  # fmt: skip
    kinds = Counter(kind_of(cell) for cells in found.values() for cell in cells if cell and cell != "the same")
    assert set(kinds) <= set(KINDS) - set(BUGS)
    assert len({row.pipeline for row in ROWS}) >= 45 and kinds["works"] > 90


def test_the_documented_counts_are_those_of_its_rows():
    outcomes = [
        Outcome(title=title, guided=guided, unguided=guided if other == "the same" else other, load_seconds=0.0)
        for title, (guided, other) in documented().items()
    ]
    (line,) = re.findall(r"^Of .* classes in .*$", DOCS.read_text(), flags=re.M)
    counts = [f"{count} {kind}" for kind, count in count_kinds(outcomes).items() if count]
    assert line.endswith(f": {', '.join(counts)}.") and re.search(r"\(diffusers \d+\.\d+\.\d+\)", line)


def test_a_refusal_of_both_runs_is_written_once_and_replaces_the_old_section():
    rows = [Row(pipeline="OnePipeline"), Row(pipeline="TwoPipeline")]
    found = {
        "One": Outcome(title="One", guided="works", unguided="refused: a reason", load_seconds=1.0),
        "Two": Outcome(title="Two", guided="refused: b", unguided="refused: b", load_seconds=1.0),
    }
    text = replaced_section(f"before\n{BEGIN}\nold\n{END}\nafter", table(rows, found, version="1.2.3"))
    assert text.splitlines() == [
        "before", BEGIN, "Of 2 classes in 2 settings (diffusers 1.2.3): 1 works in part, 1 refused.", "",
        "| Text to image | with guidance | without |", "|---|---|---|", "| One | works | refused: a reason |",
        "| Two | refused: b | the same |", END, "after",
    ]  # fmt: skip


@pytest.mark.parametrize("row", [row for row in ROWS if row.title in QUICK], ids=lambda row: row.title)
def test_what_becomes_of_a_pipeline_is_what_the_table_says(row):
    guided, unguided = documented()[row.title]
    made = outcome(row)
    assert (made.guided, made.unguided) == (guided, guided if unguided == "the same" else unguided)
