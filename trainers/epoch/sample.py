"""The first verb of an epoch: encode, roll out and decode, batch by batch.

N samples per epoch over all processes, in groups of G per prompt: sample i has group i // G, and seed (run, epoch, i)
unless the noises of a group belong together (`ddpo.seeds`).
Batches are made when they are asked for, so that rewards score one while the next is sampled.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ddpo import Policy, Samples, Trajectory, rollout
from ddpo.contenders import predicted_clean, with_contenders
from ddpo.objectives.base import Demand, Weights, trained_view
from ddpo.path_kl import SHARE, draw_sites, steps_left_to_the_ode
from ddpo.pipeline.features import FeatureReader
from ddpo.placement import pinned
from ddpo.seeds import GroupNoise, Purpose, group_seeds, one_seed
from ddpo.steered import Steering, steered_trajectory
from ddpo.steering import Steer
from ddpo.steering.base import weights_of
from ddpo.steering.reading import Reading
from ddpo.trajectory import Sites
from trainers.config.groups import DistributedConfig
from trainers.epoch.path_kl import EpochKL, estimated_hidden_kl, estimated_kl, measured_kl
from trainers.parallel.processes import Processes
from trainers.parallel.sharding import gathered
from trainers.planning.plan import BatchPlan
from trainers.prompts import Prompt
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress

Glimpse = int | tuple[int, int]
"""What of a chain a predicted clean image belongs to: a step, or a contender of a contended one."""


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Clean latents and their images.

    Attributes:
        latents: (B, *latent).
        images: (B, 3, H, W), or (B, F, 3, H, W) where rewards are given all frames, in [0, 1].
    """

    latents: Tensor
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """B samples of an epoch and what rewards see of them.

    Attributes:
        samples: Stored as they wait for training.
        final: The samples' own images.
        predicted: By step, what the policy saw of the clean image before it; by (contended step, contender), numbers
            from 0, what it sees after that contender.
        features: The denoiser's own of each step, (B, T, F); None where nobody reads them.
    """

    samples: Samples
    final: Decoded
    predicted: Mapping[Glimpse, Decoded]
    features: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What sampling shares over the epochs of a run.

    Attributes:
        policy: What is sampled from.
        old: Weights to sample with in place of the policy's own; None for these.
        demand: What the objective needs of the samples.
        plan: Sizes of the batches.
        predict_at: Steps before which the predicted clean image is decoded too.
        kl_of_all: Whether the KL to the pretrained model is measured at every step of every sample; else it is
            estimated.
        follows_kl: Whether something moves with that KL; what steps that an epoch leaves to the ODE would add to it is
            then measured of all samples too, else of a few.
        group_noise: How the noises of a group belong together.
        steering: Towards the rewards; None for none. Steered samples are not the policy's: they have no path KL.
        keep_on: Where latents and conditions wait for training.
        distributed: How the network is shared.
        seed: Of the run.
        processes: Who shares the epoch.
        progress: Shows the batches.
        reader: Reads the denoiser's features; None for no features.
        videos: Whether rewards are given all frames.
    """

    policy: Policy
    old: Weights | None
    demand: Demand
    plan: BatchPlan
    predict_at: Sequence[int]
    kl_of_all: bool
    follows_kl: bool
    group_noise: GroupNoise
    steering: Steering | None
    keep_on: Literal["device", "cpu"]
    distributed: DistributedConfig
    seed: int
    processes: Processes
    progress: Progress
    reader: FeatureReader | None = None
    videos: bool = False

    def __call__(self, prompts: Sequence[Prompt], *, epoch: int, clock: Stopwatch) -> Iterator[SampledBatch]:
        """Samples this process's part of an epoch.

        Args:
            prompts: Of all N samples.
            epoch: Finished epochs.
            clock: Takes the seconds of `sample` and `decode`.

        Raises:
            Interrupted: A signal has reached some process.
        """
        policy = self.policy.at(self.policy.schedule_of(epoch, seed=self.seed))
        own = self.processes.share(len(prompts))
        with clock("sample"):
            policy.prefetch(*_texts(prompts[own.start : own.stop]))
        sites, start = self._sites(policy, epoch=epoch), own.start
        for size in self.progress.track(self.plan.sample_batches, "sampling"):
            self.processes.safe_point("sampling")
            if size > 0:
                places = range(start, start + size)
                own_sites = None if sites is None else sites.within(places)
                yield self._batch(policy, prompts[start : start + size], places, own_sites, epoch=epoch, clock=clock)
            start += size

    @property
    def contests(self) -> list[tuple[int, int]]:
        """The contended steps and contenders whose predicted images are scored, numbers from 0."""
        steps = self.demand.contended(self.plan.num_stochastic)
        return [(c, j) for c in range(steps) for j in range(self.demand.contenders)]

    @torch.no_grad()
    def _batch(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        places: range,
        sites: Sites | None,
        *,
        epoch: int,
        clock: Stopwatch,
    ) -> SampledBatch:
        texts, metadata = _texts(prompts)
        features: list[Tensor] = []
        reading = Steer() if self.reader is None else Reading(reader=self.reader, features=features)
        with clock("sample"):
            condition = policy.encode(texts, metadata)
            seeds, priors = group_seeds(self.group_noise, self.seed, epoch, places, group_size=self.plan.group_size)
            with gathered(policy, self.distributed), self._weights(policy):
                if self.steering is not None:
                    path = steered_trajectory(policy, texts, metadata, seeds, steering=self.steering)
                else:
                    with nullcontext() if self.reader is None else self.reader.reading():
                        path = rollout(
                            policy,
                            condition,
                            seeds,
                            recorded=trained_view(policy, self.demand),
                            with_kl=self.kl_of_all,
                            keep=self.demand.keep,
                            means=self.demand.means,
                            reference_means=self.plan.keeps_reference,
                            sites=sites,
                            steer=reading,
                            latents=None if priors is seeds else policy.prior(priors),
                        )
                predicted: dict[Glimpse, Tensor] = {}
                for k in self.predict_at:
                    with weights_of(policy, k):
                        predicted[k] = policy.predict(k, path.state(k), path.condition).x0
                if self.contests:
                    steps, count = self.demand.contended(self.plan.num_stochastic), self.demand.contenders
                    path = with_contenders(path, steps=steps, count=count)
                    for c, j in self.contests:
                        predicted[c, j] = predicted_clean(policy, path, step=c, contender=j)
        with clock("decode"):
            decode = policy.decode_frames if self.videos else policy.decode
            final, *others = (
                Decoded(latents=latents, images=decode(latents)) for latents in (path.final, *predicted.values())
            )
        stored = path.kept_on_cpu() if self.keep_on == "cpu" else path
        return SampledBatch(
            samples=Samples(prompts=texts, metadata=policy.rewards_metadata(texts, metadata), trajectory=stored),
            final=final,
            predicted=dict(zip(predicted, others, strict=True)),
            features=_stacked(features, on_cpu=self.keep_on == "cpu"),
        )

    def path_kl(self, trajectory: Trajectory) -> EpochKL | None:
        """The KL of what sampled to the pretrained model, over all processes; None without noise, and where steered.

        Args:
            trajectory: Of this process.
        """
        if self.steering is not None or not trajectory.schedule.stochastic_steps:
            return None
        policy, hidden = trained_view(self.policy, self.demand), steps_left_to_the_ode(self.policy, trajectory.schedule)
        size, in_step = self.plan.sample_batches[0], self.distributed.strategy != "ddp"
        with gathered(self.policy, self.distributed), self._weights(self.policy):
            if trajectory.kl is not None:
                kl = measured_kl(trajectory, self.processes)
            else:
                kl = estimated_kl(policy, trajectory, self.processes, batch_size=size, in_step=in_step)
            if hidden is None:
                return kl
            rest = estimated_hidden_kl(policy, trajectory, hidden, self.processes, batch_size=size, in_step=in_step)
        return replace(kl, full_noise=kl.mean + rest)

    def _sites(self, policy: Policy, *, epoch: int) -> Sites | None:
        """Where the KL of an epoch is estimated; None where it is measured everywhere, or nowhere.

        Steps that the epoch leaves to the ODE have sites of their own.
        """
        if self.steering is not None:
            return None
        hidden = steps_left_to_the_ode(policy, policy.schedule)
        parts = [] if self.kl_of_all else [(policy.schedule, SHARE)]
        parts += [] if hidden is None else [(hidden, 1.0 if self.follows_kl else SHARE)]
        if not policy.schedule.stochastic_steps or not parts:
            return None
        count, seed = self.plan.images_per_epoch, one_seed(self.seed, epoch, purpose=Purpose.SITES)
        return Sites.join([draw_sites(count, schedule, share=share, seed=seed) for schedule, share in parts])

    def _weights(self, policy: Policy) -> AbstractContextManager[None]:
        return nullcontext() if self.old is None else policy.using(self.old)


def _stacked(features: Sequence[Tensor], *, on_cpu: bool) -> Tensor | None:
    """Features of each step as those of samples, (B, T, F), where trajectories wait; None for none."""
    if not features:
        return None
    of_samples = torch.stack(list(features), dim=1)
    return pinned(of_samples) if on_cpu else of_samples


def _texts(prompts: Sequence[Prompt]) -> tuple[tuple[str, ...], list[Mapping[str, object]]]:
    return tuple(prompt.text for prompt in prompts), [prompt.metadata for prompt in prompts]
