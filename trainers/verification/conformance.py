"""Whether a pipeline can be trained as it is: `ddpo check MODEL`.

The stock pipeline, with a perturbed adapter in it, is the oracle: every step's model output, every noise-free step and
the images that come out must be what the policy computes itself; what `save` wrote must give the same images in a
pipeline that knows nothing of the policy. A scheduler that draws noise in its steps (LCM's) is given zeros for it, and
input images are taken at the mean of the VAE's posterior. Then follow the checks of the likelihood (`ddpo verify
--policy`).

B is the number of prompts.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import peft
import torch
from diffusers import DiffusionPipeline, LCMScheduler
from diffusers.schedulers import scheduling_lcm
from torch import Tensor, nn

from ddpo import LoraConfig, Policy, SamplerConfig, Trajectory, rollout, sample_seeds
from ddpo.control.checks.base import Check, Measurement
from ddpo.loading import load_pipeline
from ddpo.pipeline.decoding import without_overlays
from ddpo.pipeline.denoiser import DTYPES, Precision
from ddpo.pipeline.input_images import Inputs, probe_inputs
from ddpo.pipeline.posterior import posterior_means
from ddpo.pipeline.probing import recorded_steps
from ddpo.pipeline.scheduler import default_sampler, training_scheduler
from ddpo.pipeline.tracing import SECOND, Step, find_network, recording
from ddpo.policy import default_device
from ddpo.sampling.samplers import SamplerKind
from ddpo.weights.export import loads_lora
from trainers.planning.policy_loading import count_decisions
from trainers.verification.likelihood import (
    PROMPTS,
    RowsOf,
    gradient_rows,
    kl_rows,
    log_prob_rows,
    perturb,
    ratio_rows,
    scheduler_rows,
)
from trainers.verification.suite import run_with_bar, table

OUTPUT_TOLERANCE: dict[Precision, float] = {"fp32": 1e-5, "bf16": 5e-2, "fp16": 1e-2}
ALIKE = 0.05  # between an encoding in a batch and alone, in the unit of embeddings
PIXEL_TOLERANCE: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


def check(subject: "Subject") -> int:
    """Runs all checks of a pipeline and prints the table.

    Returns:
        0 if all passed, else 1.
    """
    rows = run_with_bar([*pipeline_checks(subject), *likelihood_checks(subject)])
    print(table(rows))  # noqa: T201
    return 0 if all(row.measurement.passed for row in rows) else 1


@dataclass(frozen=True, kw_only=True)
class SubjectRequest:
    """A pipeline to be checked, and how it is sampled.

    Attributes:
        model: Folder, single file or hub id of a pipeline, or `shapes`.
        config: Of a single file: folder or hub id of a pipeline of the same kind; None for what diffusers takes.
        sampler_kind: A stochastic sampler; None takes the one that fits the model.
        num_steps: Denoising steps.
        guidance_scale: Guidance as the pipeline defines it.
        precision: Of the network.
        height: Of the images in pixels; None takes the pipeline's own.
        width: The same.
    """

    model: str | Path
    config: str | None
    sampler_kind: SamplerKind | None
    num_steps: int
    guidance_scale: float
    precision: Precision
    height: int | None
    width: int | None


def load_subject(request: SubjectRequest) -> "Subject":
    """Loads a pipeline to be checked, and prints how it is sampled.

    Raises:
        UntraceableError: The pipeline cannot be a policy; the message says why.
        FieldError: There is no such model, or the sampler does not fit it.
        UserError: Its scheduler does not fit.
    """
    precision, steps, guidance = request.precision, request.num_steps, request.guidance_scale
    load = partial(load_pipeline, request.model, dtype=DTYPES[precision], config=request.config)
    pipeline = load()
    fitting = default_sampler(pipeline.scheduler, num_steps=steps, guidance_scale=guidance, kind=request.sampler_kind)
    sampler = replace(fitting, height=request.height, width=request.width)
    settings = f"{sampler.kind}, eta {sampler.eta:g}, {steps} steps, guidance {guidance:g}, {precision}"
    print(f"{type(pipeline).__name__}: {settings}", file=sys.stderr)  # noqa: T201
    return make_subject(pipeline, sampler=sampler, precision=precision, device=default_device(), fresh=load)


@dataclass(frozen=True, kw_only=True)
class StockRun:
    """What a stock pipeline did with the prompts.

    Attributes:
        loops: Its loops, one for all prompts or one for each.
        images: (B, F, 3, H, W) in [0, 1], F = 1 for images.
    """

    loops: list[list[Step]]
    images: Tensor

    def latents(self, k: int) -> Tensor:
        """The latents before step k, (B, *latent)."""
        return torch.cat([steps[k].sample for steps in self.loops])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A policy under examination; its adapter is perturbed, since a fresh one has no effect.

    Attributes:
        policy: The policy.
        precision: Of its network.
        fresh: Loads the stock pipeline once more.
    """

    policy: Policy
    precision: Precision
    fresh: Callable[[], DiffusionPipeline]

    @cached_property
    def images(self) -> Sequence[Inputs] | None:
        """Input images of a pipeline that takes some, made here; None for others."""
        call = self.policy.call
        return probe_inputs(call.inputs, len(PROMPTS), call.image_size) if call.image_size else None

    @cached_property
    def path(self) -> Trajectory:
        """Sampled chains with their KL."""
        seeds = sample_seeds(0, 0, range(len(PROMPTS)))
        return rollout(self.policy, self.policy.encode(PROMPTS, self.images), seeds, with_kl=True)

    @cached_property
    def stock(self) -> StockRun:
        """The policy's own pipeline, adapter included, run as its authors wrote it."""
        return self.run(self.policy.pipeline)

    def run(self, pipeline: DiffusionPipeline) -> StockRun:
        """Runs a pipeline of the policy's kind on the prompts.

        One by one, if it takes no more at a time, or if a picture of its own depends on the neighbours.
        """
        policy, count = self.policy, len(PROMPTS)
        single = policy.call.alone or policy.denoiser.arguments.grouped or not self._encodes_alike
        generator = torch.Generator().manual_seed(0)
        network = find_network(pipeline)
        loops, images = [], []
        for rows in [slice(row, row + 1) for row in range(count)] if single else [slice(0, count)]:
            own = None if self.images is None else self.images[rows]
            arguments = policy.call.arguments(PROMPTS[rows], images=own, output_type="pt", generator=generator)
            with (
                torch.no_grad(), policy.denoiser.autocast(), without_overlays(pipeline),
                policy.call.guiding(pipeline), posterior_means(pipeline), _without_noise(),
                recording(pipeline, network) as steps,
            ):  # fmt: skip
                made = pipeline(**arguments, return_dict=False)[0].float()
            loops.append(steps)
            images.append(made if made.ndim == 5 else made[:, None])
        return StockRun(loops=loops, images=torch.cat(images))

    @cached_property
    def _encodes_alike(self) -> bool:
        """Whether the pipeline makes of each prompt in a batch what it makes of it alone (LongCat rewrites them)."""
        policy, own = self.policy, self.path.condition
        (step,) = recorded_steps(
            policy.pipeline, policy.denoiser.module, policy.call, PROMPTS, self.images, num_steps=1
        )
        batch = policy.denoiser.condition(step, policy.rule)
        pairs = [(value, batch.positive[name]) for name, value in own.positive.items()]
        return all(a.shape != b.shape or torch.allclose(a.float(), b.float(), rtol=0, atol=ALIKE) for a, b in pairs)

    def ours(self, latents: Tensor) -> Trajectory:
        """Noise-free chains from the given initial latents."""
        path = self.path  # sampled with noise, should this be the first use of it
        policy = self.policy.noise_free
        if isinstance(policy.pipeline.scheduler, LCMScheduler):  # its step without noise is not the ODE's
            steps = self.policy.full_noise.schedule
            quiet = replace(steps, std=torch.zeros_like(steps.std), stochastic=torch.zeros_like(steps.stochastic))
            policy = policy.at(quiet)
        return rollout(policy, path.condition, path.seeds, latents=latents)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Diffusers' LCM scheduler adds zeros in place of noise, for the time of a `with` block."""
    drawn = scheduling_lcm.randn_tensor

    def zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device, **_: object) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    scheduling_lcm.randn_tensor = zeros
    try:
        yield
    finally:
        scheduling_lcm.randn_tensor = drawn


