"""What holds the weights to the start of a run: made once, then added to the gradient of every update.

The model at the start is the trained parameters' values before the first update, whatever they are now: they are put in
its place while it samples and while its Fisher information is measured, so that a run that goes on from a checkpoint
can make again what is missing. Both are kept in the run folder.

N samples of the model at the start.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpo import Policy
from ddpo.objectives.noising import draw_noises, step_shares
from ddpo.regularization import (
    Curvature,
    RegularizationConfig,
    add_pull,
    denoising_losses,
    noised_output,
    quadratic,
    summed_fisher,
    unclipped,
)
from ddpo.rollout import rollout
from ddpo.seeds import Purpose, fill_normal, one_seed, random_orders, sample_seeds, stream
from ddpo.trajectory import Condition, Keep
from trainers.config import Config
from trainers.epoch.state import TrainState
from trainers.offline.captioned import read_captioned
from trainers.offline.latents import LatentStore
from trainers.parallel.processes import Processes
from trainers.parallel.shares import share
from trainers.prompts import Prompt
from trainers.run_folder import ledger
from trainers.run_folder.mending import START
from trainers.tracking.metrics import Means
from trainers.tracking.progress import Progress

SAMPLES, FISHER = f"{START}/samples.safetensors", f"{START}/fisher.safetensors"
_LATENTS = "latents"
_EPOCH = -1  # of the samples of the start: no epoch of training has their seeds
_DRAWS = 1 << 40  # numbers of the streams of updates, beyond those of passes
_STATES = 1 << 41  # and of the Fisher information


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Clean latents and what they are of.

    Attributes:
        clean: (N, *latent) on the CPU.
        prompts: N of them.
    """

    clean: Tensor
    prompts: tuple[Prompt, ...]

    def condition(self, policy: Policy, rows: Tensor) -> Condition:
        """Of some of them, given their numbers."""
        chosen = [self.prompts[row] for row in rows.tolist()]
        return policy.encode([prompt.text for prompt in chosen], [prompt.metadata for prompt in chosen])


