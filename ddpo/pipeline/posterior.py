"""Input images at the mean of what a VAE's encoder says of them.

Some pipelines (FLUX Fill, Stable Diffusion's inpainting) draw an input image's latents from the VAE's posterior, others
take its mean. A policy encodes a prompt once, for all its samples; one draw would be theirs together, so it takes the
mean everywhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from ddpo.pipeline.tracing import replaced


@contextmanager
def posterior_means(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline's VAE encodes images without spread, for the time of a `with` block.

    A draw is then the mean, and takes as many numbers from its generator as before.
    """
    vae = pipeline.components.get("vae")
    if not hasattr(vae, "encode"):
        yield
        return
    stock = vae.encode

    def encode(*arguments: object, **options: object) -> object:
        return without_spread(stock(*arguments, **options))

    with replaced(vae, "encode", encode):
        yield


def without_spread(output: Sequence[object]) -> object:
    """What a VAE's encoder returned, its posterior with a standard deviation of 0."""
    posterior = output[0]
    if isinstance(posterior, DiagonalGaussianDistribution):
        posterior.std = torch.zeros_like(posterior.std)
    return output
