"""A source of epochs that samples nothing: images that were judged already, as latents, with their scores."""

from pathlib import Path

import torch

from ddpo import Policy, Samples, Trajectory, sample_seeds
from ddpo.objectives import Experience
from trainers.epoch.binding import Collected, Source
from trainers.epoch.state import TrainState
from trainers.offline.latents import LatentStore
from trainers.offline.read import OfflineConfig, count_cropped, images_of, scores_of
from trainers.parallel.processes import Processes
from trainers.planning.plan import BatchPlan
from trainers.tracking.metrics import Stopwatch
from trainers.tracking.progress import Progress


def offline(
    state: TrainState, plan: BatchPlan, *, judged: OfflineConfig, processes: Processes, progress: Progress
) -> Source:
    """Judged images in the order of the run's stream: a group is an entry, whose images share a prompt.

    Says how many of them are cropped.

    Args:
        state: The run; its position in the stream moves on.
        plan: Sizes of an epoch.
        judged: Where they are, and where their latents are cached.
        processes: Who shares an epoch.
        progress: Says it, and shows the batches.
    """
    config, policy = state.config, state.policy
    folder = config.run.folder / "latents" if judged.cache is None else Path(judged.cache).expanduser()
    store = LatentStore(policy, folder)
    cropped, files = count_cropped(state.prompts.entries, store.size)
    if cropped:
        width, height = store.size
        progress.line(
            f"offline: {cropped} of {files} image files are not {width} x {height}: the middle of each is cut out at "
            "that shape and scaled"
        )

    def source(epoch: int, clock: Stopwatch) -> Collected:
        entries = state.prompts.draw(plan.groups_per_epoch)
        prompts = tuple(entry for entry in entries for _ in range(plan.group_size))
        images = [image for entry in entries for image in images_of(entry)]
        scores = torch.tensor([score for entry in entries for score in scores_of(entry)])
        own = processes.share(len(prompts))
        latents, start = [], own.start
        with clock("encode"):
            for size in progress.track(plan.sample_batches, "encoding"):
                processes.safe_point("sampling")
                if size > 0:
                    latents.append(store(images[start : start + size]))
                start += size
            texts = tuple(prompt.text for prompt in prompts[own.start : own.stop])
            path = _path(policy, torch.cat(latents), texts, own, epoch=epoch, seed=config.seed)
        if config.batch.trajectories == "cpu":
            path = path.kept_on_cpu()
        experience = Experience(
            samples=Samples(prompts=texts, metadata=({},) * len(texts), trajectory=path),
            start=own.start,
            scores=scores,
            groups=torch.arange(len(prompts)) // plan.group_size,
            advantages=(2 * scores - 1)[own.start : own.stop, None].to(policy.device).expand_as(path.log_probs),
            kl_weight=torch.zeros(len(texts), device=policy.device),
            penalised=False,
        )
        return Collected(prompts=prompts, experience=experience)

    return source


def _path(
    policy: Policy, latents: torch.Tensor, texts: tuple[str, ...], own: range, *, epoch: int, seed: int
) -> Trajectory:
    """Chains of which only the clean latents are known."""
    policy = policy.at(policy.schedule_of(epoch, seed=seed))
    return Trajectory(
        latents=latents[:, None].to(policy.device),
        log_probs=torch.zeros(len(texts), policy.schedule.num_steps, dtype=torch.float64, device=policy.device),
        kl=None,
        condition=policy.encode(texts),
        seeds=sample_seeds(seed, epoch, own),
        schedule=policy.schedule,
    )
