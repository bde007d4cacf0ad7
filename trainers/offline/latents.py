"""Latents of judged images by the pipeline's own VAE, each encoded once and kept in a folder.

An image's latents are a function of its pixels and the VAE: the middle of the picture's shape is cut out and scaled to
the size of the policy's pictures, and each image is encoded alone, so that no batch changes its last bits. They are
the mean of the VAE's posterior, in float32 where the VAE asks for it (`force_upcast`). A file is named by hashes of the
image and of what the VAE makes of a test picture: another model, revision, precision or size never takes another's.
"""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo import Policy
from ddpo.pipeline.input_images import probe_images
from trainers.offline.pictures import Judged, digest, open_picture, pixels

KEY = "latents"


class LatentStore:
    """Encodes images, or finds what was encoded before.

    Args:
        policy: Whose VAE encodes them.
        folder: Of the latents; made if missing.
    """

    def __init__(self, policy: Policy, folder: Path) -> None:
        self._policy = policy
        self._folder = folder

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height of the policy's pictures, in pixels."""
        with torch.no_grad():
            height, width = self._policy.decode(torch.zeros(1, *self._policy.latent_shape)).shape[-2:]
        return width, height

    def __call__(self, pictures: Sequence[Judged]) -> Tensor:
        """Latents of B images, (B, *latent) float32 on the CPU.

        Raises:
            UserError: An image cannot be read, or the pipeline cannot encode any; the message says which and why.
        """
        return torch.cat([self._one(picture) for picture in pictures])

    def _one(self, picture: Judged) -> Tensor:
        file = self._folder / f"{digest(picture)}-{self._model}.safetensors"
        try:
            return load_file(file)[KEY]
        except (FileNotFoundError, SafetensorError, KeyError):  # a file that a crash has cut short is made again
            pass
        latents = self._policy.encode_images(pixels(open_picture(picture), self.size)).cpu()
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}")  # several processes may write the same
        save_file({KEY: latents.contiguous()}, partial)
        partial.replace(file)
        return latents

    @cached_property
    def _model(self) -> str:
        """A hash of what the VAE makes of a test picture."""
        latents = self._policy.encode_images(pixels(probe_images(1, self.size)[0], self.size)).cpu()
        return hashlib.blake2b(latents.numpy().tobytes(), digest_size=8).hexdigest()
