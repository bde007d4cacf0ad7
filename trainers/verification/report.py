"""The report of `ddpo verify`: figures, and one page that holds them, every claim and every measurement.

The page needs nothing but itself: images are embedded, there is no script and no request.
"""

import base64
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ddpo.control.diffusion.toy_problem import toy_problem
from ddpo.control.figures.chain import chain_figure
from ddpo.control.figures.diffusion import diffusion_figure
from ddpo.control.figures.energy_model import energy_model_figure
from ddpo.control.figures.gradient import gradient_figure
from ddpo.control.figures.lqr import lqr_figure
from ddpo.control.figures.merton import merton_figure
from ddpo.control.figures.trainer import Curves, readme_figure, trainer_figure
from trainers.verification.optimum import CHECKS as TRAINER_CHECKS
from trainers.verification.optimum import GAP_BAR, PPO, REINFORCE, affine_gap
from trainers.verification.suite import Row, cells, run_checks, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECTIONS = {
    "1. The linear-quadratic regulator": ("lqr", "hjb", "model_free"),
    "2. Merton's portfolio": ("merton",),
    "3. Finite decision processes": ("tabular",),
    "4. Sampling as control": ("diffusion", "elbo", "soft_value", "double_well", "score_matching", "soc"),
    "5. The exact chain": ("samplers", "chain", "steering"),
    "6. The gradient": ("gradient", "advantages", "kl", "critic", "natural gradient"),
    "7. The trainer against the optimum": ("trainer", "clean_sample", "preference", "reward gradient", "adjoint"),
    "8. Your model": ("policy",),
}
"""Sections of docs/verification.md, and the groups of checks that each derives."""

STYLE = """
body { margin: 0; background: #fff; color: #1c1c1c; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid #d0d0d0; }
h3 { font-size: 1.1rem; margin: 1.75rem 0 .1rem; }
p { max-width: 46rem; }
code { font: .92em ui-monospace, monospace; }
.note { color: #555; font-size: .88rem; margin: .1rem 0 .6rem; }
.verdict { padding: .6rem .9rem; border-left: 5px solid; font-weight: 600; }
.good { border-color: #009E73; background: #eef8f4; }
.bad { border-color: #D55E00; background: #fdf1e8; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 48rem; table-layout: fixed; }
table { font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .28rem .7rem .28rem 0; vertical-align: top; overflow-wrap: anywhere; }
thead th { color: #555; font-weight: 500; border-bottom: 1px solid #d0d0d0; }
.claim th { padding-top: .8rem; font-weight: 600; }
.claim span { font-weight: 400; }
td.pass { color: #00704f; } td.fail { color: #b34700; font-weight: 700; }
.number { white-space: nowrap; }
figure { margin: 2rem 0; }
figure img { max-width: 100%; height: auto; border: 1px solid #e4e4e4; }
figcaption { max-width: 46rem; font-size: .92rem; }
"""

ABOUT = """Each check computes something whose exact answer is known: from a closed form, from dynamic programming, or
from an independent library. A row shows the exact answer, the one obtained, their distance, and the largest one
that passes. The derivations are in <code>docs/verification.md</code>."""


@dataclass(frozen=True, kw_only=True)
class Illustration:
    """A figure of the report.

    Attributes:
        name: Of its file, without the ending.
        title: A few words.
        groups: It is drawn when one of these groups of checks has run.
        caption: What to see in it.
        draw: Makes it from all rows.
    """

    name: str
    title: str
    groups: tuple[str, ...]
    caption: str
    draw: "Callable[[Sequence[Row]], Figure]"


ILLUSTRATIONS = (
    Illustration(
        name="lqr",
        title="A regulator, learned",
        groups=("lqr", "hjb"),
        caption="Neural policy iteration on the scalar regulator lies on the Riccati solution (thick grey), also along "
        "paths. Its gain converges quadratically, as Newton's method does, until the fit of the network limits it.",
        draw=lambda rows: lqr_figure(),
    ),
    Illustration(
        name="merton",
        title="Merton's portfolio, learned",
        groups=("merton",),
        caption="Both learned controls become the constants of the exact solution within three iterations. J is nearly "
        "flat around its optimum, which is why the checks look at the controls and not at the value alone.",
        draw=lambda rows: merton_figure(),
    ),
    Illustration(
        name="diffusion",
        title="Generation as control",
        groups=("diffusion",),
        caption="The control u* turns noise into the law of the data. The error of the identity J(u) = V + gap falls "
        "with the order of the scheme, and the costs of four controls lie on it (bars: 1 and 2 standard errors).",
        draw=lambda rows: diffusion_figure(),
    ),
    Illustration(
        name="energy_model",
        title="An energy model by likelihood and by score matching",
        groups=("score_matching",),
        caption="Likelihood weighs places by their data: it is right about the modes' weights, and wrong between and "
        "beyond them. Score matching with little noise knows neither; with much it is accurate, of a smoothed law.",
        draw=lambda rows: energy_model_figure(),
    ),
    Illustration(
        name="chain",
        title="The exact chain",
        groups=("chain",),
        caption="Fine-tuning moves every marginal of the sampler. At eta 1 the optimum ends in the tilted law; at "
        "eta 0.2 the initial noise has decided most of the sample, and the optimum misses that law by the bias shown.",
        draw=lambda rows: chain_figure(),
    ),
    Illustration(
        name="gradient",
        title="The gradient, right and wrong",
        groups=("gradient",),
        caption="Above, the gradient that ddpo follows: on the diagonal within its standard errors, z-scores standard "
        "normal. Below, the same paths when an action is not charged the KL that it causes later.",
        draw=lambda rows: gradient_figure(),
    ),
    Illustration(
        name="trainer",
        title="The trainer against the optimum",
        groups=("trainer",),
        caption="Each point is a training run of its own, with the J of its exported weights computed exactly. The "
        "dashed lines are where training would end, however long it ran, with two common mistakes.",
        draw=lambda rows: trainer_figure(gap_curves(rows), bar=GAP_BAR),
    ),
)


