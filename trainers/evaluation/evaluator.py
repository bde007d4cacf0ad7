"""Measures a policy on fixed prompts and seeds: rewards, held-out rewards, path KL, diversity, with and without noise.

E images: every prompt of the evaluation set `images_per_prompt` times, in that order, each with its own fixed seed, so
that two evaluations differ by the weights alone and compare image by image.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo import Keep, Policy, Samples, rollout, sample_seeds
from ddpo.displacement import displacement
from ddpo.file_modes import open_by_umask
from ddpo.path_kl import full_noise_kl, steps_left_to_the_ode
from ddpo.pipeline.input_images import identities
from ddpo.seeds import Purpose
from rewards import RewardError, WeightedSum
from rewards.base import check_components
from rewards.frames import middle_frame
from trainers.config import Config
from trainers.config.groups import EvaluationConfig
from trainers.evaluation.forgetting import NAME as FORGETTING
from trainers.evaluation.forgetting import Forgetting
from trainers.evaluation.spread import Spread
from trainers.evaluation.statistics import Measure, numbered
from trainers.parallel.processes import Processes
from trainers.parallel.shares import share
from trainers.prompts import Prompt, load_prompts
from trainers.scoring.non_finite import find_non_finite
from trainers.scoring.scorer import fail_together, named_by_number
from trainers.scoring.whole_groups import GroupBuffer, ImageBatch
from trainers.tracking.progress import Progress

KL, FULL_NOISE_KL = "kl (nats)", "kl, full noise (nats)"
DISPLACEMENT = "displacement without noise"
VALUE = "value."
CAPTIONS = "captions"
_IMAGES = "images"
_HELDOUT = "heldout/"
_TOTALS = ("reward", "ode/reward")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
        values: By name: `reward` (the optimised total, where there is one), raw components, `heldout/...`, `kl (nats)`
            (where sampling has noise; beside it what the weights did in steps without), the same noise-free under
            `ode/...`, each (E,) float32; and `diversity`, one for each prompt (`pixel_diversity` beside a reward of
            that name).
        images: The images, by the evaluation's sampler, (E, 3, H, W) uint8.
        prompts: E texts.
    """

    values: dict[str, Tensor]
    images: Tensor
    prompts: tuple[str, ...]

    def summary(self) -> dict[str, Measure]:
        """Mean and standard error by name, in the order to read them."""
        return {name: Measure.of(self.values[name], self.captions) for name in sorted(self.values, key=_reading_order)}

    def changes(self, before: "Evaluation") -> dict[str, Measure]:
        """Means and standard errors of the paired differences to an earlier evaluation, by name."""
        names = before.summary()
        return {name: Measure.of(self.values[name] - before.values[name], self.captions) for name in names}

    @property
    def totals(self) -> Tensor:
        """The optimised total of each image, (E,) float32; NaN where no reward is."""
        return self.values.get("reward", torch.full((len(self.prompts),), math.nan))

    @property
    def captions(self) -> Tensor:
        """Numbers of the images' captions, (E,) int64."""
        return numbered(self.prompts)

    def pictures(self) -> Tensor:
        """The images as (E, 3, H, W) float32 in [0, 1]."""
        return self.images.float() / 255

    def scales(self, reward: WeightedSum) -> WeightedSum:
        """The reward with the scales of these images alone, to compare evaluations by."""
        return reward.scaled_by({one.name: self.values[one.name] for one in reward.rewards}, self.prompts)

    def rescored(self, reward: WeightedSum, *, epoch: int) -> "Evaluation":
        """The same images with `reward` recomputed, by its scales and its weights at `epoch`."""
        values = dict(self.values)
        for prefix in ("", "ode/"):
            if f"{prefix}reward" in values:
                components = {r.name: values[f"{prefix}{r.name}"] for r in reward.rewards}
                values[f"{prefix}reward"] = reward.total(components, self.prompts, epoch=epoch).float()
        return replace(self, values=values)

    def without_total(self) -> "Evaluation":
        """The same without the optimised total, where some of its rewards are gone."""
        return replace(self, values={name: value for name, value in self.values.items() if name not in _TOTALS})

    def save(self, file: Path) -> None:
        """Writes values, images, and the numbers of their captions to a safetensors file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {f"{VALUE}{key}": value for key, value in self.values.items()}
        save_file({**tensors, "images": self.images, CAPTIONS: self.captions}, file)
        open_by_umask(file)

    @classmethod
    def load(cls, file: Path, prompts: Sequence[str]) -> "Evaluation":
        """Reads what `save` wrote; `prompts` are the evaluation set's E texts."""
        tensors = load_file(file)
        values = {key.removeprefix(VALUE): value for key, value in tensors.items() if key.startswith(VALUE)}
        return cls(values=values, images=tensors["images"], prompts=tuple(prompts))


