"""The losses of pretraining, each a function that draws a batch and returns a scalar.

    autoencoder  ||x - D(E(x))||^2 + w KL(q(z|x) || N(0, I))                            (Kingma & Welling 2014)
    denoiser     E_{z, k, eps} ||v_theta(a_k z + s_k eps, k, c) - (a_k eps - s_k z)||^2   (Ho et al. 2020)

The velocity target is that of Salimans & Ho 2022; captions `c` are dropped at random for guidance (Ho & Salimans 2021).
Axes: `N` pictures in the data set, `L` tokens of a caption.
"""

from collections.abc import Callable
from typing import cast

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from trainers.pretraining.models import make_scheduler

Networks = dict[str, nn.Module]
Loss = Callable[[Networks, torch.Generator], Tensor]


def vae_loss(images: Tensor, *, batch_size: int, kl_weight: float = 1e-4) -> Loss:
    """Returns the autoencoder's loss on random batches.

    Args:
        images: (N, 3, 32, 32) uint8.
        batch_size: Pictures a batch.
        kl_weight: Weight of the KL divergence per latent dimension (nats) beside the mean squared error per value.
    """

    def loss(networks: Networks, generator: torch.Generator) -> Tensor:
        vae = cast(AutoencoderKL, networks["vae"])
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        pixels = to_pixels(images[rows])
        posterior = vae.encode(pixels).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        kl = posterior.kl().mean() / latents[0].numel()
        return nn.functional.mse_loss(vae.decode(latents).sample, pixels) + kl_weight * kl

    return loss


def to_pixels(images: Tensor) -> Tensor:
    """Maps uint8 in [0, 255] to float32 in [-1, 1], the autoencoder's range."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Encodes pictures and sets the autoencoder's scaling factor so that the latents have standard deviation 1.

    Args:
        vae: The trained autoencoder; its `scaling_factor` is changed.
        images: (N, 3, 32, 32) uint8.

    Returns:
        (N, 4, 8, 8) float32 scaled latents.
    """
    chunks = tqdm(images.split(256), desc="encode", unit="batch")
    latents = torch.cat([vae.encode(to_pixels(chunk)).latent_dist.mean for chunk in chunks])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return latents * vae.config.scaling_factor


def denoiser_loss(latents: Tensor, token_ids: Tensor, *, empty_ids: Tensor, batch_size: int, drop: float = 0.1) -> Loss:
    """Returns the velocity-prediction loss of the denoiser and its text encoder on random batches.

    Args:
        latents: (N, 4, 8, 8) scaled latents.
        token_ids: (N, L) int64 captions.
        empty_ids: (L,) the empty caption.
        batch_size: Pictures a batch.
        drop: Probability that a caption is replaced by the empty one, for classifier-free guidance.
    """
    signal = make_scheduler().alphas_cumprod.sqrt()
    noise_level = (1 - signal**2).sqrt()

    def loss(networks: Networks, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        steps = torch.randint(len(signal), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, 1, generator=generator) < drop
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        a, s = signal[steps].view(-1, 1, 1, 1), noise_level[steps].view(-1, 1, 1, 1)
        context = networks["text_encoder"](torch.where(dropped, empty_ids, token_ids[rows])).last_hidden_state
        noisy = (a * clean + s * noise).contiguous(memory_format=torch.channels_last)
        velocity = networks["unet"](noisy, steps, context).sample
        return nn.functional.mse_loss(velocity, a * noise - s * clean)

    return loss
