"""Measures a policy on fixed prompts and seeds: rewards, held-out rewards, path KL, diversity, with and without noise.

E images: every prompt of the evaluation set `images_per_prompt` times, in that order, each with its own fixed seed, so
that two evaluations differ by the weights alone and compare image by image.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo import Condition, Policy, Trajectory, rollout, sample_seeds
from ddpo.input_images import IMAGE
from rewards import RewardError, WeightedSum
from rewards.base import check_components
from trainers.config import Config
from trainers.config_groups import EvaluationConfig
from trainers.decoded import find_non_finite
from trainers.grouping import GroupBuffer, ImageBatch
from trainers.plan import share
from trainers.processes import Processes
from trainers.progress import Progress
from trainers.prompts import Prompt, load_prompts
from trainers.scoring import fail_together

KL = "kl (nats)"
_IMAGES = "images"
_HELDOUT = "heldout/"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A mean over images (or prompts) with its standard error; `None` where one image leaves it undefined."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Tensor) -> "Measure":
        """Mean and standard error of values (n,), taken as independent."""
        values = values.double()
        error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(mean=float(values.mean()), error=error)

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + ("" if self.error is None else f" ± {self.error:.2g}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was measured.

    Attributes:
        values: By name: `reward` (the optimised total), raw components, `heldout/...`, `kl (nats)` (where sampling has
            noise), the same noise-free under `ode/...`, each (E,) float32; and `diversity`, one for each prompt
            (`pixel_diversity` beside a reward of that name).
        images: The images, by the evaluation's sampler, (E, 3, H, W) uint8.
        prompts: E texts.
    """

    values: dict[str, Tensor]
    images: Tensor
    prompts: tuple[str, ...]

    def summary(self) -> dict[str, Measure]:
        """Mean and standard error by name, in the order to read them."""
        return {name: Measure.of(self.values[name]) for name in sorted(self.values, key=_reading_order)}

    def pictures(self) -> Tensor:
        """The images as (E, 3, H, W) float32 in [0, 1]."""
        return self.images.float() / 255

    def rescored(self, reward: WeightedSum) -> "Evaluation":
        """The same images with `reward` recomputed by the present scales, for comparison with a later evaluation."""
        values = dict(self.values)
        for prefix in ("", "ode/"):
            if f"{prefix}reward" in values:
                components = {r.name: values[f"{prefix}{r.name}"] for r in reward.rewards}
                values[f"{prefix}reward"] = reward.total(components, self.prompts)
        return replace(self, values=values)

    def save(self, folder: Path, name: str) -> None:
        """Writes `<name>.safetensors`: values and images."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"value.{key}": value for key, value in self.values.items()}
        save_file({**tensors, "images": self.images}, folder / f"{name}.safetensors")

    @classmethod
    def load(cls, folder: Path, name: str, prompts: Sequence[str]) -> "Evaluation":
        """Reads what `save` wrote; `prompts` are the evaluation set's E texts."""
        tensors = load_file(folder / f"{name}.safetensors")
        images = tensors.pop("images")
        values = {key.removeprefix("value."): value for key, value in tensors.items()}
        return cls(values=values, images=images, prompts=tuple(prompts))


def _reading_order(name: str) -> tuple[int, str]:
    """The optimised reward first, then its parts, what was held out, KL, diversity, and noise-free sampling."""
    order = ("reward", "heldout/", KL, "diversity", "ode/")
    rank = next((place for place, prefix in enumerate(order) if name.startswith(prefix)), 0)
    return (rank, "" if name == "reward" else name)


Place = tuple[Prompt, int]
"""A prompt, and the index in the evaluation set whose noise its image has."""


def place_key(place: Place) -> tuple[str, str, int]:
    """What tells two places apart: text, input image and index."""
    prompt, index = place
    return (*_identity(prompt), index)