def make_subject(
    pipeline: DiffusionPipeline,
    *,
    sampler: SamplerConfig,
    precision: Precision,
    device: torch.device | str,
    fresh: Callable[[], DiffusionPipeline],
) -> Subject:
    """A policy over `pipeline` with a perturbed LoRA; `fresh` loads the same pipeline again.

    Raises:
        UntraceableError: The pipeline cannot be a policy; the message says why.
        UserError: The sampler has no stochastic step.
    """
    policy = Policy(pipeline, sampler=sampler, adapter=LoraConfig(rank=4), precision=precision, device=device)
    count_decisions(policy, needed=True)
    perturb(policy)
    return Subject(policy=policy, precision=precision, fresh=fresh)


def pipeline_checks(subject: Subject) -> list[Check]:
    """The policy against the stock pipeline."""
    table: dict[str, tuple[Callable[[Subject], Iterator[Measurement]], str]] = {
        "trace": (trace_rows, "One guidance rule reproduces the pipeline's own model output."),
        "model output": (output_rows, "At every step the policy's guided model output is the pipeline's."),
        "noise-free": (image_rows, "Without noise, the steps and the images are the stock pipeline's."),
        "decode": (decode_rows, "Images are (B, 3, H, W) in [0, 1]."),
        "adapter": (adapter_rows, "The saved adapter gives the same images in a fresh stock pipeline."),
    }
    return [_check("pipeline", name, claim, partial(rows, subject)) for name, (rows, claim) in table.items()]


