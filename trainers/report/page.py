"""The page: one HTML file without scripts, styles or pictures from elsewhere, which its own policy forbids."""

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

from ddpo.validation import UserError
from trainers.config.yaml_text import dump
from trainers.report.curves import distributions, first_curves, other_curves, reward_against_kl, step_maps
from trainers.report.films import films
from trainers.report.marks import folded, paragraph, run_label, section, table
from trainers.report.outcome import evaluations, findings, times
from trainers.report.subject import PLACES, Subject, keys_of, read_subject
from trainers.run_folder.ledger import replace_text
from trainers.run_folder.listing import HEADER, cells

REPORT = "report.html"


def write_report(runs: Sequence[Path], output: Path) -> Path:
    """Writes the page of one run, or of several beside each other.

    Args:
        runs: Run folders, finished or running; at least one.
        output: The HTML file.

    Returns:
        The file.

    Raises:
        UserError: A run is given twice.
        RunError: One is no run folder, or has damaged metrics.
        ConfigError: A configuration is not of this version.
    """
    given = [run.resolve() for run in runs]
    if len(set(given)) < len(given):
        raise UserError(f"the same run is given twice: {', '.join(map(str, runs))}; name each once")
    return save_report([read_subject(run) for run in runs], output)


def save_report(subjects: Sequence[Subject], output: Path) -> Path:
    """Writes the page of runs that were read already, and returns the file."""
    replace_text(output, page(subjects))
    return output


def page(subjects: Sequence[Subject]) -> str:
    """The page as text."""
    title = " · ".join(subject.name for subject in subjects)
    style, script = (
        files("trainers.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js")
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{_sections(subjects)}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _sections(subjects: Sequence[Subject]) -> str:
    """Everything below the title, in the order of reading."""
    several = len(subjects) > 1
    legend = "".join(run_label(subject.name, i) for i, subject in enumerate(subjects)) if several else ""
    parts = [
        table(HEADER, [cells(subject.summary) for subject in subjects]),
        section("What differs", _differing(subjects)) if several else section("What was run", _own_keys(subjects)),
        section("What the doctor says", findings(subjects)),
        section("Evaluation", evaluations(subjects)),
        section("Course", legend, first_curves(subjects), folded("all other numbers", other_curves(subjects))),
        section("Reward against KL", legend, reward_against_kl(subjects)),
        section("The same prompts and seeds", films(subjects)),
        section("Steps of the chain", step_maps(subjects)),
        section("Rewards of single images", distributions(subjects)),
        section("Time", times(subjects)),
        section("How it was made", _own_keys(subjects) if several else "", _environments(subjects)),
    ]
    return "\n".join(part for part in parts if part)


def _differing(subjects: Sequence[Subject]) -> str:
    """The keys by which runs differ, defaults filled in."""
    keys = [keys_of(subject.config, full=True) for subject in subjects]
    names = [name for name in dict.fromkeys(name for one in keys for name in one) if name not in PLACES]
    rows = [(name, *(_word(one, name) for one in keys)) for name in names]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    if not differing:
        return paragraph("The configurations are the same but for the runs' names.")
    return table(("key", *(subject.name for subject in subjects)), differing, kind="words")


def _own_keys(subjects: Sequence[Subject]) -> str:
    """The keys that differ from the defaults: of a single run, or those that several share."""
    own = [keys_of(subject.config, full=False) for subject in subjects]
    shared = [name for name in own[0] if all(name in one and one[name] == own[0][name] for one in own)]
    rows = [(name, _word(own[0], name)) for name in shared if name not in PLACES]
    if not rows:
        return ""
    return table(("differs from the default" if len(own) == 1 else "shared", "is"), rows, kind="words")


def _word(keys: dict[str, object], name: str) -> str:
    return dump(keys[name], inline=True) if name in keys else "–"


def _environments(subjects: Sequence[Subject]) -> str:
    """Versions, hardware and command of each run, and its whole configuration."""
    found = [subject.folder.environment() for subject in subjects]
    names = [
        name for name in dict.fromkeys(name for one in found for name in one) if name not in ("packages", "resumed")
    ]
    rows = [(name.replace("_", " "), *(_word(one, name) for one in found)) for name in names]
    packages = [one.get("packages") or {} for one in found]
    versions = [
        (name, *(str(one.get(name, "–")) for one in packages))
        for name in dict.fromkeys(n for one in packages for n in one)
    ]
    resumed = [("resumed, times", *(str(len(one.get("resumed", []))) for one in found))]
    listed = table(("", *(subject.name for subject in subjects)), [*rows, *versions, *resumed], kind="words")
    configs = [
        folded(f"configuration of {subject.name}", f"<pre>{escape(_config_text(subject))}</pre>")
        for subject in subjects
    ]
    return f"{listed}{''.join(configs)}"


def _config_text(subject: Subject) -> str:
    return subject.folder.config_file.read_text(encoding="utf-8", errors="replace")
