"""What is done to images to see how far a reward follows: the VAE's round trip, JPEG; and how sharp they are."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddpo import Policy
from ddpo.validation import UserError
from trainers.tracking.pictures import to_pil

_QUALITY = 90


def compressed(images: Tensor) -> Tensor:
    """JPEG of quality 90 and back, (N, 3, H, W) in [0, 1]."""
    return torch.stack([_compressed(image) for image in images])


def _compressed(image: Tensor) -> Tensor:
    file = io.BytesIO()
    to_pil(image).save(file, format="jpeg", quality=_QUALITY)
    pixels = np.array(Image.open(file).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def encoded(policy: Policy, images: Tensor, size: int) -> Tensor | None:
    """Through the VAE's encoder and decoder, in batches; None where the pipeline does not tell how to encode."""
    try:
        with torch.no_grad():
            parts = [policy.decode(policy.encode_images(part.to(policy.device))).cpu() for part in images.split(size)]
    except UserError:
        return None
    return torch.cat(parts)


def sharpness(images: Tensor) -> Tensor:
    """Root mean square of the Laplacian of the grey image, (N,): 0 for a flat picture, more with more fine detail."""
    grey = images.double().mean(1, keepdim=True)
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    padded = torch.nn.functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    return torch.nn.functional.conv2d(padded, kernel[None, None]).square().mean((1, 2, 3)).sqrt() + 1e-12
