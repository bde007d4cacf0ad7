"""Decoded images that are not finite: found before they are scored, so that the error names their cause."""

from collections.abc import Sequence

from torch import Tensor

from rewards import RewardError


class ImageError(RewardError):
    """Sampling gave images that no reward can score; it ends a run as a failing reward does, on all processes."""


def find_non_finite(images: Tensor, latents: Tensor, prompts: Sequence[str]) -> ImageError | None:
    """What to raise for images with a NaN or an infinity; None for good ones.

    Args:
        images: Decoded, (B, 3, H, W).
        latents: What they were decoded from, (B, *latent).
        prompts: B texts.
    """
    good = images.isfinite().flatten(1).all(1)
    if bool(good.all()):
        return None
    first = int(good.logical_not().nonzero()[0])
    many = f"{int((~good).sum())} of {len(images)} images have pixels that are NaN or infinite, the first of prompt "
    if bool(latents[first].isfinite().all()):
        cause = "the VAE gave them for finite latents, as many do in fp16: try model.precision: bf16 or fp32"
    else:
        cause = "their latents are so already: lower optimizer.learning_rate, or try model.precision: bf16 or fp32"
    return ImageError(f"{many}{prompts[first]!r}; {cause}")