def _identity(prompt: Prompt) -> tuple[str, str]:
    return prompt.text, str(prompt.metadata.get(IMAGE, ""))


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
    ) -> None:
        """Chooses the prompts.

        Args:
            config: Size, seed and kinds of sampling.
            prompts: The source.
            batch_size: Images per denoiser call.
            processes: Who shares the work.
            progress: Shows the batches.
        """
        self.sources = chosen_prompts(config, prompts)
        self.prompts = [prompt for prompt in self.sources for _ in range(config.images_per_prompt)]
        self._config = config
        self.batch_size = batch_size
        self._processes = processes
        self._progress = progress

    def batches(self, rank: int, count: int) -> list[range]:
        """The images of each denoiser batch of one of `count` processes, which shares whole prompts with the others."""
        group = self._config.images_per_prompt
        prompts = share(len(self.prompts) // group, rank=rank, count=count)
        own = range(prompts.start * group, prompts.stop * group)
        return [own[start : start + self.batch_size] for start in range(0, len(own), self.batch_size)]

    def seeds(self, indices: Sequence[int]) -> Tensor:
        """Seeds of the given images, (len(indices),) int64."""
        return sample_seeds(self._config.seed, 0, indices)

    def places(self, prompts: Sequence[Prompt], num_images: int) -> "list[Place]":
        """Places of images of some prompts: where the evaluation has them, else behind the evaluation's."""
        group = self._config.images_per_prompt
        known = [_identity(prompt) for prompt in self.prompts[::group]]
        known += [key for key in dict.fromkeys(map(_identity, prompts)) if key not in known]
        return [(p, known.index(_identity(p)) * group + i) for p in prompts for i in range(num_images)]

    @property
    def texts(self) -> tuple[str, ...]:
        """The text of each of the E images."""
        return tuple(prompt.text for prompt in self.prompts)

    @property
    def metadata(self) -> tuple[Mapping[str, object], ...]:
        """What came with the prompt of each of the E images."""
        return tuple(prompt.metadata for prompt in self.prompts)

    def __call__(self, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None) -> Evaluation:
        """Samples and measures.

        Args:
            policy: At the weights to be measured, with the evaluation's sampler.
            reward: What is optimised; reported with its present scales.
            heldout: What is only measured; None for nothing.

        Returns:
            The evaluation, the same on every process.

        Raises:
            RewardError: A reward failed on some process, or reports other components there; raised on all.
        """
        values, images = self._measure(policy, reward, heldout, ode=False)
        if self._config.ode and policy.schedule.stochastic_steps:
            noise_free, _ = self._measure(policy, reward, heldout, ode=True)
            values |= {f"ode/{name}": value for name, value in noise_free.items()}
        return Evaluation(values=values, images=images, prompts=self.texts)

    def _measure(
        self, policy: Policy, reward: WeightedSum, heldout: WeightedSum | None, *, ode: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        ranks = [self.batches(rank, self._processes.count) for rank in range(self._processes.count)]
        own, most = ranks[self._processes.rank], max(map(len, ranks))
        groupwise = reward.groupwise or (heldout is not None and heldout.groupwise)
        buffer = GroupBuffer(self._config.images_per_prompt if groupwise else 1)
        label = "evaluating (ODE)" if ode else "evaluating"
        sampled: list[dict[str, Tensor]] = []
        scored: list[dict[str, Tensor]] = []
        for indices in self._progress.track([*own, *[range(0)] * (most - len(own))], label):
            self._processes.safe_point("evaluation")
            # A split network computes with all processes or none: who has no image left makes one that is not used.
            images, latents, condition, kl = self._sample(policy, indices or range(1), ode=ode)
            failure: RewardError | None = find_non_finite(images, latents, condition.prompts)
            if indices and failure is None:
                sampled.append({**kl, _IMAGES: (images * 255).round().to(torch.uint8).cpu()})
                try:
                    for batch in buffer.add(images, condition.prompts, condition.metadata):
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
        if self._config.images_per_prompt > 1:
            name = "pixel_diversity" if "diversity" in values else "diversity"  # a reward may be called so
            values[name] = diversity(images.float() / 255, self._config.images_per_prompt)
        return values, images

    def _sample(
        self, policy: Policy, indices: range, *, ode: bool
    ) -> tuple[Tensor, Tensor, Condition, dict[str, Tensor]]:
        """Images of some of the set, their latents and condition, and their path KL where it was measured."""
        with policy.noise_free() if ode else nullcontext():
            with_kl = bool(policy.schedule.stochastic_steps)
            trajectory = sample_images(policy, [self.prompts[i] for i in indices], self.seeds(indices), with_kl=with_kl)
            images = policy.decode(trajectory.final)
        kl = {} if trajectory.kl is None else {KL: trajectory.kl.sum(1).cpu().float()}
        return images, trajectory.final, trajectory.condition, kl


def _scored(batch: ImageBatch, reward: WeightedSum, heldout: WeightedSum | None) -> dict[str, Tensor]:
    """Total, raw components and held-out rewards of some images, (B,) float32 each."""
    scores = reward(batch.images, batch.prompts, batch.metadata, batch.groups)
    values = {"reward": scores.total, **scores.components}
    if heldout is not None:
        held = heldout(batch.images, batch.prompts, batch.metadata, batch.groups)
        values |= {f"{_HELDOUT}{name}": value for name, value in held.components.items()}
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


def sample_images(policy: Policy, prompts: Sequence[Prompt], seeds: Tensor, *, with_kl: bool = False) -> Trajectory:
    """Samples one batch.

    Args:
        policy: What to sample from.
        prompts: B of them.
        seeds: (B,) int64.
        with_kl: Whether to measure the KL to the pretrained model.
    """
    condition = policy.encode([prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts])
    return rollout(policy, condition, seeds, with_kl=with_kl)


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
