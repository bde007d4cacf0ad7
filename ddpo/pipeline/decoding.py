"""From final latents to images, by the pipeline's own tail.

The stock `__call__` is run with its denoiser hollowed out and its scheduler handing back the given latents: what
remains is what the pipeline does after its loop. Its steps cost nothing then; there are as many as in sampling, since
some pipelines treat a single step in a way of its own. `__call__` is only decorated with `no_grad`, so the undecorated
function carries gradients. Safety checkers and watermarks are left out: rewards see the picture as it was made.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin
from PIL import Image
from torch import Tensor

from ddpo.pipeline.call import BLANK, PipelineCall
from ddpo.pipeline.nested import first_output
from ddpo.pipeline.offload import Offload
from ddpo.pipeline.posterior import without_spread
from ddpo.pipeline.tracing import hollowed, replaced, step_output
from ddpo.validation import FieldError

UNGUIDED = 1.0
# Parts that change finished pictures and may be absent, and which option of the pipeline's says that they may.
OVERLAYS = {"safety_checker": "requires_safety_checker", "watermark": None, "watermarker": None}


@contextmanager
def without_overlays(pipeline: DiffusionPipeline) -> Iterator[None]:
    """The pipeline does not blacken or mark its finished pictures, for the time of a `with` block."""
    with ExitStack() as stack:
        for name, option in OVERLAYS.items():
            if getattr(pipeline, name, None) is not None and (option is None or option in pipeline.config):
                stack.enter_context(replaced(pipeline, name, None))
        yield


class Decoder:
    """Decodes latents.

    Attributes:
        pipeline: The stock pipeline.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        denoiser: ModelMixin,
        call: PipelineCall,
        *,
        device: torch.device,
        offload: Offload,
    ) -> None:
        """Wraps a pipeline.

        Args:
            pipeline: The stock pipeline.
            denoiser: Its denoiser.
            call: How the pipeline is called.
            device: Where it runs.
            offload: Brings text encoders and VAE to the device.
        """
        self.pipeline = pipeline
        self._denoiser = denoiser
        self._call = call
        self._device = device
        self._offload = offload
        self._prompt = BLANK
        self._color = "black"
        self._encoded: dict[int, object] = {}
        self._encoded_images: dict[torch.Size, object] = {}

    def with_call(self, call: PipelineCall) -> "Decoder":
        """The same for another way to call the pipeline, such as at another size."""
        other = copy.copy(self)
        other._call, other._encoded, other._encoded_images = call, {}, {}
        return other

    def seeing(self, prompt: str, color: str) -> "Decoder":
        """The same with another prompt and input images of another colour, which the tail must not depend on."""
        other = self.with_call(self._call)
        other._prompt, other._color = prompt, color
        return other

    def __call__(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Images of final latents.

        Args:
            latents: (B, *latent) in the sampler's (possibly packed) layout.
            with_gradient: Whether to record the graph from images to latents.

        Returns:
            (B, 3, H, W) float32 in [0, 1], of a pipeline with one channel all three alike; of a video (B, F, 3, H, W)
            the middle frame.
        """
        images = self.frames(latents, with_gradient=with_gradient)
        return images if images.ndim == 4 else images[:, images.shape[1] // 2]

    def frames(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """The same with all frames of a video, (B, F, 3, H, W); (B, 3, H, W) for an image pipeline."""
        if self._call.alone and len(latents) > 1:
            return torch.cat([self.frames(row, with_gradient=with_gradient) for row in latents.split(1)])
        count, size = latents.shape[0], self._call.image_size
        arguments = self._call.arguments(
            [self._prompt] * count,
            images=[{name: Image.new("RGB", size, self._color) for name in self._call.inputs}] * count
            if size
            else None,
            output_type="pt",
            generator=torch.Generator().manual_seed(torch.initial_seed()),  # of latents that the tail does not see
            guidance_scale=UNGUIDED,
        )
        pipeline = self.pipeline
        run = type(pipeline).__call__.__wrapped__ if with_gradient else type(pipeline).__call__  # type: ignore[attr-defined]

        own = pipeline.components.get("vae")
        vae = self._differentiable(own) if with_gradient else own

        width = None if vae is None else vae.dtype

        def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> object:
            # Some loops keep float32 latents whatever the network is; a VAE may also be wider than the loop.
            dtype = sample.dtype if width is None else torch.promote_types(sample.dtype, width)
            return step_output(latents.to(dtype), options)

        with ExitStack() as stack:
            # Whatever the pipeline draws leaves no trace in the global generators.
            stack.enter_context(torch.random.fork_rng([self._device] if self._device.type == "cuda" else []))
            stack.enter_context(self._without_encoders(len(latents)) if self._offload.enabled else nullcontext())
            stack.enter_context(self._offload.auxiliaries())
            stack.enter_context(hollowed(self._denoiser))
            stack.enter_context(replaced(pipeline.scheduler, "step", step))
            stack.enter_context(without_overlays(pipeline))
            stack.enter_context(self._call.guiding(pipeline, UNGUIDED))
            if vae is not own:
                stack.enter_context(replaced(pipeline, "vae", vae))
            if size:
                stack.enter_context(replaced(vae, "encode", partial(self._encode_image, own)))
            if hasattr(pipeline, "encode_prompt"):
                stack.enter_context(replaced(pipeline, "encode_prompt", self._encode_prompt))
            images = first_output(run(pipeline, **arguments)).float()
        is_grey = images.shape[-3] == 1
        return images.repeat_interleave(3, dim=-3) if is_grey else images

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Decodes one image at a time, or in tiles, by the VAE's own methods.

        Raises:
            FieldError: The VAE cannot.
        """
        vae = self.pipeline.components.get("vae")
        for name, wanted in (("slicing", slicing), ("tiling", tiling)):
            if not wanted:
                continue
            refusal = FieldError(f"vae_{name}", True, f"false ({type(vae).__name__} cannot do it)")
            if not isinstance(vae, AutoencoderMixin):
                raise refusal
            try:
                vae.enable_slicing() if name == "slicing" else vae.enable_tiling()
            except NotImplementedError as error:  # diffusers' way to say so
                raise refusal from error

    def _encode_prompt(self, *arguments: object, **options: object) -> object:
        """The encoding of the prompts, once per batch size: the tail does not depend on it (`ddpo.pipeline.tail`)."""
        prompt = arguments[0] if arguments else options.get("prompt")
        count = len(prompt) if isinstance(prompt, list) else 1
        if count not in self._encoded:
            with torch.no_grad():
                self._encoded[count] = type(self.pipeline).encode_prompt(self.pipeline, *arguments, **options)
        return self._encoded[count]

    def _encode_image(self, vae: ModelMixin, pixels: Tensor, *arguments: object, **options: object) -> object:
        """The encoding of the input images, computed once per batch size: nor does it depend on this."""
        if pixels.shape not in self._encoded_images:
            with torch.no_grad():
                self._encoded_images[pixels.shape] = without_spread(
                    type(vae).encode(vae, pixels, *arguments, **options)
                )
        return self._encoded_images[pixels.shape]

    def _differentiable(self, vae: ModelMixin | None) -> ModelMixin | None:
        """A VAE that may decode in its own precision; of one that may not, a copy in float32.

        A pipeline's tail casts such a VAE to float32 and back at its end, when the backward pass is yet to come.
        """
        if vae is None or vae.dtype != torch.float16 or not vae.config.get("force_upcast", False):
            return vae
        return copy.deepcopy(vae).to(self._device, torch.float32)

    @contextmanager
    def _without_encoders(self, batch_size: int) -> Iterator[None]:
        """Takes the text encoders out of the pipeline where their output is known, so that they stay on the CPU."""
        components = self.pipeline.components
        names = [name for name, part in components.items() if name.startswith("text_encoder") and part is not None]
        with ExitStack() as stack:
            if batch_size in self._encoded:
                for name in names:
                    stack.enter_context(replaced(self.pipeline, name, None))
            yield
