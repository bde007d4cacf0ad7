"""Builds tiny pipelines of diffusers' classes, holds each to `ddpo check`, and prints what becomes of it.

    python -m tests.pipelines [--only NAME ...] [--group GROUP] [--results FILE] [--seconds S] [--docs]

Rows that a results file has, of this version of diffusers, are not run again; `--docs` writes the table of
docs/models.md when all are there. The status is 1 where a row is wrong or raw.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import diffusers

from tests.pipelines.build import Row
from tests.pipelines.outcomes import BUGS, Outcome, outcome
from tests.pipelines.rows import ROWS
from tests.pipelines.table import DOCS, GROUPS, replaced_section, summary, table


def read(path: Path | None) -> dict[str, Outcome]:
    """The outcomes of an earlier run under this version of diffusers, by title."""
    lines = path.read_text().splitlines() if path and path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {
        entry["title"]: Outcome(**{key: value for key, value in entry.items() if key != "diffusers"})
        for entry in entries
        if entry["diffusers"] == diffusers.__version__
    }


def chosen(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for."""
    named = [row for row in ROWS if not options.only or row.title in options.only]
    return [row for row in named if options.group in (None, row.group)]


def run(rows: Sequence[Row], found: dict[str, Outcome], *, results: Path | None, seconds: float) -> None:
    """Tries the rows that are not found yet, for so long."""
    started = time.monotonic()
    for row in rows:
        if row.title in found or time.monotonic() - started > seconds:
            continue
        made = found[row.title] = outcome(row)
        print(f"{made.title}\n    {made.guided}\n    {made.unguided}\n    {made.load_seconds} s", flush=True)
        if results:
            with results.open("a") as file:
                file.write(json.dumps({**asdict(made), "diffusers": diffusers.__version__}) + "\n")


def main() -> int:
    """A paragraph a row, then how many became what."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="titles of rows")
    parser.add_argument("--group", choices=GROUPS, help="rows for one purpose")
    parser.add_argument("--results", type=Path, help="JSON lines: read, and added to after every row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further row after so long")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/models.md")
    options = parser.parse_args()
    for name in ("diffusers", "transformers", "ddpo"):
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers.utils.logging.set_verbosity_error()
    found, rows = read(options.results), chosen(options)
    run(rows, found, results=options.results, seconds=options.seconds)
    tried = [row for row in rows if row.title in found]
    if tried:
        print(summary(tried, found, version=diffusers.__version__))
    if options.docs:
        missing = [row.title for row in ROWS if row.title not in found]
        if missing:
            parser.error(f"--docs takes all rows; {len(missing)} are not tried yet: {', '.join(missing)}")
        section = table(ROWS, found, version=diffusers.__version__)
        DOCS.write_text(replaced_section(DOCS.read_text(), section))
    return int(any(set(BUGS) & found[row.title].kinds for row in tried))


if __name__ == "__main__":
    raise SystemExit(main())
