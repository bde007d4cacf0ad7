"""From final latents to images, by the pipeline's own tail.

The stock `__call__` is run for one step with its denoiser hollowed out and its scheduler handing back the given
latents: what remains is what the pipeline does after its loop. `__call__` is only decorated with `no_grad`, so the
undecorated function carries gradients.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin
from PIL import Image
from torch import Tensor, nn

from ddpo.pipeline_call import PipelineCall
from ddpo.tracing import hollowed, replaced, step_output


class Decoder:
    """Decodes latents; also keeps the text encoders and the VAE off the device while they are idle.

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
        offload: bool,
    ) -> None:
        """Wraps a pipeline.

        Args:
            pipeline: The stock pipeline.
            denoiser: Its denoiser.
            call: How the pipeline is called.
            device: Where it runs.
            offload: Whether everything but the denoiser rests on the CPU.
        """
        self.pipeline = pipeline
        self._denoiser = denoiser
        self._call = call
        self._device = device
        self._offload = offload
        self._encoded: dict[int, object] = {}
        self._encoded_images: dict[torch.Size, object] = {}

    def with_call(self, call: PipelineCall) -> "Decoder":
        """The same for another way to call the pipeline, such as at another size."""
        other = copy.copy(self)
        other._call, other._encoded = call, {}
        return other

    def __call__(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Images of final latents.

        Args:
            latents: (B, *latent) in the sampler's (possibly packed) layout.
            with_gradient: Whether to record the graph from images to latents.

        Returns:
            (B, 3, H, W) float32 in [0, 1]; of a video (B, F, 3, H, W) the middle frame.
        """
        images = self.frames(latents, with_gradient=with_gradient)
        return images if images.ndim == 4 else images[:, images.shape[1] // 2]

    def frames(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """The same with all frames of a video, (B, F, 3, H, W); (B, 3, H, W) for an image pipeline."""
        count, size = latents.shape[0], self._call.image_size
        arguments = self._call.arguments(
            [""] * count,
            images=[Image.new("RGB", size)] * count if size else None,
            output_type="pt",
            num_steps=1,
            guidance_scale=1.0,
        )
        pipeline = self.pipeline
        run = type(pipeline).__call__.__wrapped__ if with_gradient else type(pipeline).__call__  # type: ignore[attr-defined]

        own = pipeline.components.get("vae")
        vae = self._differentiable(own) if with_gradient else own

        def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> object:
            # Some loops keep float32 latents whatever the network is; a VAE may also be wider than the loop.
            dtype = sample.dtype if vae is None else torch.promote_types(sample.dtype, vae.dtype)
            return step_output(latents.to(dtype), options)

        with ExitStack() as stack:
            # The pipeline draws initial latents that the tail does not see: leave no trace in the global generators.
            stack.enter_context(torch.random.fork_rng([self._device] if self._device.type == "cuda" else []))
            stack.enter_context(self._without_encoders(len(latents)) if self._offload else nullcontext())
            stack.enter_context(self.auxiliaries())
            stack.enter_context(hollowed(self._denoiser))
            stack.enter_context(replaced(pipeline.scheduler, "step", step))
            if pipeline.components.get("safety_checker") is not None:  # it would blacken images before they are scored
                stack.enter_context(replaced(pipeline, "safety_checker", None))
            if vae is not own:
                stack.enter_context(replaced(pipeline, "vae", vae))
            if size:
                stack.enter_context(replaced(vae, "encode", partial(self._encode_image, own)))
            if hasattr(pipeline, "encode_prompt"):
                stack.enter_context(replaced(pipeline, "encode_prompt", self._encode_prompt))
            images = run(pipeline, **arguments, return_dict=False)[0]
        return images.float()

    def save_memory(self, *, slicing: bool, tiling: bool) -> None:
        """Decodes one image at a time, or in tiles, by the VAE's own methods.

        Raises:
            ValueError: The VAE cannot.
        """
        vae = self.pipeline.components.get("vae")
        for name, wanted in (("slicing", slicing), ("tiling", tiling)):
            if not wanted:
                continue
            refusal = ValueError(f"model.vae_{name} must be false: {type(vae).__name__} cannot do it")
            if not isinstance(vae, AutoencoderMixin):
                raise refusal
            try:
                vae.enable_slicing() if name == "slicing" else vae.enable_tiling()
            except NotImplementedError as error:  # diffusers' way to say so
                raise refusal from error

    def _encode_prompt(self, prompt: list[str], *arguments: object, **options: object) -> object:
        """The encoding of empty prompts, computed once per batch size: the tail does not depend on it."""
        if len(prompt) not in self._encoded:
            with torch.no_grad():
                encode = type(self.pipeline).encode_prompt
                self._encoded[len(prompt)] = encode(self.pipeline, prompt, *arguments, **options)
        return self._encoded[len(prompt)]

    def _encode_image(self, vae: ModelMixin, pixels: Tensor, *arguments: object, **options: object) -> object:
        """The encoding of blank input images, computed once per batch size: the tail does not depend on it."""
        if pixels.shape not in self._encoded_images:
            with torch.no_grad():
                self._encoded_images[pixels.shape] = type(vae).encode(vae, pixels, *arguments, **options)
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

    def stored(self, encoding: Tensor) -> Tensor:
        """An encoding where it waits to be used: on the CPU with offloading."""
        return encoding.cpu() if self._offload else encoding

    @contextmanager
    def auxiliaries(self) -> Iterator[None]:
        """Text encoders and VAE on the device, for the time of a `with` block."""
        if not self._offload:
            yield
            return
        self._move(self._device)
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Moves text encoders and VAE to where they idle."""
        if self._offload:
            self._move(torch.device("cpu"))

    def _move(self, device: torch.device) -> None:
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component is not self._denoiser:
                component.to(device)