def write_report(folder: Path, rows: Sequence[Row]) -> Path:
    """Draws the figures of the groups that ran and writes `index.html`; about 40 seconds for all of them on one core.

    A figure that cannot be drawn is named with its error in the page, since the measurements must not be lost.

    Args:
        folder: An existing folder; PNG files of the same names are replaced.
        rows: What the checks found.

    Returns:
        The page.
    """
    groups = {row.group for row in rows}
    chosen = [one for one in ILLUSTRATIONS if groups.intersection(one.groups)]
    figures = []
    with tqdm(chosen, unit="figure", dynamic_ncols=True) as bar:
        for one in bar:
            bar.set_description(f"drawing {one.name}")
            figures.append(_figure(one, folder / f"{one.name}.png", rows))
    page = folder / "index.html"
    page.write_text(_page(rows, figures), encoding="utf-8")
    return page


def write_readme_figure(path: Path) -> None:
    """Writes the figure of the README, with trainer checks of its own; about 40 seconds.

    `python -c "from trainers.verification.report import *; write_readme_figure(Path('docs/images/verification.png'))"`
    """
    ends = [check for check in TRAINER_CHECKS if check.name.startswith("optimum, DDIM")]
    rows = list(run_checks(ends, announce=lambda index, check: None))
    readme_figure(gap_curves(rows), bar=GAP_BAR).savefig(path)


def gap_curves(rows: Sequence[Row]) -> Curves:
    """Gaps of short runs of the trainer's recipes, and those that the rows already hold of the full ones."""
    curves = {}
    for name, recipe, lengths in (("REINFORCE", REINFORCE, (5, 20, 50)), ("PPO", PPO, (5, 10, 25))):
        runs = [replace(recipe, epochs=epochs) for epochs in lengths]
        points = [(run.num_paths, affine_gap(toy_problem(), run)) for run in runs]
        label = f"{name}, {recipe.num_paths:,} paths"
        full = [
            row.measurement.error
            for row in rows
            if row.check.startswith("optimum, DDIM") and (row.group, row.measurement.name) == ("trainer", label)
        ]
        curves[name] = points + [(recipe.num_paths, gap) for gap in full]
    return curves


def _figure(one: Illustration, path: Path, rows: Sequence[Row]) -> str:
    """The figure as HTML, and as a file."""
    caption = f"<figcaption><b>{escape(one.title)}.</b> {escape(one.caption)} {_source(one.groups[0])}</figcaption>"
    try:
        one.draw(rows).savefig(path)
    except Exception as error:
        reason = escape(f"{type(error).__name__}: {error}")
        return f'<figure><p class="verdict bad">not drawn: {reason}</p>{caption}</figure>'
    image = base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{escape(one.title)}" src="data:image/png;base64,{image}"/>{caption}</figure>'


def _page(rows: Sequence[Row], figures: Sequence[str]) -> str:
    """The page, which is well-formed XML too."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ddpo", "torch", "diffusers"))
    when = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    drawn = ["<h2>Figures</h2>", *figures] if figures else []
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8"/><title>ddpo verify</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>ddpo verify</h1><p>{ABOUT}</p>",
            f'<p class="note">{escape(when)}, {escape(versions)}, Python {platform.python_version()}</p>',
            *_verdict(rows),
            "<h2>Measurements</h2>",
            *_tables(rows),
            *drawn,
            "</main></body></html>\n",
        ]
    )


def _verdict(rows: Sequence[Row]) -> Iterator[str]:
    """How many passed, and the names of those that did not."""
    failed = [row for row in rows if not row.measurement.passed]
    yield f'<p class="verdict {"bad" if failed else "good"}">{escape(summary(rows))}</p>'
    if failed:
        names = (f"{row.group}: {row.check}, {row.measurement.name}" for row in failed)
        yield f"<ul>{''.join(f'<li>{escape(name)}</li>' for name in names)}</ul>"


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for every group; a claim stands over the measurements that test it."""
    columns = {"measured": 33, "exact": 18, "obtained": 18, "error": 8, "tolerance": 9, "seconds": 8, "": 6}
    head = "".join(f'<th style="width: {share}%">{name}</th>' for name, share in columns.items())
    for group in dict.fromkeys(row.group for row in rows):
        yield f'<h3>{escape(group)}</h3><p class="note">{_source(group)}</p>'
        yield f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>'
        ours = [row for row in rows if row.group == group]
        for (check, claim), found in groupby(ours, key=lambda row: (row.check, row.claim)):
            title = f"{escape(claim)} <span>({escape(check)})</span>"
            yield f'<tr class="claim"><th colspan="{len(columns)}">{title}</th></tr>'
            yield from map(_row, found)
        yield "</tbody></table></div>"


def _row(row: Row) -> str:
    """A measurement."""
    name, exact, obtained, *numbers, verdict = map(escape, cells(row)[1:])
    texts = "".join(f"<td>{text}</td>" for text in (name, exact, obtained))
    rest = "".join(f'<td class="number">{text}</td>' for text in numbers)
    return f'<tr>{texts}{rest}<td class="{verdict.lower()}">{verdict}</td></tr>'


def _source(group: str) -> str:
    """Where a group is derived."""
    section = next((title for title, groups in SECTIONS.items() if group in groups), None)
    where = f", section <i>{escape(section)}</i>" if section else ""
    return f"Derived in <code>docs/verification.md</code>{where}."
