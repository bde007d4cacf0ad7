"""A stock pipeline taken over: the core that all policies over it share.

A policy is one way to sample a model (`ddpo.policy`); the network, where it runs, in which precision, and what rests on
the CPU belong to the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ddpo.loading import Source
from ddpo.pipeline.call import read_call
from ddpo.pipeline.decoding import Decoder
from ddpo.pipeline.denoiser import DTYPES, Denoiser, Precision
from ddpo.pipeline.encoding import Encoder
from ddpo.pipeline.image_encoding import ImageEncoder
from ddpo.pipeline.input_images import Inputs
from ddpo.pipeline.network import Network
from ddpo.pipeline.offload import Offload
from ddpo.pipeline.probing import Reading, read_pipeline, recorded_steps
from ddpo.pipeline.quantization import is_quantized
from ddpo.pipeline.scheduler import training_scheduler
from ddpo.pipeline.tail import check_tail
from ddpo.pipeline.tracing import find_denoiser, find_network
from ddpo.sampling.samplers import SamplerConfig
from ddpo.trajectory import Condition
from ddpo.weights.adapter import check_has_none


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """A pipeline understood for one sampler.

    Attributes:
        reading: What was found: the chain, the denoiser's arguments, the guidance rule.
        encoder: From prompts to conditions.
        decoder: From latents to images.
        image_encoder: From images to latents.
    """

    reading: Reading
    encoder: Encoder
    decoder: Decoder
    image_encoder: ImageEncoder


class Model:
    """A pipeline and its network.

    Attributes:
        pipeline: The stock pipeline; its scheduler is the one that schedules are read from.
        name: The denoiser's component name, `unet` or `transformer`.
        network: What is called for the denoiser.
        precision: Of the network.
        device: Where it runs.
        offload: Keeps text encoders and VAE off the device while they are idle.
        source: What the pipeline was loaded from; None for one that was made otherwise.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        precision: Precision,
        device: torch.device | str,
        offload: bool,
        source: Source | None = None,
    ) -> None:
        """Takes a pipeline over; see `ddpo.Policy`.

        Raises:
            UntraceableError: It does not have one denoiser.
            ValueError: Its scheduler is of a kind that no policy follows, or the denoiser has an adapter already.
        """
        self.name = find_denoiser(pipeline)
        module: ModelMixin = find_network(pipeline)
        check_has_none(module, self.name)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = training_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.network = Network(module)
        self.precision: Precision = precision
        self.device = torch.device(device)
        self.source = source
        self.offload = Offload(pipeline, module, device=self.device, enabled=offload)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(self.device).requires_grad_(False).eval()
                if _dtype(component) not in (None, DTYPES[precision]) and not is_quantized(component):
                    component.to(DTYPES[precision])

    def wire(self, sampler: SamplerConfig, *, like: Wiring | None = None) -> Wiring:
        """Finds out what the pipeline does under a sampler.

        Args:
            sampler: How it is sampled.
            like: The same for another sampler; encodings that are the same are shared with it.

        Raises:
            UntraceableError: The pipeline does not fit; the message says why.
            ValueError: The sampler does not fit the model.
        """
        module = self.network.module
        call = read_call(self.pipeline, module, sampler)
        denoiser = Denoiser(self.network, precision=self.precision, device=self.device)
        with self.network.plain(), self.offload.auxiliaries():  # compared as the module itself, run as it is wrapped
            reading = read_pipeline(self.pipeline, denoiser, call, sampler)
        if like is None:
            decoder = Decoder(self.pipeline, module, reading.call, device=self.device, offload=self.offload)
            if not check_tail(decoder, reading.latent_shape, device=self.device):
                reading = _one_at_a_time(reading)
        else:
            decoder = like.decoder
            if like.reading.call.alone:
                reading = _one_at_a_time(reading)
        decoder = decoder.with_call(reading.call)
        known = like is not None and _encodes_alike(reading, like.reading)
        return Wiring(
            reading=reading,
            encoder=like.encoder if like is not None and known else self._encoder(reading),
            decoder=decoder,
            image_encoder=ImageEncoder(
                self.pipeline, decoder, latent_shape=reading.latent_shape, device=self.device, offload=self.offload
            ),
        )

    def _encoder(self, reading: Reading) -> Encoder:
        def encode(prompts: Sequence[str], images: Sequence[Inputs] | None) -> Iterator[Condition]:
            """The condition of each prompt, with its image where there are images, from a call of its own."""
            with self.offload.auxiliaries():
                for row, prompt in enumerate(prompts):
                    own = None if images is None else [images[row]]
                    (step,) = recorded_steps(
                        self.pipeline, self.network.module, reading.call, [prompt], own, num_steps=1
                    )
                    yield reading.denoiser.condition(step, reading.rule)

        name = type(self.pipeline).__name__
        return Encoder(encode, name, reading.call, store=self.offload.stored, device=self.device)


def _dtype(component: nn.Module) -> torch.dtype | None:
    """Precision of a pipeline's part; None of one without weights."""
    if isinstance(component, ModelMixin | PreTrainedModel):
        return component.dtype
    weight = next(component.parameters(), None)
    return None if weight is None else weight.dtype


def _one_at_a_time(reading: Reading) -> Reading:
    """The pipeline takes one prompt at a time, as something behind its loop demands."""
    call = reading.call
    return reading if call.alone else replace(reading, call=replace(call, batch="one"))


def _encodes_alike(reading: Reading, other: Reading) -> bool:
    """Whether prompts become the same conditions under two samplers."""
    return reading.rule == other.rule and replace(reading.call, num_steps=other.call.num_steps) == other.call
