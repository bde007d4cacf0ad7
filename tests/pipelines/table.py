"""The table of docs/models.md: a line a pipeline, and how many became what."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.pipelines.build import Row
from tests.pipelines.outcomes import KINDS, Outcome

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- pipelines: begin -->", "<!-- pipelines: end -->"
GROUPS = {
    "image": "Text to image", "video": "Text to video", "edit": "Editing and control",
    "image to video": "Image to video", "nothing": "Without prompts",
}  # fmt: skip


def table(rows: Sequence[Row], found: Mapping[str, Outcome], *, version: str) -> str:
    """The section that stands between the markers.

    Args:
        rows: What was tried.
        found: What became of them, by title.
        version: Of diffusers.
    """
    groups = "\n\n".join(_group(group, rows, found) for group in GROUPS if any(row.group == group for row in rows))
    return f"{summary(rows, found, version=version)}\n\n{groups}"


def summary(rows: Sequence[Row], found: Mapping[str, Outcome], *, version: str) -> str:
    """One sentence of counts."""
    counts = [f"{count} {kind}" for kind, count in count_kinds(found[row.title] for row in rows).items() if count]
    return f"Of {len({row.pipeline for row in rows})} classes in {len(rows)} settings (diffusers {version}): " \
           f"{', '.join(counts)}."  # fmt: skip


def count_kinds(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """How many rows are of each kind; a row of which one run works and another does not is `works in part`."""
    counts = dict.fromkeys((KINDS[0], "works in part", *KINDS[1:]), 0)
    for each in outcomes:
        worst = max(each.kinds, key=KINDS.index)
        counts["works in part" if worst == "refused" and "works" in each.kinds else worst] += 1
    return counts


def _group(group: str, rows: Sequence[Row], found: Mapping[str, Outcome]) -> str:
    lines = [f"| {GROUPS[group]} | with guidance | without |", "|---|---|---|"]
    for row in rows:
        if row.group == group:
            each = found[row.title]
            lines.append(f"| {row.title} | {each.guided} | {_shortened(each)} |")
    return "\n".join(lines)


def _shortened(each: Outcome) -> str:
    """The text of the run without guidance, which may be that of the other."""
    return "the same" if each.guided == each.unguided != "works" else each.unguided


def replaced_section(text: str, section: str) -> str:
    """A document with this section between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{BEGIN} and {END} stand in the document"
    return f"{before}{BEGIN}\n{section}\n{END}{after}"