def likelihood_checks(subject: Subject) -> list[Check]:
    """The policy's log-probabilities, KL, steps and gradient."""
    table: dict[str, tuple[RowsOf, str]] = {
        "log-prob": (log_prob_rows, "Log-probabilities are true log-densities, in nats."),
        "KL": (kl_rows, "The KL is the Gaussian KL in nats, and 0 for the pretrained weights."),
        "first ratio": (partial(ratio_rows, precision=subject.precision),
                        "Training recomputes the log-probabilities of sampling, so the first ratio is 1."),
        "scheduler": (scheduler_rows, "The mean of every noisy step is the stock scheduler's."),
    }  # fmt: skip
    if subject.precision == "fp32":  # a finite difference drowns in the rounding of the others
        table["gradient"] = (reached_rows, "The gradient of a log-probability is its finite difference.")
    return [_check("policy", name, claim, partial(_likelihood, rows, subject)) for name, (rows, claim) in table.items()]


def _check(group: str, name: str, claim: str, run: Callable[[], Iterator[Measurement]]) -> Check:
    return Check(name=name, group=group, claim=claim, level="fast", run=run)


def _likelihood(rows: RowsOf, subject: Subject) -> Iterator[Measurement]:
    yield from rows(subject.policy, subject.path)


def trace_rows(subject: Subject) -> Iterator[Measurement]:
    """The rule that was found when the policy was made; without one there is no policy."""
    policy = subject.policy
    steps, size = policy.schedule.num_steps, "x".join(map(str, policy.latent_shape))
    images = (
        f", input images of {policy.call.image_size[0]}x{policy.call.image_size[1]}" if policy.call.image_size else ""
    )
    yield Measurement(name=f"{policy.name}, latents {size}, {steps} steps{images}", exact="a guidance rule",
                      obtained=policy.rule.name, error=0.0, tolerance=0.0)  # fmt: skip


def output_rows(subject: Subject) -> Iterator[Measurement]:
    """The combined model output at the stock loop's own latents, times and embeddings, which it encodes as a batch."""
    policy, error, largest = subject.policy, 0.0, 0.0
    for steps in subject.stock.loops:
        condition = policy.denoiser.condition(steps[0], policy.rule)
        for k, step in enumerate(steps):
            time = policy.schedule.model_time[k].expand(len(step.sample))
            with torch.no_grad():
                branches = policy.denoiser.branches(step.sample, time, condition, policy.rule)
                output = policy.rule.combine(*branches, policy.sampler.guidance_scale)
            error = max(error, float((output - step.model_output).abs().max()))
            largest = max(largest, float(step.model_output.abs().max()))
    yield Measurement(name=f"{policy.schedule.num_steps} steps, |output| to {largest:.2g}", exact="scheduler.step's",
                      obtained="same to", error=error,
                      tolerance=OUTPUT_TOLERANCE[subject.precision] * max(1.0, largest))  # fmt: skip


