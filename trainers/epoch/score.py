"""The second verb of an epoch: what rewards say of its samples.

Reward processes and threads return raw components; they are gathered from all processes, taken into the running scales
once, and their weighted total is made once.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from ddpo import Samples
from ddpo.placement import concatenate
from rewards import RewardError, Scores, WeightedSum
from rewards.base import check_components
from trainers.epoch.sample import Decoded, Glimpse, SampledBatch
from trainers.parallel.processes import Processes
from trainers.scoring.non_finite import find_non_finite
from trainers.scoring.scorer import Scorer, fail_together
from trainers.tracking.metrics import Stopwatch


@dataclass(frozen=True, kw_only=True)
class Scored:
    """An epoch's samples and scores.

    Attributes:
        samples: Of this process.
        scores: Of all N samples of the epoch: totals (N,) and components.
        compared: What of the totals compares the images of a group, (N,); None where nothing does.
        predicted: The scores of the predicted clean images, by step or contender.
        features: The denoiser's own at each step of this process's samples, (B, T, F); None where nobody reads them.
    """

    samples: Samples
    scores: Scores
    compared: Tensor | None
    predicted: Mapping[Glimpse, Scores]
    features: Tensor | None = None


def score(
    batches: Iterable[SampledBatch],
    *,
    reward: WeightedSum,
    glimpses: Sequence[Glimpse],
    prompts: Sequence[str],
    epoch: int,
    group_size: int,
    threads: ThreadPoolExecutor,
    processes: Processes,
    clock: Stopwatch,
) -> Scored:
    """Scores batches while the next ones are sampled.

    Args:
        batches: Of this process.
        reward: What to score with; its running scales move on.
        glimpses: Whose predicted images are scored too.
        prompts: Texts of all N samples.
        epoch: Finished epochs.
        group_size: Images of a prompt, next to each other.
        threads: In which rewards run.
        processes: Who shares the epoch.
        clock: Takes the seconds of waiting for `reward`.

    Raises:
        RewardError: A reward failed on some process; the message names it, the prompt and the sample. Or images were
            not finite.
        Interrupted: A signal has reached some process.
    """
    first = processes.share(len(prompts)).start
    final = Scorer(reward, threads, group_size=group_size, first=first)
    scorers = {k: Scorer(reward, threads, group_size=group_size, first=first) for k in glimpses}
    parts: list[Samples] = []
    features: list[Tensor] = []
    failure: RewardError | None = None
    for batch in batches:
        parts.append(batch.samples)
        if batch.features is not None:
            features.append(batch.features)
        failure = failure or _submit(final, batch.final, batch.samples)
        for k, scorer in scorers.items():
            failed = _submit(scorer, batch.predicted[k], batch.samples)
            failure = failure or failed
    fail_together(processes, failure)
    with clock("reward"):
        raw = gather_components(_collected(final, processes), processes)
        raw_by_step = {k: gather_components(_collected(scorer, processes), processes) for k, scorer in scorers.items()}
    reward.update(raw, prompts)

    def scores(components: dict[str, Tensor], *, seen: bool = False) -> Scores:
        return Scores(total=reward.total(components, prompts, epoch=epoch, seen=seen), components=components)

    compared = reward.total(raw, prompts, epoch=epoch, seen=True, compared=True) if reward.groupwise else None
    return Scored(
        samples=Samples.concatenate(parts),
        scores=scores(raw, seen=True),
        compared=compared,
        predicted={k: scores(components) for k, components in raw_by_step.items()},
        features=concatenate(features) if features else None,
    )


def _submit(scorer: Scorer, decoded: Decoded, samples: Samples) -> RewardError | None:
    """Has images scored; returns why not where some are not finite."""
    failure = find_non_finite(decoded.images, decoded.latents, samples.prompts)
    if failure is None:
        scorer.submit(decoded.images, samples.prompts, samples.metadata)
    return failure


def _collected(scorer: Scorer, processes: Processes) -> dict[str, Tensor]:
    """This process's raw scores; a reward that fails on any process ends the run on all, with the same message."""
    while processes.largest(not scorer.wait(seconds=0.2)):
        processes.safe_point("rewards")
    scores, failure = None, None
    try:
        scores = scorer.collect()
    except RewardError as error:
        failure = error
    fail_together(processes, failure)
    assert scores is not None
    return scores


def gather_components(components: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """The raw scores of all processes, which must report the same components."""
    everyones = [cast("list[str]", names) for names in processes.gather_json(list(components))]
    for names in everyones:
        check_components(everyones[0], names)
    return {name: processes.gather(components[name]) for name in everyones[0]}
