"""A pretrained diffusers pipeline as a stepwise Gaussian policy.

    (k, x_k, condition) -> N(mean, std_k^2 I),    mean = a' x0_hat + direction * eps_hat

where (x0_hat, eps_hat) is what the denoiser predicts after classifier-free guidance and a', direction, std are the
schedule's (`ddpo.schedule`). B is the batch, `latent` the latent shape.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ddpo import lora, ragged
from ddpo.decoding import Decoder
from ddpo.denoiser import DTYPES, Denoiser, Precision
from ddpo.gaussian import Gaussian
from ddpo.guidance import GuidanceRule, find_rule, rules, unguided
from ddpo.loading import load_pipeline
from ddpo.pipeline_call import PROBE_PROMPTS, probe, read_call
from ddpo.prediction import predict
from ddpo.quantization import Quantization, is_quantized
from ddpo.samplers import SamplerConfig, default_sampler, make_schedule
from ddpo.schedule import Schedule, clip_range, noise_grid, prediction_type, training_scheduler
from ddpo.tracing import Step, find_denoiser, trace
from ddpo.trajectory import Condition


class Policy:
    """A stepwise Gaussian policy over a pipeline's latents.

    Latents, means and log-probabilities are float32; the network runs in `precision`. Log-probabilities are of the
    transition that was sampled, in nats, summed over the latent dimensions.

    Attributes:
        pipeline: The stock pipeline; its scheduler is the one that the schedule was read from.
        sampler: How it is sampled.
        schedule: Coefficients of the chain, float32 on the device.
        latent_shape: Shape of one sample's latents.
        name: The denoiser's component name, `unet` or `transformer`.
        call: How the pipeline is called.
        denoiser: The network and how it is called.
        rule: The pipeline's way to guide, found by comparing with its own output.
    """

    schedule: Schedule
    _ode: Schedule

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        *,
        sampler: SamplerConfig,
        adapter: lora.AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str = "cpu",
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        """Traces a pipeline and attaches what is to be trained.

        Args:
            pipeline: Any pipeline from prompts, or from nothing, with one denoiser; taken over, its scheduler is
                replaced.
            sampler: How to sample.
            adapter: What to train; None trains nothing.
            precision: Of the network. LoRA weights stay float32.
            device: Where to run.
            offload: Keep text encoders and VAE on the CPU when they are not in use.
            seed: Of the adapter's initialisation.

        Raises:
            UntraceableError: The pipeline does not fit; the message says why.
            ValueError: The sampler or the scheduler does not fit the model.
        """
        self.name = find_denoiser(pipeline)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.scheduler = training_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.sampler = sampler
        self.device = torch.device(device)
        module: ModelMixin = getattr(pipeline, self.name)
        self.call = read_call(pipeline, module, sampler)
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.to(self.device).requires_grad_(False).eval()
                if component.dtype != DTYPES[precision] and not is_quantized(component):
                    component.to(DTYPES[precision])
        self.denoiser = Denoiser(module, precision=precision, device=self.device)
        self._decoder = Decoder(pipeline, module, self.call, device=self.device, offload=offload)
        self._encoded: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._read_pipeline()
        if is_quantized(module) and isinstance(adapter, lora.FullConfig):
            raise ValueError("quantised weights cannot be trained; use a LoraConfig, or load without quantization")
        self._reference = lora.frozen_copy(module) if isinstance(adapter, lora.FullConfig) else None
        if adapter is not None:
            lora.attach(module, adapter, seed=seed)
        self._decoder.rest()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        sampler: SamplerConfig | None = None,
        adapter: lora.AdapterConfig | None = None,
        precision: Precision = "fp32",
        device: torch.device | str | None = None,
        offload: bool = False,
        revision: str | None = None,
        variant: str | None = None,
        quantization: Quantization | None = None,
        seed: int = 0,
    ) -> "Policy":
        """Loads a pipeline by `DiffusionPipeline.from_pretrained` and wraps it.

        Args:
            path: A folder, a Hugging Face hub id, or `shapes` for the small pipeline that ships with ddpo.
            sampler: How to sample; default 50 steps with guidance 5 of the sampler that fits the model, `ddim` with
                eta 1 or `flow_sde` with eta 0.7.
            adapter: What to train; default LoRA of rank 16 on the attention projections.
            precision: Of the network.
            device: Where to run; default this process's GPU, else the CPU.
            offload: Keep text encoders and VAE on the CPU when they are not in use.
            revision: Of the hub repository.
            variant: Of the weight files, such as `fp16`.
            quantization: Of the denoiser's linear layers (`ddpo.quantization`); default none.
            seed: Of the adapter's initialisation.

        Raises:
            FileNotFoundError: There is no such folder, and the hub has no such model or cannot be reached.
            UntraceableError: The pipeline does not fit; the message says why.
        """
        pipeline = load_pipeline(
            path, dtype=DTYPES[precision], revision=revision, variant=variant, quantization=quantization
        )
        return cls(
            pipeline,
            sampler=sampler or default_sampler(pipeline.scheduler),
            adapter=adapter or lora.LoraConfig(),
            precision=precision,
            device=device or default_device(),
            offload=offload,
            seed=seed,
        )

    # ---- the distribution of a step ---------------------------------------------------------------------------------

    def __call__(self, k: int | Tensor, x: Tensor, condition: Condition, *, guided: bool = True) -> Gaussian:
        """The distribution of the next latents.

        Args:
            k: Step index, an int or (B,) int64: one call may mix steps.
            x: Latents, (B, *latent).
            condition: B rows.
            guided: Whether classifier-free guidance is applied; without it only the conditional branch runs.
        """
        rule = self.rule if guided else self.unguided
        negative, positive = self.denoiser.branches(x, self._time(k, x), condition, rule)
        return self._gaussian(k, x, rule.combine(negative, positive, self.sampler.guidance_scale))

    def both(self, k: int | Tensor, x: Tensor, condition: Condition) -> tuple[Gaussian, Gaussian]:
        """The guided and the unguided distribution from one pass of the network."""
        negative, positive = self.denoiser.branches(x, self._time(k, x), condition, self.rule)
        guided = self.rule.combine(negative, positive, self.sampler.guidance_scale)
        return self._gaussian(k, x, guided), self._gaussian(k, x, self.unguided.combine(None, positive, 1.0))

    def _time(self, k: int | Tensor, x: Tensor) -> Tensor:
        return self.schedule.model_time[k].expand(x.shape[0])

    def _gaussian(self, k: int | Tensor, x: Tensor, output: Tensor) -> Gaussian:
        table = self.schedule
        shape = (-1, *[1] * (x.ndim - 1))

        def at(values: Tensor) -> Tensor:
            return values[k].to(x.dtype).reshape(shape)

        prediction = predict(output.to(x.dtype), x, at(table.a), at(table.s), kind=self._kind)
        x0 = prediction.x0 if table.clip is None else prediction.x0.clamp(-table.clip, table.clip)
        return Gaussian(mean=at(table.a_next) * x0 + at(table.direction) * prediction.eps, std=at(table.std))

    # ---- the trained network ----------------------------------------------------------------------------------------

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The pretrained model, without gradients, for the time of a `with` block."""
        with torch.no_grad(), self._pretrained():
            yield

    @contextmanager
    def _pretrained(self) -> Iterator[None]:
        if self._reference is None:
            with lora.adapter_off(self.denoiser.module):
                yield
            return
        network, self.denoiser.network = self.denoiser.network, self._reference
        try:
            yield
        finally:
            self.denoiser.network = network

    @contextmanager
    def noise_free(self) -> Iterator[None]:
        """Samples by the ODE of the same schedule, for the time of a `with` block."""
        schedule, self.schedule = self.schedule, self._ode
        try:
            yield
        finally:
            self.schedule = schedule

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: value for name, value in self.denoiser.module.named_parameters() if value.requires_grad}

    def gradient_checkpointing(self) -> None:
        """Recomputes activations in the backward pass: less memory, about 1.3 times the time."""
        self.denoiser.module.enable_gradient_checkpointing()

    def compile(self, batch_sizes: Collection[int], *, backend: str = "inductor") -> None:
        """Compiles the denoiser; sampling and training then run the same compiled network.

        Args:
            batch_sizes: Samples per call; other numbers are padded to the next of these, or cut into the largest, so
                that nothing is compiled for them.
            backend: Of `torch.compile`.
        """
        self.denoiser.network = torch.compile(self.denoiser.module, dynamic=False, backend=backend)
        if self._reference is not None:
            self._reference = torch.compile(self._reference, dynamic=False, backend=backend)
        self.denoiser.batch_sizes = tuple(sorted(set(batch_sizes)))

    def no_sync(self) -> AbstractContextManager[None]:
        """Leaves gradients of a distributed network unreduced, for all but the last micro-batch of an update."""
        network = self.denoiser.network
        return network.no_sync() if isinstance(network, nn.parallel.DistributedDataParallel) else nullcontext()

    # ---- prompts, noise and images ----------------------------------------------------------------------------------

    def encode(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None = None, *, chunk_size: int = 16
    ) -> Condition:
        """The condition of B prompts; each text is encoded once and remembered.

        Args:
            prompts: B texts.
            metadata: B dictionaries for the rewards; default empty ones.
            chunk_size: Texts per call of the text encoders.
        """
        missing = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._encoded))
        if missing:
            with self._decoder.auxiliaries():
                for start in range(0, len(missing), chunk_size):
                    self._encode(missing[start : start + chunk_size])
        rows = [self._encoded[prompt] for prompt in prompts]
        positive, negative = (
            {name: ragged.stack([row[side][name] for row in rows]).to(self.device) for name in rows[0][side]}
            for side in (0, 1)
        )
        return Condition(
            prompts=tuple(prompts),
            metadata=tuple(metadata) if metadata is not None else tuple({} for _ in prompts),
            positive=positive,
            negative=negative,
        )

    def noise(self, seeds: Tensor) -> Tensor:
        """Standard normal noise of every sample's prior and steps, (B, T+1, *latent) float32 on the device.

        Each row comes from a generator of its own seed on the CPU, so that a sample depends on its seed alone.
        """
        noise = torch.empty(len(seeds), self.schedule.num_steps + 1, *self.latent_shape)
        generator = torch.Generator()
        for prior, steps, seed in zip(noise[:, 0].unbind(), noise[:, 1:].unbind(), seeds.tolist(), strict=True):
            generator.manual_seed(seed)
            prior.normal_(generator=generator)  # drawn first, so that it does not depend on the number of steps
            steps.normal_(generator=generator)
        return noise.to(self.device)

    def decode(self, latents: Tensor, *, with_gradient: bool = False) -> Tensor:
        """Images of final latents by the pipeline's own tail.

        Args:
            latents: (B, *latent).
            with_gradient: Whether to record the graph from images to latents.

        Returns:
            (B, 3, H, W) float32 in [0, 1]; of a video its middle frame, F // 2 of F.
        """
        return self._decoder(latents, with_gradient=with_gradient)

    def save_decoding_memory(self, *, slicing: bool = False, tiling: bool = False) -> None:
        """Decodes one image at a time, or each in overlapping tiles; `ValueError` where the VAE cannot."""
        self._decoder.save_memory(slicing=slicing, tiling=tiling)

    def decode_frames(self, latents: Tensor) -> Tensor:
        """All frames of final latents, (B, F, 3, H, W) float32 in [0, 1]; F is 1 for images."""
        frames = self._decoder.frames(latents)
        return frames if frames.ndim == 5 else frames[:, None]

    def save(self, folder: Path) -> None:
        """Writes the trained weights in diffusers' format: see `ddpo.lora.save_weights`."""
        lora.save_weights(self.pipeline, self.name, self.denoiser.module, folder)

    # ---- tracing ----------------------------------------------------------------------------------------------------

    def _trace(self, prompts: Sequence[str], *, num_steps: int | None = None, hollow: bool = True) -> list[Step]:
        generator = torch.Generator().manual_seed(0)
        output = "pt" if self.pipeline.components.get("vae") is None else "latent"  # nothing to decode, or not wanted
        arguments = self.call.arguments(prompts, output_type=output, generator=generator)
        with torch.no_grad():
            return trace(self.pipeline, self.denoiser.module, arguments, num_steps=num_steps, hollow=hollow)

    def _read_pipeline(self) -> None:
        """Finds the schedule, the arguments that belong to a sample, and the guidance rule."""
        steps, one, three = probe(self.pipeline, self._trace)
        self._kind = prediction_type(self.pipeline.scheduler)
        self.latent_shape = tuple(steps[0].sample.shape[1:])
        times = torch.stack([step.calls[0].timestep.flatten()[0] for step in steps])
        self.schedule = self._make_schedule(self.sampler, times)
        self._ode = self._make_schedule(replace(self.sampler, kind="ode"), times)
        self.denoiser.learn_arguments(one, steps[0], three)
        with self.denoiser.autocast():
            (real,) = self._trace(PROBE_PROMPTS[:2], num_steps=1, hollow=False)
        self.denoiser.output_type = real.model_output.dtype
        self.rule = find_rule(real, self._replay, rules(rescale=self.sampler.guidance_rescale))
        self.unguided = unguided(self.rule)

    def _make_schedule(self, sampler: SamplerConfig, times: Tensor) -> Schedule:
        scheduler = self.pipeline.scheduler
        schedule = make_schedule(
            sampler,
            noise_grid(scheduler),
            model_time=times,
            is_flow=self._kind == "flow",
            clip=clip_range(scheduler),
        )
        return schedule.to(self.device, torch.float32)

    def _replay(self, rule: GuidanceRule, step: Step) -> Tensor:
        """The model output of a recorded first step, by our own call under `rule`."""
        condition = self.denoiser.condition(PROBE_PROMPTS[:2], step, rule)
        with torch.no_grad():
            negative, positive = self.denoiser.branches(step.sample, self._time(0, step.sample), condition, rule)
            return rule.combine(negative, positive, self.sampler.guidance_scale)

    def _encode(self, prompts: list[str]) -> None:
        (step,) = self._trace(prompts, num_steps=1)
        condition = self.denoiser.condition(prompts, step, self.rule)
        for row, prompt in enumerate(prompts):
            positive, negative = (
                ragged.trim({name: self._decoder.stored(value[row].detach()) for name, value in side.items()})
                for side in (condition.positive, condition.negative)
            )
            self._encoded[prompt] = (positive, negative)


def default_device() -> torch.device:
    """This process's GPU (the launcher's LOCAL_RANK), else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