def _reading_order(name: str) -> tuple[int, str]:
    """The optimised reward first, then its parts, what was held out, KL, diversity, and noise-free sampling."""
    order = ("reward", "heldout/", KL, FULL_NOISE_KL, DISPLACEMENT, FORGETTING, "diversity", "spread/", "ode/")
    rank = next((place for place, prefix in enumerate(order) if name.startswith(prefix)), 0)
    return (rank, "" if name == "reward" else name)


@dataclass(frozen=True, kw_only=True)
class ImageSlot:
    """An image of an evaluation, or one like it.

    Attributes:
        prompt: What it is made of.
        index: In the evaluation set: whose noise it has.
    """

    prompt: Prompt
    index: int

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells two apart: text, input image and index."""
        return (*_identity(self.prompt), self.index)


def _identity(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, identities(prompt.metadata)


class Evaluator:
    """The fixed evaluation set of a run.

    Attributes:
        sources: Its prompts.
        prompts: The prompt of each of the E images.
        batch_size: Images per denoiser call.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        processes: Processes,
        progress: Progress,
        spread: Spread | None = None,
    ) -> None:
        """Chooses the prompts.

        Args:
            config: Size, seed and kinds of sampling.
            prompts: The source.
            batch_size: Images per denoiser call.
            processes: Who shares the work.
            progress: Shows the batches.
            spread: Measures how different the images are; None for not.
        """
        self.sources = chosen_prompts(config, prompts)
        self.prompts = [prompt for prompt in self.sources for _ in range(config.images_per_prompt)]
        self._config = config
        self.batch_size = batch_size
        self._processes = processes
        self._progress = progress
        self._spread = spread
        self._forgetting = Forgetting(config.forgetting) if config.forgetting else None

    def batches(self, rank: int, count: int) -> list[range]:
        """The images of each denoiser batch of one of `count` processes, which shares whole prompts with the others."""
        group = self._config.images_per_prompt
        prompts = share(len(self.prompts) // group, rank=rank, count=count)
        own = range(prompts.start * group, prompts.stop * group)
        return [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]

    def seeds(self, indices: Sequence[int]) -> Tensor:
        """Seeds of the given images, (len(indices),) int64; training has none of them, whatever its seed."""
        return sample_seeds(self._config.seed, 0, indices, purpose=Purpose.EVALUATION)

    def slots(self, prompts: Sequence[Prompt], num_images: int) -> list[ImageSlot]:
        """Slots for images of some prompts: the evaluation's own where it has them, else behind the evaluation's."""
        group = self._config.images_per_prompt
        known = [_identity(prompt) for prompt in self.prompts[::group]]
        known += [key for key in dict.fromkeys(map(_identity, prompts)) if key not in known]
        return [
            ImageSlot(prompt=prompt, index=known.index(_identity(prompt)) * group + i)
            for prompt in prompts
            for i in range(num_images)
        ]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each of the E images."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def metadata(self) -> tuple[Mapping[str, object], ...]:
        """What came with the prompt of each of the E images."""
        return tuple(prompt.metadata for prompt in self.prompts)

    def __call__(self, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None, *, epoch: int) -> Evaluation:
        """Samples and measures.

        Args:
            policy: At the weights to be measured, with the evaluation's sampler.
            reward: What is optimised; reported with its present scales (`Evaluation.rescored` changes them).
            heldout: What is only measured; None for nothing.
            epoch: Finished epochs, which set the weights in the total.

        Returns:
            The evaluation, the same on every process.

        Raises:
            RewardError: A reward failed on some process, or reports other components there; raised on all.
        """
        values, images = self._measure(policy, reward, heldout, epoch=epoch, label="evaluating")
        if self._forgetting is not None:
            values[FORGETTING] = self._forgotten(policy, self._forgetting)
        if self._spread is not None:
            values |= self._spread(images.float() / 255, self._config.images_per_prompt)
        if self._config.ode and policy.schedule.stochastic_steps:
            noise_free, _ = self._measure(policy.noise_free, reward, heldout, epoch=epoch, label="evaluating (ODE)")
            values |= {f"ode/{name}": value for name, value in noise_free.items()}
        return Evaluation(values=values, images=images, prompts=self.texts)

    def _measure(
        self, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None, *, epoch: int, label: str
    ) -> tuple[dict[str, Tensor], Tensor]:
        ranks = [self.batches(rank, self._processes.count) for rank in range(self._processes.count)]
        own, most = ranks[self._processes.rank], max(map(len, ranks))
        videos = any(one.scores_videos for one in (reward, heldout) if one is not None)
        groupwise = reward.groupwise or (heldout is not None and heldout.groupwise)
        buffer = GroupBuffer(self._config.images_per_prompt if groupwise else 1)
        sampled: list[dict[str, Tensor]] = []
        scored: list[dict[str, Tensor]] = []
        for indices in self._progress.track([*own, *[range(0)] * (most - len(own))], label):
            self._processes.safe_point("evaluation")
            # A split network computes with all processes or none: one that has no image left makes one to throw away.
            images, samples, kl = self._sample(policy, indices or range(1), videos=videos)
            failure: RewardError | None = find_non_finite(images, samples.trajectory.final, samples.prompts)
            if indices and failure is None:
                sampled.append({**kl, _IMAGES: (middle_frame(images) * 255).round().to(torch.uint8).cpu()})
                try:
                    for batch in buffer.add(images, samples.prompts, samples.metadata):
                        with named_by_number(own[0].start + batch.start, len(batch.prompts)):
                            scored.append(_scored(batch, reward, heldout))
                        _check_alike(scored[0], scored[-1])
                except RewardError as error:
                    failure = error
            fail_together(self._processes, failure)
        own_values = _joined(scored) | _joined(sampled)
        everyones = [part for part in self._processes.gather_tensors(own_values) if part]  # a process may have no image
        for part in everyones:
            _check_alike(everyones[0], part)
        values = _joined(everyones)
        images = values.pop(_IMAGES)
        if reward.terms:
            values["reward"] = reward.total(values, self.texts, epoch=epoch).float()
        if self._config.images_per_prompt > 1:
            name = "pixel_diversity" if "diversity" in values else "diversity"  # a reward may be called so
            values[name] = diversity(images.float() / 255, self._config.images_per_prompt)
        return values, images

    def _forgotten(self, policy: Policy, forgetting: Forgetting) -> Tensor:
        """The denoising loss of what the pretrained model makes, (E,)."""
        ranks = [self.batches(rank, self._processes.count) for rank in range(self._processes.count)]
        own, most = ranks[self._processes.rank], max(map(len, ranks))
        found = []
        for indices in self._progress.track([*own, *[range(0)] * (most - len(own))], "evaluating (forgetting)"):
            self._processes.safe_point("evaluation")
            chosen = [self.prompts[i] for i in indices or range(1)]
            condition = policy.encode([one.text for one in chosen], [one.metadata for one in chosen])
            losses = forgetting(policy, condition, self.seeds(indices or range(1)))
            found.append(losses[: len(indices)])
        return self._processes.gather(torch.cat(found))

    def _sample(self, policy: Policy, indices: range, *, videos: bool) -> tuple[Tensor, Samples, dict[str, Tensor]]:
        """Images of some of the set, what they were decoded from, and their path KL where it was measured."""
        with_kl = bool(policy.schedule.stochastic_steps)
        samples = sample_images(policy, [self.prompts[i] for i in indices], self.seeds(indices), with_kl=with_kl)
        final, kl = samples.trajectory.final, samples.trajectory.kl
        images = policy.decode_frames(final) if videos else policy.decode(final)
        return images, samples, {} if kl is None else {KL: kl.sum(1).cpu().float(), **_noise_free(policy, samples)}


def _noise_free(policy: Policy, samples: Samples) -> dict[str, Tensor]:
    """What the weights did in steps without noise, where there are any, (B,) by its name.

    In steps that the chain leaves to the ODE, the KL that all steps would have with the sampler's full noise; in those
    that have no noise even then, how far they have moved.
    """
    path = samples.trajectory
    values: dict[str, Tensor] = {}
    if steps_left_to_the_ode(policy, path.schedule) is not None:
        values[FULL_NOISE_KL] = full_noise_kl(policy, path).sum(1)
    if policy.full_noise.schedule.unseen_steps:
        values[DISPLACEMENT] = displacement(policy, path)
    return {name: value.cpu().float() for name, value in values.items()}


def _scored(batch: ImageBatch, reward: WeightedSum, heldout: WeightedSum | None) -> dict[str, Tensor]:
    """Raw components of the rewards and of the held-out ones for some images, (B,) float32 each."""
    values = reward.components(batch.images, batch.prompts, batch.metadata, batch.groups)
    if heldout is not None:
        held = heldout.components(batch.images, batch.prompts, batch.metadata, batch.groups)
        values |= {f"{_HELDOUT}{name}": value for name, value in held.items()}
    return {name: value.float() for name, value in values.items()}


def _check_alike(first: Iterable[str], names: Iterable[str]) -> None:
    """Raises RewardError, which names the reward, where batches have different measures."""
    for held in (False, True):
        check_components(
            *([name.removeprefix(_HELDOUT) for name in batch if name.startswith(_HELDOUT) == held]
              for batch in (first, names))
        )  # fmt: skip


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of equal names, concatenated; nothing for no parts."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}


def sample_images(policy: Policy, prompts: Sequence[Prompt], seeds: Tensor, *, with_kl: bool = False) -> Samples:
    """Samples one batch, of which the clean latents are kept.

    Args:
        policy: What to sample from.
        prompts: B of them.
        seeds: (B,) int64.
        with_kl: Whether to measure the KL to the pretrained model. Where trained weights make steps without noise, all
            states are then kept, to ask what they do there.
    """
    keep = Keep.ALL if with_kl and policy.schedule.unseen_steps else Keep.FINAL
    texts, given = tuple(prompt.text for prompt in prompts), [prompt.metadata for prompt in prompts]
    trajectory = rollout(policy, policy.encode(texts, given), seeds, with_kl=with_kl, keep=keep)
    return Samples(prompts=texts, metadata=policy.rewards_metadata(texts, given), trajectory=trajectory)


def diversity(images: Tensor, images_per_prompt: int) -> Tensor:
    """Mean pixel distance between images of one prompt, one number for each of the P prompts, (P,) in [0, 1].

    Args:
        images: (E, 3, H, W) in [0, 1], images of a prompt next to each other.
        images_per_prompt: G, at least 2.

    Returns:
        Root mean square difference over pixels, averaged over the G (G - 1) / 2 pairs of the prompt.
    """
    groups = images.flatten(1).unflatten(0, (-1, images_per_prompt))
    distance = torch.cdist(groups, groups) / math.sqrt(groups.shape[-1])
    pairs = images_per_prompt * (images_per_prompt - 1)
    return distance.sum((1, 2)) / pairs


def chosen_prompts(config: EvaluationConfig, source: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of the evaluation set: `num_prompts`, spread evenly over the source."""
    count = min(config.num_prompts, len(source))
    return [source[i * len(source) // count] for i in range(count)]


def evaluation_prompts(config: Config) -> list[Prompt]:
    """The evaluation source, by default the training one."""
    return load_prompts(config.evaluation.prompts or config.prompts)
