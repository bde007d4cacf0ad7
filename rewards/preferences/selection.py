"""Which pairs to label next: those on which an ensemble disagrees most (Christiano et al. 2017, section 2.2.4).

    disagreement = std over members k of sigmoid(r_k(a) - r_k(b))

Members that all favour the same picture, by however much, agree; a difference does not depend on where a member's zero
is. Without an ensemble the choice is random. Legend: `K` members, `N` pictures, `C` candidate pairs.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from rewards.base import UserError
from rewards.images.picture import load_image
from rewards.preferences.ensemble import Ensemble
from rewards.preferences.pairs import Pair
from rewards.preferences.pictures import Picture
from rewards.preferences.progress import track

MAX_USES = 2
_BATCH = 64
_MAX_CANDIDATES = 50_000

PairKey = tuple[str, frozenset[Path]]


def propose(
    pictures: Sequence[Picture],
    num: int,
    *,
    ensemble: Ensemble | None = None,
    known: frozenset[PairKey] = frozenset(),
    seed: int = 0,
    show: bool = False,
) -> list[Pair]:
    """Chooses pairs of pictures of one prompt.

    Args:
        pictures: To choose from.
        num: How many; fewer when there are not enough.
        ensemble: Whose disagreement ranks the pairs; random when None.
        known: Pairs not to choose again, see `Pair.key`.
        seed: Of the random choice and of the order of equals.
        show: Whether to show a bar.

    Returns:
        Pairs without labels, most disputed first. No picture stands in more than two of them, unless there are too few
        pictures.

    Raises:
        UserError: No prompt has two pictures that were not compared yet.
    """
    generator = random.Random(seed)
    candidates = _candidates(pictures, known, generator)
    if not candidates:
        raise UserError(f"none of the {len(pictures)} pictures shares its prompt with another it was not compared to")
    if ensemble is not None:
        doubt = _disagreement(candidates, ensemble, show=show).tolist()
        candidates = [pair for _, pair in sorted(zip(doubt, candidates, strict=True), key=lambda item: -item[0])]
    chosen: list[Pair] = []
    spare: list[Pair] = []
    uses: Counter[tuple[str, Path]] = Counter()
    for pair in candidates:
        ends = ((pair.prompt, pair.a), (pair.prompt, pair.b))
        if len(chosen) < num and all(uses[end] < MAX_USES for end in ends):
            chosen.append(pair)
            uses.update(ends)
        else:
            spare.append(pair)
    return chosen + spare[: num - len(chosen)]


def _candidates(pictures: Sequence[Picture], known: frozenset[PairKey], generator: random.Random) -> list[Pair]:
    """Pairs of one prompt in random order, all of them or a random subset."""
    by_prompt: dict[str, list[Path]] = {}
    for picture in pictures:
        by_prompt.setdefault(picture.prompt, []).append(picture.path)
    pairs = []
    most = max(1, _MAX_CANDIDATES // max(1, len(by_prompt)))
    for prompt, paths in sorted(by_prompt.items()):
        distinct = sorted(set(paths))
        every = list(combinations(distinct, 2))
        for a, b in generator.sample(every, min(most, len(every))):
            first, second = (a, b) if generator.random() < 0.5 else (b, a)
            pairs.append(Pair(prompt=prompt, a=first, b=second))
    generator.shuffle(pairs)
    return [pair for pair in pairs if pair.key not in known]


def _disagreement(pairs: Sequence[Pair], ensemble: Ensemble, *, show: bool) -> Tensor:
    """(C,) in [0, 1/2]; every picture is scored once."""
    ends = sorted({(pair.prompt, path) for pair in pairs for path in (pair.a, pair.b)})
    place = {end: number for number, end in enumerate(ends)}
    parts = []
    with torch.no_grad():
        for start in track(range(0, len(ends), _BATCH), "scoring pictures", show=show):
            batch = ends[start : start + _BATCH]
            pixels = [load_image(path) for _, path in batch]
            if len({picture.shape for picture in pixels}) == 1:
                parts.append(ensemble.scores(torch.cat(pixels), [prompt for prompt, _ in batch]))
            else:
                each = zip(pixels, batch, strict=True)
                parts += [ensemble.scores(picture, [prompt]) for picture, (prompt, _) in each]
    scores = torch.cat(parts, dim=1).cpu()  # (K, N)
    a = torch.tensor([place[pair.prompt, pair.a] for pair in pairs])
    b = torch.tensor([place[pair.prompt, pair.b] for pair in pairs])
    return (scores[:, a] - scores[:, b]).sigmoid().std(0, correction=0)
