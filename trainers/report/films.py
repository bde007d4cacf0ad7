"""The same prompts and seeds over a run: a strip of pictures for each, and a slider through all of them."""

from collections.abc import Sequence
from html import escape

from trainers.report.marks import number, picture, run_label
from trainers.report.subject import Subject
from trainers.tracking.pictures import spread, to_pil

_PROMPTS, _FRAMES = 6, 12
"""Prompts that are shown, and evaluations of a run, evenly over what there is."""


def films(subjects: Sequence[Subject]) -> str:
    """Strips, of one picture of each shown prompt; runs below each other where they share prompts, else in turn."""
    evaluated = [(index, subject) for index, subject in enumerate(subjects) if subject.values]
    if not evaluated:
        return ""
    chosen = {epoch for _, subject in evaluated for epoch in _frames(subject)}
    last = len(chosen) - 1
    slider = (
        f'<label class="slider">epoch <output>{max(chosen)}</output>'
        f'<input type="range" min="0" max="{last}" value="{last}" data-epochs="{_words(sorted(chosen))}"></label>'
    )
    shared = all(subject.texts == evaluated[0][1].texts for _, subject in evaluated)
    groups = [evaluated] if shared else [[one] for one in evaluated]
    rows = "".join(_rows(group, several=len(evaluated) > 1) for group in groups)
    several = " several" if len(evaluated) > 1 else ""
    return f'<div class="films{several}">{slider if last else ""}{rows}</div>'


def _words(epochs: Sequence[int]) -> str:
    return " ".join(map(str, epochs))


def _frames(subject: Subject) -> list[int]:
    """Epochs of the evaluations that are shown: the first, the last, and some between."""
    epochs = list(subject.values)
    return epochs if len(epochs) <= _FRAMES else [*(epochs[i] for i in spread(len(epochs), _FRAMES - 1)), epochs[-1]]


def _rows(group: Sequence[tuple[int, Subject]], *, several: bool) -> str:
    """A row for each shown prompt, with a strip of each run."""
    texts = group[0][1].texts
    firsts = [texts.index(text) for text in dict.fromkeys(texts)]
    shown = [firsts[i] for i in spread(len(firsts), _PROMPTS)]
    strips = [[_strip(index, subject, image, several=several) for image in shown] for index, subject in group]
    return "".join(
        f'<div class="film"><h3>{escape(texts[image])}</h3>{"".join(strip[row] for strip in strips)}</div>'
        for row, image in enumerate(shown)
    )


def _strip(index: int, subject: Subject, image: int, *, several: bool) -> str:
    frames = "".join(_frame(subject, epoch, image) for epoch in _frames(subject))
    name = run_label(subject.name, index) if several else ""
    return f'<div class="strip">{name}<div class="shown" hidden></div><div class="frames">{frames}</div></div>'


def _frame(subject: Subject, epoch: int, image: int) -> str:
    totals = subject.values[epoch].get("reward")
    score = "" if totals is None else f" · {number(float(totals[image]), 3)}"
    drawn = picture(to_pil(subject.image(epoch, image)))
    return f'<figure data-epoch="{epoch}">{drawn}<figcaption>{epoch}{score}</figcaption></figure>'