def image_rows(subject: Subject) -> Iterator[Measurement]:
    """A chain of our own from the stock loop's first latents."""
    stock, name = subject.stock, type(subject.policy.pipeline).__name__
    ours = subject.ours(stock.latents(0))
    steps = range(subject.policy.schedule.num_steps)
    error = max(float((ours.latents[:, k] - stock.latents(k).float()).abs().max()) for k in steps)
    scale = max(1.0, float(ours.latents.abs().max()))
    yield Measurement(name="latents before every step", exact=name, obtained="same to", error=error,
                      tolerance=10 * OUTPUT_TOLERANCE[subject.precision] * scale)  # fmt: skip
    yield Measurement(name="pixels", exact=name, obtained="same to", error=_pixels(subject, ours, stock),
                      tolerance=PIXEL_TOLERANCE[subject.precision])  # fmt: skip


def decode_rows(subject: Subject) -> Iterator[Measurement]:
    """The range and the layout of sampled images."""
    images = subject.policy.decode(subject.path.final)
    low, high = float(images.min()), float(images.max())
    yield Measurement(name="range of sampled images", exact="in [0, 1]", obtained=f"{low:.3f} to {high:.3f}",
                      error=max(0.0, -low, high - 1.0) if images.isfinite().all() else float("nan"),
                      tolerance=0.0)  # fmt: skip
    fits = images.ndim == 4 and images.shape[:2] == (len(PROMPTS), 3)
    yield Measurement(name="layout", exact=f"({len(PROMPTS)}, 3, H, W)", obtained=str(tuple(images.shape)),
                      error=0.0 if fits else 1.0, tolerance=0.0)  # fmt: skip


def adapter_rows(subject: Subject) -> Iterator[Measurement]:
    """The export, by the pipeline's own loader where it has one, else by peft's."""
    policy, pipeline = subject.policy, subject.fresh()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = training_scheduler(pipeline.scheduler)
    pipeline.to(policy.device)
    if getattr(policy.pipeline.components.get("vae"), "use_tiling", False):
        pipeline.vae.enable_tiling()
    before = subject.run(pipeline).images
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        if loads_lora(pipeline, policy.name):
            loader = "load_lora_weights"
            if any(Path(folder).glob("*.safetensors")):
                pipeline.load_lora_weights(folder)
            if (Path(folder) / SECOND).is_dir():
                pipeline.load_lora_weights(Path(folder) / SECOND, load_into_transformer_2=True)
        else:
            loader = "PeftModel.from_pretrained"
            network: nn.Module = getattr(pipeline, policy.name)
            adapted = peft.PeftModel.from_pretrained(network, folder).get_base_model()
            pipeline.register_modules(**{policy.name: adapted})
    stock = subject.run(pipeline)
    moved = float((stock.images - before).abs().max())
    error = _pixels(subject, subject.ours(stock.latents(0)), stock) if moved > 0 else float("nan")
    yield Measurement(name=f"pixels after {loader}, which moved them by {moved:.2g}", exact="the policy's",
                      obtained="same to", error=error, tolerance=PIXEL_TOLERANCE[subject.precision])  # fmt: skip


def reached_rows(policy: Policy, path: Trajectory) -> Iterator[Measurement]:
    """The gradient; first, how many weights no noisy step depends on, of one step for each of the networks.

    The last block of some transformers (Qwen-Image) computes outputs that nothing reads: their adapters stay as they
    are, and a distributed wrapper must be told to expect unused parameters.
    """
    row, weights, noisy = torch.tensor([0]), policy.trainable(), path.schedule.stochastic_steps
    idle = set(weights)
    for k in {policy.denoiser.expert_of(k): k for k in reversed(noisy)}.values():
        log_prob = policy(k, path.latents[:1, k], path.condition.index(row)).log_prob(path.latents[:1, k + 1]).sum()
        gradients = torch.autograd.grad(log_prob, list(weights.values()), allow_unused=True)
        idle -= {name for name, gradient in zip(weights, gradients, strict=True) if gradient is not None}
    layers = sorted({name.split(".lora_")[0] for name in idle})
    yield Measurement(name=f"trained weights that nothing depends on, of {len(weights)}", exact="as found",
                      obtained=", ".join(layers) or "none", error=0.0, tolerance=0.0)  # fmt: skip
    yield from gradient_rows(policy, path)


def _pixels(subject: Subject, ours: Trajectory, stock: StockRun) -> float:
    return float((subject.policy.decode_frames(ours.final) - stock.images.to(ours.latents.device)).abs().max())