@dataclass(frozen=True, kw_only=True)
class Regularizer:
    """The terms of a run.

    Attributes:
        config: Their strengths.
        parameters: What is trained.
        start: Its values at the start.
        fisher: Diagonal Fisher information there; None without `ewc`.
        pictures: For the denoising loss; None without it.
        batch_size: Noised images at a time on a device.
        seed: Of the run.
        processes: Who shares an update.
    """

    config: RegularizationConfig
    parameters: Mapping[str, nn.Parameter]
    start: Mapping[str, Tensor]
    fisher: Mapping[str, Tensor] | None
    pictures: Pictures | None
    batch_size: int
    seed: int
    processes: Processes

    def denoise(self, policy: Policy, scaler: torch.amp.GradScaler, *, update: int) -> dict[str, Tensor]:
        """Adds this process's part of the gradient of the denoising loss to `.grad`; returns the losses it is of.

        Args:
            policy: That is trained.
            scaler: Of the losses.
            update: How many the run has taken: what is drawn depends on it and the run's seed alone.
        """
        if self.pictures is None:
            return {}
        policy, options = unclipped(policy), self.config.denoising
        losses = []
        rows, steps, eps = self._drawn(policy, update)
        own = share(len(rows), rank=self.processes.rank, count=self.processes.count)
        for part in torch.arange(own.start, own.stop).split(self.batch_size) if len(own) else ():
            clean = self.pictures.clean[rows[part]].to(policy.device)
            condition = self.pictures.condition(policy, rows[part])
            noise, at = eps[part].to(policy.device), steps[part].to(policy.device)
            loss = denoising_losses(policy, at, clean, noise, condition)
            scaler.scale(options.strength * loss.sum() / len(rows)).backward()
            losses.append(loss.detach())
        none = torch.zeros(0, device=policy.device)
        return {"denoising": torch.cat(losses) if losses else none}

    def _drawn(self, policy: Policy, update: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures (M,), steps (M,) and noises (M, *latent) of an update, over all processes, on the CPU."""
        assert self.pictures is not None, "there is a denoising loss"
        count = len(self.pictures.clean)
        seed = one_seed(self.seed, update, _DRAWS, purpose=Purpose.PASS)
        size = self.config.denoising.batch_size
        turns = -(-size // count)
        rows = random_orders(turns, count, stream(seed)).flatten()[:size]
        shares = step_shares(policy.schedule, "grid", skip=0)
        places = list(range(size))
        steps, eps = draw_noises(seed, places, places, shares, strata=size, like=self.pictures.clean[rows])
        return rows, steps, eps

    def pull(self, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
        """Adds the gradients of the quadratics to `.grad`, the same on every process; returns their values, (1,)."""
        scale = float(scaler.get_scale()) if scaler.is_enabled() else 1.0
        values = {}
        for name, strength, curvature in self._quadratics():
            values[name] = strength * quadratic(self.parameters, self.start, curvature)[None]
            add_pull(self.parameters, self.start, curvature, scale=scale * strength)
        return values

    def _quadratics(self) -> Iterator[tuple[str, float, Curvature]]:
        if self.config.l2:
            yield "l2", self.config.l2, 1.0
        if self.fisher is not None:
            yield "ewc", self.config.ewc.strength, self.fisher


def add_measured(into: Means, values: Mapping[str, Tensor]) -> None:
    """Takes what the terms measured into the epoch's means."""
    into.add({f"regularization/{name}": value for name, value in values.items()}, None)


# ---- made once -------------------------------------------------------------------------------------------------------


def make_regularizer(state: TrainState, run: Path, *, processes: Processes, progress: Progress) -> Regularizer | None:
    """The terms that a run's configuration asks for; None for none.

    Args:
        state: Of the run, at any epoch.
        run: Its folder, in which samples and Fisher information are looked for and kept.
        processes: Who shares the work.
        progress: Shows it.

    Raises:
        Interrupted: A signal has reached some process.
        UserError: An image cannot be read or encoded.
    """
    config, policy = state.config, state.policy
    options = config.regularization
    if not options.is_on:
        return None
    assert state.start_weights is not None, "it was copied before anything was trained"
    maker = _Maker(state=state, run=run, processes=processes, progress=progress)
    own = maker.samples() if options.own_samples else None
    pictures = None
    if options.denoising.strength:
        folder = options.denoising.images
        pictures = own if folder is None else encoded(policy, config, folder)
    return Regularizer(
        config=options,
        parameters=policy.trainable(),
        start=state.start_weights,
        fisher=maker.fisher(own) if own is not None and options.ewc.strength else None,
        pictures=_first(pictures, options.denoising.samples),
        batch_size=config.batch.train_batch_size,
        seed=config.seed,
        processes=processes,
    )


def _first(pictures: Pictures | None, count: int) -> Pictures | None:
    """So many of them, spread evenly; all where there are fewer."""
    if pictures is None or len(pictures.clean) <= count:
        return pictures
    rows = [i * len(pictures.clean) // count for i in range(count)]
    return Pictures(clean=pictures.clean[rows], prompts=tuple(pictures.prompts[row] for row in rows))


def encoded(policy: Policy, config: Config, folder: str) -> Pictures:
    """The images of a folder as latents, kept where those of judged images are."""
    entries = read_captioned(folder)
    store = LatentStore(policy, config.run.folder / "latents")
    return Pictures(clean=store([image for image, _ in entries]), prompts=tuple(prompt for _, prompt in entries))


@dataclass(frozen=True, kw_only=True)
class _Maker:
    state: TrainState
    run: Path
    processes: Processes
    progress: Progress

    def samples(self) -> Pictures:
        """Samples of the model at the start, by its conditional branch, of the run's prompts, evenly."""
        config, entries = self.state.config, self.state.prompts.entries
        count = config.regularization.own_samples
        prompts = tuple(entries[i * len(entries) // count] for i in range(count))
        if config.offline is not None:  # their metadata are judgements
            prompts = tuple(Prompt(text=prompt.text) for prompt in prompts)
        kept = self._kept(SAMPLES, lambda: {_LATENTS: self._sampled(prompts)})
        return Pictures(clean=kept[_LATENTS], prompts=prompts)

    def _sampled(self, prompts: tuple[Prompt, ...]) -> Tensor:
        config, policy = self.state.config, self.state.policy.conditional
        own = self.processes.share(len(prompts))
        most = -(-len(prompts) // self.processes.count)
        seeds, parts = sample_seeds(config.seed, _EPOCH, own), []
        batches = list(torch.arange(most).split(config.batch.sample_batch_size))
        with self._at_start():
            for batch in self.progress.track(batches, "samples of the start"):
                self.processes.safe_point("the samples of the start")
                places = batch[batch < len(own)]
                chosen = [prompts[own.start + place] for place in places.tolist()]
                if not chosen:
                    continue
                condition = policy.encode([one.text for one in chosen], [one.metadata for one in chosen])
                parts.append(rollout(policy, condition, seeds[places], keep=Keep.FINAL).final.cpu())
        return self.processes.gather(torch.cat(parts) if parts else torch.zeros(0, *policy.latent_shape))

    def fisher(self, samples: Pictures) -> dict[str, Tensor]:
        """The diagonal Fisher information at the start, float32 on the parameters' devices."""
        parameters = self.state.policy.trainable()
        kept = self._kept(FISHER, lambda: self._measured(samples, parameters))
        return {name: kept[name].to(value.device) for name, value in parameters.items()}

    def _measured(self, samples: Pictures, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        config, policy = self.state.config, unclipped(self.state.policy)
        options = config.regularization.ewc
        spread = _first(samples, options.samples)
        assert spread is not None
        count = len(spread.clean) * options.noises
        own = self.processes.share(count)
        seed = one_seed(config.seed, 0, _STATES, purpose=Purpose.PASS)
        shares = step_shares(policy.schedule, "grid", skip=0)

        def outputs() -> Iterator[Tensor]:
            for place in self.progress.track(list(own), "Fisher information"):
                row = torch.tensor([place // options.noises])
                clean = spread.clean[row]
                step, eps = draw_noises(seed, [int(row)], [place % options.noises], shares,
                                        strata=options.noises, like=clean)  # fmt: skip
                condition = spread.condition(policy, row)
                device = policy.device
                yield noised_output(policy, step.to(device), clean.to(device), eps.to(device), condition)

        def draw(number: int, like: Tensor) -> Tensor:
            z = torch.empty(like.shape)
            fill_normal(z, stream(seed, own.start + number, place=count))
            return z.to(like)

        with self._at_start():
            total = summed_fisher(parameters, outputs(), draw)
        return {name: (self.processes.sum(value) / count).float().cpu() for name, value in total.items()}

    def _kept(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a file of the run, made and written by all processes together where it is missing."""
        file = self.run / name
        if not self.processes.agreed(file.is_file()):
            tensors = make()
            if self.processes.is_main:
                with ledger.noted(self.run, name) as partial:
                    save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
            self.processes.wait()
        return load_file(file)

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """The weights of the start, for the time of a `with` block; the present ones are exactly as before after it."""
        parameters, start = self.state.policy.trainable(), self.state.start_weights
        assert start is not None
        present = {name: value.detach().clone() for name, value in parameters.items()}
        try:
            _copy(parameters, start)
            yield
        finally:
            _copy(parameters, present)


@torch.no_grad()
def _copy(targets: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
