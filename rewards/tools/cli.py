"""What `ddpo rewards list`, `ddpo rewards score` and `ddpo rewards test` print."""

from __future__ import annotations

import glob
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from rewards.base import UserError
from rewards.card import Card
from rewards.construct import Registration
from rewards.docstrings import documented
from rewards.images.picture import load_image
from rewards.registry import BUILT_IN, available, find, resolve
from rewards.reward import Reward
from rewards.tools.selftest import Report, selftest
from rewards.tools.table import table

_YOUR_OWN = "Your own: file.py:name or module:name, a function (images, prompts, metadata) -> Tensor (B,)."


def list_rewards(verbose: bool = False) -> str:
    """Every reward that can be named, with its range and whether it is differentiable.

    Args:
        verbose: A paragraph for each in place of a row: also typical scores, the pip extra needed, licence, origin,
            where it is defined, and its options.
    """
    entries = available().items()
    if verbose:
        listing = "\n\n".join(_paragraph(name, origin) for name, origin in entries)
    else:
        listing = table(["name", "gradient", "range", "description"], [_row(name) for name, _ in entries])
    return f"{listing}\n\n{_YOUR_OWN}"


def catalogue() -> str:
    """The built-in rewards as a Markdown table, the same on every machine: the one in docs/rewards.md."""
    header = ["name", "gradient", "range", "typical", "what it is", "needs", "licence", "origin"]
    rows = [header, ["---"] * len(header), *(_markdown_row(find(name)) for name in sorted(BUILT_IN))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _markdown_row(noted: Registration) -> list[str]:
    card = noted.card
    others = [f"or `{program}`" for other in card.alternatives for program in other.programs]
    others += [f"extra `{a.extra}` for {a.option}: {a.value}" for a in card.alternatives if a.extra]
    needs = " ".join([*([f"extra `{card.extra}`"] if card.extra else []), *others])
    gradient = "yes" if noted.differentiable else ""
    described = _describe(noted).rstrip(".")
    cells = [f"`{noted.name}`", gradient, _format_range(noted.range), card.typical, described, needs, card.licence]
    return [cell.replace("|", "\\|") for cell in (*cells, card.origin)]


def score(
    name: str,
    image_paths: Sequence[str | Path],
    prompt: str | Sequence[str] | None = None,
    *,
    options: Mapping[str, object] | None = None,
) -> str:
    """A table of the scores of image files, one row each, with components; a mean row for several.

    Args:
        name: Any name `rewards.resolve` understands.
        image_paths: Files or patterns such as `pictures/*.png`.
        prompt: What the images should show: one for all or one for each; empty when None.
        options: Keyword arguments for a reward class.

    Raises:
        UserError: No such file, not an image, a pattern without matches, or prompts that do not fit.
    """
    reward = resolve(name, options=options or {})
    paths = expand(image_paths)
    prompts = _prompts(prompt, len(paths))
    names, rows = _score_group(reward, paths, prompts) if reward.groupwise else _score_each(reward, paths, prompts)
    header = [reward.name, *names]
    cells = [[str(path), *_numbers(row)] for path, row in zip(paths, rows, strict=True)]
    if len(rows) > 1:
        cells.append(["mean", *_numbers(np.mean(rows, axis=0))])
    return table(["image", *header], cells, right=True)


def _score_each(reward: Reward, paths: Sequence[Path], prompts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """Names of the components, and total and components of each file; one at a time, as files differ in size."""
    rows, names = [], []
    for path, text in zip(paths, prompts, strict=True):
        scores = reward(load_image(path), [text], [{}])
        rows.append([float(scores.total), *(float(values) for values in scores.components.values())])
        names = list(scores.components)
    return names, rows


def _score_group(reward: Reward, paths: Sequence[Path], prompts: Sequence[str]) -> tuple[list[str], list[list[float]]]:
    """The same for a reward that compares images: all files of equal prompts together."""
    images = [load_image(path) for path in paths]
    sizes = sorted({(image.shape[3], image.shape[2]) for image in images})
    if len(sizes) > 1:
        listed = " and ".join(f"{width} x {height}" for width, height in sizes[:2])
        raise UserError(
            f"reward {reward.name!r} compares images with each other; they must be of one size, got {listed}"
        )
    scores = reward(torch.cat(images), prompts, [{}] * len(prompts))
    columns = torch.stack([scores.total, *scores.components.values()])
    return list(scores.components), columns.T.tolist()


def run_selftests(
    names: Sequence[str], *, options: Mapping[str, object] | None = None, prompt: str | None = None
) -> tuple[str, bool]:
    """A table of self-tests, a row for each reward, then what failed; and whether nothing did.

    Args:
        names: Rewards, in any form `rewards.resolve` understands; all built-in ones when empty.
        options: Keyword arguments for a reward class; for a single reward only.
        prompt: Of the sample pictures.

    Returns:
        The text, and False when a check failed or a reward that was asked for by name cannot be made.

    Raises:
        UserError: Options for several rewards.
    """
    if options and len(names) != 1:
        raise UserError(f"options belong to one reward, got {len(names)} names; test them one by one")
    reports = [selftest(name, options=options, prompt=prompt) for name in names or BUILT_IN]
    ran = [report for report in reports if report.findings]
    lines = []
    if ran:
        header = ["name", *[finding.check for finding in ran[0].findings], "images/s"]
        lines += table(header, [_test_row(report) for report in ran]).splitlines()
    for report in reports:
        failed = [finding for finding in report.findings if finding.passed is False]
        lines += [f"{report.name}: {finding.check} FAILED: {finding.detail}" for finding in failed]
        if report.failure:
            lines.append(f"{report.name}: FAILED: {report.failure}")
        if report.unavailable:
            lines.append(f"{report.name}: not run: {report.unavailable}")
    fine = all(report.passed and not (names and report.unavailable) for report in reports)
    return "\n".join(lines), fine


def _test_row(report: Report) -> list[str]:
    marks = {True: "ok", False: "FAILED", None: "-"}
    cells = []
    for finding in report.findings:
        note = finding.detail if finding.passed and finding.check != "range" else ""
        cells.append(f"{marks[finding.passed]} {note}".strip())
    return [report.name, *cells, f"{report.images_per_second:.3g}"]


def expand(patterns: Sequence[str | Path]) -> list[Path]:
    """The files that paths and patterns name, each pattern's matches sorted.

    Raises:
        UserError: Nothing given, a missing file, a folder, or a pattern without matches.
    """
    if not patterns:
        raise UserError("no images given; name files, or quote a pattern such as 'pictures/*.png'")
    found: list[Path] = []
    for pattern in map(str, patterns):
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise UserError(f"{pattern} is a folder; write '{pattern.rstrip('/')}/*.png' for the pictures in it")
        matches = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207
        matches = [match for match in matches if match.is_file()]
        if not matches:
            is_pattern = any(letter in pattern for letter in "*?[")
            raise UserError(f"no file matches {pattern!r}" if is_pattern else f"no such image: {pattern}")
        found += matches
    return found


def _row(name: str) -> list[str]:
    try:
        noted = find(name)
    except (ImportError, ValueError) as error:  # a plug-in that cannot be loaded must not hide the others
        return [name, "-", "-", f"unavailable: {error}"]
    gradient = "yes" if noted.differentiable else "no"
    return [name, gradient, _format_range(noted.range), _describe(noted)]


def _paragraph(name: str, origin: str) -> str:
    try:
        noted = find(name)
    except (ImportError, ValueError) as error:
        return f"{name}\n  unavailable: {error}\n  defined in   {origin}"
    facts = {
        "gradient": "yes" if noted.differentiable else "no",
        "range": _format_range(noted.range),
        "typical": noted.card.typical,
        "extra": _format_extra(noted.card),
        "licence": noted.card.licence,
        "origin": noted.card.origin,
        "caution": noted.card.caution,
        "defined in": noted.source,
    }
    lines = [f"  {label:<12} {fact}" for label, fact in facts.items() if fact]
    lines += [f"  {'downloads':<12} {download}" for download in noted.card.downloads]
    return "\n".join([f"{name}: {_describe(noted)}", *lines, *_option_lines(noted)])


def _option_lines(noted: Registration) -> list[str]:
    """A line for each option of a reward class, with its default and what its docstring says of it."""
    if not inspect.isclass(noted.target):
        return []
    about = documented(noted.target, "Args")
    lines = []
    for option, parameter in inspect.signature(noted.target).parameters.items():
        if option != "device":
            default = "required" if parameter.default is parameter.empty else f"default {parameter.default!r}"
            lines.append(f"  {'option':<12} {option} ({default}): {about.get(option, '')}".removesuffix(": "))
    return lines


def _format_extra(card: Card) -> str:
    """The pip extra, and whether what it brings is missing here."""
    missing = card.missing({})
    return card.extra + (f" (not installed: {', '.join(missing)})" if missing else "")


def _format_range(bounds: tuple[float, float] | None) -> str:
    """`[0, 1]`, `(-inf, 0]`, or `-` when not stated."""
    if bounds is None:
        return "-"
    low = "(-inf" if math.isinf(bounds[0]) else f"[{bounds[0]:g}"
    high = "inf)" if math.isinf(bounds[1]) else f"{bounds[1]:g}]"
    return f"{low}, {high}"


def _describe(noted: Registration) -> str:
    return noted.description or "(no description)"


def _numbers(values: Sequence[float] | np.ndarray) -> list[str]:
    return [f"{value:.4f}" for value in values]


def _prompts(prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""] * count
    if len(prompt) != count:
        raise UserError(f"{count} images need one prompt for all or {count} prompts, got {len(prompt)}")
    return list(prompt)
