"""Pretrains a tiny latent diffusion model on captioned shapes: a real `StableDiffusionPipeline`, made on two CPU cores.

    1. pictures       rendered scenes of `rewards.builtin.shapes`
    2. autoencoder    trained on them, then frozen; latents are divided by their measured standard deviation
    3. denoiser       trained on the latents together with the text encoder

Training states are written every few minutes, so that a killed run can go on. What is saved in the end is an
exponential moving average (EMA) of the weights. Learning rates follow the share of the given minutes that is spent, so
a run ends annealed whatever the machine. Axes: `N` pictures in the data set.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

from ddpo.validation import UserError
from rewards.builtin.shapes.render import SIZE, render
from rewards.builtin.shapes.scene import CATEGORIES, caption, prompts, sample_scene
from rewards.builtin.shapes.verifier import verify
from trainers.pretraining.losses import Loss, Networks, denoiser_loss, encode, vae_loss
from trainers.pretraining.models import (
    assemble,
    export,
    load,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    make_vae,
    tokenize,
)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rendered scenes.

    Attributes:
        images: (N, 3, 32, 32) uint8 RGB.
        captions: N captions.
    """

    images: Tensor
    captions: list[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained.

    Attributes:
        minutes: Wall-clock length of the training.
        learning_rate: Peak of the schedule: 200 steps of warm-up, then linear to zero.
        batch_size: Pictures a step.
        ema_decay: Decay of the moving average per step.
        checkpoint_minutes: Time between two checkpoints.
        seed: Seed of batches and noise.
    """

    minutes: float
    learning_rate: float = 1.5e-3
    batch_size: int = 64
    ema_decay: float = 0.999
    checkpoint_minutes: float = 3.0
    seed: int = 0


def render_corpus(num: int, *, seed: int) -> Corpus:
    """Renders `num` scenes of all categories; 1 ms each."""
    rng = np.random.default_rng(seed)
    images = np.empty((num, 3, SIZE, SIZE), np.uint8)
    captions = []
    for row in tqdm(range(num), desc="render", unit="image"):
        scene = sample_scene(rng)
        images[row] = np.rint(255 * render(scene, rng))
        captions.append(caption(scene))
    return Corpus(images=torch.from_numpy(images), captions=captions)


# Training


def train(
    networks: Networks,
    recipe: Recipe,
    *,
    loss: Loss,
    checkpoint: Path,
    on_checkpoint: Callable[[Networks], None] = lambda averaged: None,
) -> Networks:
    """Minimises a loss for a number of minutes.

    Args:
        networks: The networks to train, by name; changed in place.
        recipe: How long and how.
        loss: Draws a batch with the generator and returns the scalar loss.
        checkpoint: File of the training state; continued from where it exists.
        on_checkpoint: Called with the averaged networks each time a checkpoint is written.

    Returns:
        The averaged networks, in evaluation mode.
    """
    averaged = {name: copy.deepcopy(network).eval().requires_grad_(False) for name, network in networks.items()}
    weights: list[Tensor] = [p for network in networks.values() for p in network.parameters()]
    averaged_weights: list[Tensor] = [p for network in averaged.values() for p in network.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    step, minutes = _restore(checkpoint, networks, averaged, optimizer)
    generator = torch.Generator().manual_seed(recipe.seed + step)
    next_checkpoint, last_time, smooth = minutes + recipe.checkpoint_minutes, time.monotonic(), float("nan")
    progress = tqdm(desc=checkpoint.stem, initial=step, unit="step", mininterval=10)
    while minutes < recipe.minutes:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / 200) * (1 - minutes / recipe.minutes)
        value = loss(networks, generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(averaged_weights, [weight.detach() for weight in weights], 1 - decay)
        step, now = step + 1, time.monotonic()
        minutes, last_time = minutes + (now - last_time) / 60, now
        smooth = value.item() if math.isnan(smooth) else 0.99 * smooth + 0.01 * value.item()
        progress.update()
        progress.set_postfix(loss=f"{smooth:.5f}", minutes=f"{minutes:.1f}", refresh=False)
        if minutes >= min(next_checkpoint, recipe.minutes):
            next_checkpoint = minutes + recipe.checkpoint_minutes
            _save(checkpoint, networks, averaged, optimizer, step=step, minutes=minutes)
            on_checkpoint(averaged)
            last_time = time.monotonic()
    progress.close()
    return averaged


def _save(
    path: Path, networks: Networks, averaged: Networks, optimizer: torch.optim.Optimizer, *, step: int, minutes: float
) -> None:
    """Writes a training state; a kill while writing leaves the previous one."""
    partial = path.with_suffix(".partial")
    states = {name: network.state_dict() for name, network in networks.items()}
    averages = {name: network.state_dict() for name, network in averaged.items()}
    optimizer_state = optimizer.state_dict()
    torch.save([states, averages, optimizer_state, step, minutes], partial)
    partial.replace(path)


def _restore(path: Path, networks: Networks, averaged: Networks, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Loads a training state if there is one, and returns its step and the minutes trained."""
    if not path.exists():
        return 0, 0.0
    states, averages, optimizer_state, step, minutes = torch.load(path, weights_only=True)
    for name, network in networks.items():
        network.load_state_dict(states[name])
        averaged[name].load_state_dict(averages[name])
    optimizer.load_state_dict(optimizer_state)
    return step, minutes


# Measuring


def evaluate(
    pipeline: StableDiffusionPipeline,
    *,
    num: int,
    seed: int = 0,
    eta: float = 1.0,
    num_steps: int = 10,
    guidance: float = 1.0,
) -> dict[str, float]:
    """Measures how often a pipeline draws what the caption says.

    Args:
        pipeline: The pipeline, on the CPU.
        num: Number of prompts, a sixth of them of each category.
        seed: Seed of prompts and noise.
        eta: 1 samples the stochastic differential equation, 0 the deterministic one.
        num_steps: Denoising steps.
        guidance: Scale of classifier-free guidance; 1 is none.

    Returns:
        The strict accuracy of each category, in [0, 1], their mean under "mean" and the mean partial score under
        "partial".
    """
    pipeline.set_progress_bar_config(disable=True)
    captions = [record["prompt"] for record in prompts(num, seed=seed, categories=CATEGORIES)]
    generator = torch.Generator().manual_seed(seed)
    images = [
        pipeline(
            captions[start : start + 64],
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            eta=eta,
            generator=generator,
            output_type="np",
        ).images
        for start in range(0, num, 64)
    ]
    verdict = verify(np.concatenate(images).transpose(0, 3, 1, 2), captions)
    accuracies = verdict.accuracies()
    return accuracies | {"mean": float(np.mean(list(accuracies.values()))), "partial": float(verdict.partial.mean())}


# The whole run


def pretrain(
    output: Path,
    *,
    work: Path,
    minutes: float = 40.0,
    vae_minutes: float = 6.0,
    num_images: int = 30_000,
    num_prompts: int = 384,
    resume: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Renders, trains the autoencoder and the denoiser, and writes the pipeline folder.

    Args:
        output: Folder of the pipeline; rewritten at every checkpoint of the denoiser.
        work: Folder of the training states and the rendered pictures.
        minutes: Length of the denoiser's training; a finished run goes on with `resume` and a larger number.
        vae_minutes: Length of the autoencoder's training.
        num_images: Pictures to render.
        num_prompts: Prompts to measure the result on.
        resume: Continue from the states in `work`; otherwise they are deleted.
        seed: Seed of pictures, weights, batches and noise.

    Returns:
        The accuracies of the result, as `evaluate` gives them.

    Raises:
        UserError: If a length or `num_images` is not positive.
    """
    if min(minutes, vae_minutes, num_images) <= 0:
        raise UserError(f"Got {minutes=}, {vae_minutes=}, {num_images=}: give positive numbers.")
    work.mkdir(parents=True, exist_ok=True)
    states = {name: work / f"{name}.pt" for name in ("corpus", "vae", "denoiser")}
    if not resume:
        for path in states.values():
            path.unlink(missing_ok=True)
    torch.manual_seed(seed)
    corpus = _corpus(states["corpus"], num_images, seed=seed)

    recipe = Recipe(minutes=vae_minutes, learning_rate=3e-3, batch_size=32, seed=seed)
    loss = vae_loss(corpus.images, batch_size=recipe.batch_size)
    vae = train({"vae": make_vae()}, recipe, loss=loss, checkpoint=states["vae"])["vae"]

    latents, tokenizer = encode(vae, corpus.images), make_tokenizer()
    token_ids, empty_ids = tokenize(tokenizer, corpus.captions), tokenize(tokenizer, [""])[0]
    networks = {"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}
    recipe = Recipe(minutes=minutes, learning_rate=2e-3, batch_size=48, ema_decay=0.998, seed=seed)
    loss = denoiser_loss(latents, token_ids, empty_ids=empty_ids, batch_size=recipe.batch_size)

    def write(averaged: Networks) -> None:
        export(assemble(vae=vae, tokenizer=tokenizer, **averaged), output)

    write(train(networks, recipe, loss=loss, checkpoint=states["denoiser"], on_checkpoint=write))
    return evaluate(load(output), num=num_prompts, seed=seed)


def _corpus(path: Path, num: int, *, seed: int) -> Corpus:
    """Loads the rendered pictures if they exist, else renders and saves them."""
    if not path.exists():
        corpus = render_corpus(num, seed=seed)
        torch.save([corpus.images, corpus.captions], path)
    images, captions = torch.load(path, weights_only=True)
    return Corpus(images=images, captions=captions)
