"""What a run needs on one GPU: bytes by part and phase, and FLOPs of an epoch.

Weights, optimizer, averages and trajectories follow from sizes; what a pass of a network needs is counted on the meta
device (`trainers.planning.estimate.accounting`). Not included: the rewards' models, activations of the text encoders,
and the reserve of `trainers.planning.estimate.cards` for the CUDA context, workspaces and fragmentation.

Legend: `B` samples of a call, `N` samples of a process and epoch, `T` steps, `D` latent dimensions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ddpo.pipeline.denoiser import DTYPES
from ddpo.pipeline.features import FeatureReader
from ddpo.pipeline.quantization import Quantization
from ddpo.weights import adapter as lora
from ddpo.weights.adapter import FullConfig
from trainers.config import Config
from trainers.config.optimizer import OptimizerConfig
from trainers.parallel.sharding import blocks
from trainers.planning.estimate.accounting import Cost, CudaKernels, account
from trainers.planning.estimate.blueprint import Blueprint, Inputs, Latents
from trainers.planning.estimate.critic import CriticCost, critic_cost
from trainers.planning.plan import BatchPlan, steps_outside_windows

FLOAT32 = 4
NOTHING = Cost(peak=0, flops=0)
CG_VECTORS = 8  # gradient, iterate, residual, direction, image, weights before, metric and a temporary
SMALLEST_8BIT = 4096  # bitsandbytes keeps smaller tensors in 32 bits
BYTES_PER_WEIGHT: Mapping[Quantization, float] = {  # with the scales: of 64 weights, or of an output
    "bnb_4bit": 0.5 + FLOAT32 / 64, "bnb_8bit": 1.0, "torchao_int8": 1.0, "torchao_float8": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Bytes that do not depend on a batch size; of a network that processes split, this process's part.

    Attributes:
        denoiser: Pretrained weights; with full fine-tuning the trained ones and their frozen copy, both in float32.
        adapter: LoRA weights in float32; 0 with full fine-tuning.
        gradients: Of the trained weights, float32.
        optimizer: AdamW's averages, or the diagonal that a trust region keeps.
        averaged: Copies of the trained weights: moving averages, the start, its Fisher information.
        text_encoders: Of all text encoders.
        vae: The VAE.
        trajectories: Latents of an epoch, and prompt embeddings of each of its samples.
        critic: A critic's weights, gradients and averages, whole in every process.
        gathered: Of a split network, the weights that are whole while they are used.
    """

    denoiser: int
    adapter: int
    gradients: int
    optimizer: int
    averaged: int
    text_encoders: int
    vae: int
    trajectories: int
    critic: int
    gathered: int


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run needs on each GPU.

    Attributes:
        parts: Bytes by part.
        phases: Peak bytes by phase.
        per_sample: Bytes that one more sample of a call costs: `sampling`, `decoding`, `training`, and what the
            objective prepares.
        flops: FLOPs of an epoch over all processes, by phase: `sampling`, `decoding`, `training`, and `critic` where
            there is one.
        plan: The epoch.
    """

    parts: Parts
    phases: dict[str, int]
    per_sample: dict[str, int]
    flops: dict[str, int]
    plan: BatchPlan

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def _prepared(self) -> tuple[str, ...]:
        """What is prepared in batches as large as training's."""
        return tuple(name for name in self.per_sample if name not in ("sampling", "decoding", "training"))

    def largest_batch(self, phase: str, capacity: int) -> int:
        """Samples of a call that fit when all else stays: 0 if none does.

        Args:
            phase: `sampling` (and decoding, which takes the same samples) or `training`.
            capacity: Bytes.
        """
        batch, together = {
            "sampling": (self.plan.sample_batches[0], ("sampling", "decoding")),
            "training": (self.plan.train_batch_size, ("training", *self._prepared)),
        }[phase]
        others = max(size for name, size in self.phases.items() if name not in self.per_sample)
        if others > capacity:
            return 0
        return max(0, min(batch + (capacity - self.phases[name]) // self.per_sample[name] for name in together))


def estimate(config: Config, blueprint: Blueprint, plan: BatchPlan) -> Estimate:
    """Estimates a run.

    Args:
        config: The run.
        blueprint: Its pipeline; the denoiser gets the run's adapter.
        plan: Its epoch, on as many GPUs as the plan has processes.
    """
    latents = blueprint.latents(config.sampler.height, config.sampler.width)
    simulated = _Simulation(config, plan, blueprint, latents)
    critic = simulated.critic()
    parts = simulated.parts(critic)
    costs = {
        "sampling": simulated.sampling(),
        "training": simulated.training(),
        "decoding": simulated.decoding(),
        "decoding with gradient": simulated.decoding(gradient=True) if _decodes(config) else NOTHING,
        "preparing": simulated.preparing() if config.demand.prepare else NOTHING,
    }
    return _assemble(config, plan, latents, parts, costs, critic)


class _Simulation:
    """Passes of a run's networks on the meta device."""

    def __init__(self, config: Config, plan: BatchPlan, blueprint: Blueprint, latents: Latents) -> None:
        denoiser = blueprint.denoiser
        self._config = config
        self._plan = plan
        self._dtype = DTYPES[config.model.precision]
        self._autocast = None if self._dtype == torch.float32 else self._dtype
        self._blueprint = blueprint
        self._latents = latents
        self._denoiser = nn.Module.to(denoiser, self._dtype).requires_grad_(False).eval()
        self._pretrained = _weight_bytes(denoiser, config.model.quantization)
        lora.attach(denoiser, config.adapter)
        if config.model.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing(self._checkpointed)

    @contextmanager
    def _keeping_activations(self) -> Iterator[None]:
        """Without recomputation, as the pretrained network runs with a graph (`ddpo.weights.trained_network`)."""
        recomputes = self._denoiser.is_gradient_checkpointing
        if recomputes:
            self._denoiser.disable_gradient_checkpointing()
        yield
        if recomputes:
            self._denoiser.enable_gradient_checkpointing(self._checkpointed)

    def _checkpointed(self, module: nn.Module, *arguments: object) -> object:
        """`torch.utils.checkpoint`, with CUDA's kernels in the recomputation too."""
        modes = (CudaKernels(self._autocast), CudaKernels(self._autocast))
        return checkpoint(module.__call__, *arguments, use_reentrant=False, context_fn=lambda: modes)

    def critic(self) -> CriticCost:
        """The critic's passes."""
        prompt = [tensor.shape[1:] for name, tensor in _flat(self._inputs(1)).items() if name not in _NOT_PER_PROMPT]
        return critic_cost(self._config, state=self._seen(), prompt=prompt)

    def _seen(self) -> tuple[int, ...]:
        """Shape of what a critic sees of a sample's step."""
        if self._config.critic.kind != "features":
            return self._latents.shape
        reader = FeatureReader([self._denoiser])
        with reader.reading(), torch.no_grad():
            self._denoiser(**self._inputs(1), return_dict=False)
            return (reader.take(1).shape[1],)

    def parts(self, critic: CriticCost) -> Parts:
        """Bytes of what stays."""
        config, plan, full = self._config, self._plan, isinstance(self._config.adapter, FullConfig)
        trained = [parameter.numel() for parameter in self._denoiser.parameters() if parameter.requires_grad]
        weights = FLOAT32 * sum(trained)
        vae = self._blueprint.vae
        size = self._dtype.itemsize
        samples = plan.samples_per_process
        embeddings = sum(
            tensor.nbytes for name, tensor in _flat(self._inputs(1)).items() if name not in _NOT_PER_PROMPT
        )
        states = samples * _kept_states(config, plan) * self._latents.numel * FLOAT32
        states += samples * plan.num_steps * critic.features * FLOAT32
        moments = sum(_optimizer_bytes(numel, config.optimizer) for numel in trained)
        shares = plan.num_processes if config.distributed.strategy != "ddp" else 1
        return Parts(
            denoiser=(2 * weights if full else self._pretrained) // shares,
            adapter=0 if full else weights // shares,
            gradients=weights // shares,
            optimizer=moments // shares,
            averaged=(weights // shares) * _copies(config),
            text_encoders=self._blueprint.encoder_parameters * size,
            vae=0 if vae is None else sum(parameter.numel() for parameter in vae.parameters()) * size,
            trajectories=states + samples * embeddings * self._branches(guided=True),
            critic=critic.kept,
            gathered=self._gathered() if shares > 1 else 0,
        )

    def _gathered(self) -> int:
        """Bytes of whole weights: all of them, or a block in use, the next one, a block's gradient, and the rest."""
        whole = sum(parameter.nbytes for parameter in self._denoiser.parameters())
        if self._config.distributed.strategy == "zero2":
            return whole
        units = [sum(parameter.nbytes for parameter in block.parameters()) for block in blocks(self._denoiser)]
        return 3 * max(units) + whole - sum(units)

    def sampling(self) -> Cost:
        """One sample's step."""
        inputs = self._inputs(self._branches(guided=True))

        @torch.no_grad()
        def run() -> None:
            self._denoiser(**inputs, return_dict=False)

        return self._account(run, inputs)

    def training(self) -> Cost:
        """One unit's forward and backward pass, after those of the pretrained or old weights that its losses need.

        In a chain of several steps, all of them are differentiated by the state too.
        """
        config = self._config
        chained = _chain_steps(config, self._plan) > 1
        inputs = self._inputs(self._branches(guided=config.demand.guidance))
        name, state = _state(inputs)

        def run() -> None:
            given = {**inputs, name: state.detach().requires_grad_()} if chained else inputs
            loss = self._denoiser(**given, return_dict=False)[0].float().square().mean()
            for _ in range(config.frozen_passes):
                with torch.set_grad_enabled(chained), lora.adapter_off(self._denoiser), self._keeping_activations():
                    stock = self._denoiser(**given, return_dict=False)[0]
                loss = loss + stock.float().square().mean() if chained else loss
            torch.autograd.backward(loss)

        trained = [parameter for parameter in self._denoiser.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)  # there from the first micro-batch on, and counted by itself
        cost = self._account(run, inputs)
        for parameter in trained:
            parameter.grad = None
        return cost

    def decoding(self, *, gradient: bool = False) -> Cost:
        """One image, with the backward pass where its gradient is wanted."""
        vae, shape = self._blueprint.vae, self._latents.vae_shape
        if vae is None or shape is None:
            return Cost(peak=0, flops=0)
        upcast = vae.config["force_upcast"] and self._dtype == torch.float16
        dtype = torch.float32 if upcast else self._dtype
        nn.Module.to(vae, dtype).eval()  # diffusers' own warns of what does not concern us
        if self._config.model.vae_tiling:
            vae.enable_tiling()
        vae.requires_grad_(False)
        latents = torch.empty(1, *shape, dtype=dtype, device="meta")

        def run() -> None:
            with torch.set_grad_enabled(gradient):
                images = vae.decode(latents.detach().requires_grad_(gradient), return_dict=False)[0]
                if gradient:
                    torch.autograd.backward(images.float().square().mean())

        return account(run, ignored=[*vae.parameters(), latents])

    def preparing(self) -> Cost:
        """A row of the pretrained network, forward and back to the latents."""
        inputs = self._inputs(self._branches(guided=self._config.demand.guidance))
        name, state = _state(inputs)

        def run() -> None:
            given = {**inputs, name: state.detach().requires_grad_()}
            with lora.adapter_off(self._denoiser):
                torch.autograd.backward(self._denoiser(**given, return_dict=False)[0].float().square().mean())

        trained = [parameter for parameter in self._denoiser.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        cost = self._account(run, inputs)
        for parameter in trained:
            parameter.requires_grad_(True)
        return cost

    def _inputs(self, rows: int) -> Inputs:
        return self._blueprint.family.inputs(self._denoiser, self._latents, rows, self._dtype)

    def _branches(self, *, guided: bool) -> int:
        return self._plan.branches if guided else 1

    def _account(self, run: Callable[[], object], inputs: Inputs) -> Cost:
        gradients = [parameter.grad for parameter in self._denoiser.parameters() if parameter.grad is not None]
        ignored = [*self._denoiser.parameters(), *gradients, *self._denoiser.buffers(), *_flat(inputs).values()]
        return account(run, ignored=ignored, autocast=self._autocast)


def _assemble(
    config: Config,
    plan: BatchPlan,
    latents: Latents,
    parts: Parts,
    costs: Mapping[str, Cost],
    critic: CriticCost,
) -> Estimate:
    """Peaks of the phases, in the order in which they come."""
    offload, on_cpu = config.model.offload, config.batch.trajectories == "cpu"
    resident = parts.denoiser + parts.adapter + parts.optimizer + parts.averaged + parts.critic + parts.gathered
    idle = 0 if offload else parts.text_encoders + parts.vae
    kept = 0 if on_cpu else parts.trajectories
    # A batch's noise, its states, and their stack; with a KL weight also the mean of every step.
    chains = (1 + config.measures_kl) * (plan.num_steps + 1) + 2 * _kept_states(config, plan)
    states = chains * latents.numel * FLOAT32
    sliced = config.model.vae_slicing
    demand = config.demand
    calls = _chain_steps(config, plan)
    per_sample = {
        "sampling": costs["sampling"].peak + states,
        "decoding": _image_bytes(latents) if sliced else costs["decoding"].peak,
        "training": _training_bytes(config, plan, latents, costs, calls=calls),
    }
    batch = plan.sample_batches[0]
    decoding = batch * per_sample["decoding"] + (costs["decoding"].peak if sliced else 0)
    phases = {
        "encoding": resident + parts.text_encoders + parts.vae,
        "sampling": resident + idle + kept + batch * per_sample["sampling"],
        "decoding": resident + (parts.vae if offload else idle) + kept + decoding,
        "gathering": resident + idle + 2 * kept,
        "training": resident + idle + kept + parts.gradients + plan.train_batch_size * per_sample["training"],
        "optimizer": resident + idle + kept + 2 * parts.gradients,
    }
    if plan.curvature_rows:  # dual numbers are twice the activations; CG_VECTORS directions wait beside the products
        activations = 2 * plan.train_batch_size * per_sample["training"]
        phases["Fisher products"] = resident + idle + kept + CG_VECTORS * parts.gradients + activations
    if plan.critic_states:
        together = min(config.critic.batch_size, plan.samples_per_process)
        phases["critic"] = resident + idle + kept + together * critic.fit.peak
    prepare = demand.prepare
    if prepare is not None:
        pictures = prepare.decodes * (costs["decoding with gradient"].peak + _image_bytes(latents))
        each = max(costs["preparing"].peak, pictures) + 2 * (plan.num_steps + 1) * latents.numel * FLOAT32
        per_sample[prepare.name] = each
        phases[prepare.name] = resident + idle + kept + plan.train_batch_size * each
    prepared = 0 if prepare is None else plan.images_per_epoch * prepare.rows(plan.num_steps)
    in_training = plan.training_rows * plan.frozen_passes
    elsewhere = in_training + prepared * (plan.branches if demand.guidance else 1)
    chains = plan.images_per_epoch * plan.passes * (plan.units_per_sample if demand.chain else demand.chain_unit)
    rows = plan.training_rows // (plan.branches if demand.guidance else 1)
    flops = {
        "sampling": (plan.sampling_rows + plan.reference_rows - elsewhere) * costs["sampling"].flops // plan.branches,
        "decoding": plan.images_per_epoch
        * (1 + len(config.shaping.steps) + _contests(config, plan))
        * costs["decoding"].flops,
        "training": rows * costs["training"].flops
        + chains * demand.decodes * costs["decoding with gradient"].flops
        + prepared * costs["preparing"].flops
        + plan.denoising_rows * costs["training"].flops // (plan.branches if demand.guidance else 1)
        + (0 if prepare is None else plan.images_per_epoch * prepare.decodes * costs["decoding with gradient"].flops),
    }
    if plan.critic_states:
        fitted = plan.images_per_epoch * plan.critic_updates
        flops["critic"] = (plan.critic_states - fitted) * critic.value.flops + fitted * critic.fit.flops
    return Estimate(parts=parts, phases=phases, per_sample=per_sample, flops=flops, plan=plan)


def _copies(config: Config) -> int:
    """Copies of the trained weights that are kept: averages, the start, and its Fisher information."""
    options = config.regularization
    averages = (config.optimizer.ema_decay > 0) + (config.demand.old_policy is not None)
    return averages + options.is_on + (options.ewc.strength > 0)


def _training_bytes(config: Config, plan: BatchPlan, latents: Latents, costs: Mapping[str, Cost], *, calls: int) -> int:
    """A unit's: a step's activations; of a chain those of all its steps, or of the largest that is alive alone.

    Beside them are a chain's own states, noise and decoded images.
    """
    demand = config.demand
    if not (demand.chain or demand.chain_unit):
        return costs["training"].peak * demand.rows
    step, pictures = costs["training"].peak, demand.decodes * costs["decoding with gradient"].peak
    images = demand.decodes * _image_bytes(latents) if demand.decodes else 0
    states = (plan.num_steps + 1 + _kept_states(config, plan) + 3 * calls) * latents.numel * FLOAT32
    return (max(step, pictures) if demand.recomputed else step * calls + pictures) + images + states


def _chain_steps(config: Config, plan: BatchPlan) -> int:
    """Steps of a chain that are differentiated; 1 where a unit is no chain."""
    if config.demand.chain_unit:
        return config.sampler.steps_from_first_unseen(plan.num_stochastic)
    return config.demand.graph_steps(plan.num_steps) if config.demand.chain else 1


_NOT_PER_PROMPT = ("sample", "hidden_states", "timestep", "img_ids", "txt_ids")


def _kept_states(config: Config, plan: BatchPlan) -> int:
    """States of a sample that wait for training, and means."""
    states = plan.num_steps + 1 - config.demand.keep.first_state(plan.num_steps)
    prepare = config.demand.prepare
    made = 0 if prepare is None else prepare.kept_states(plan.num_stochastic)
    means = plan.num_stochastic * (config.demand.means + plan.keeps_reference)
    visits = 2 * steps_outside_windows(config, plan.num_stochastic) if config.follows_kl else 0
    return states + means + made + visits + _contests(config, plan)


def _decodes(config: Config) -> bool:
    """Whether some images are decoded with a graph."""
    prepare = config.demand.prepare
    return config.demand.decodes > 0 or (prepare is not None and prepare.decodes > 0)


def _contests(config: Config, plan: BatchPlan) -> int:
    """Contenders of a sample, at all contended steps."""
    return config.demand.contended(plan.num_stochastic) * config.demand.contenders


def _state(inputs: Inputs) -> tuple[str, torch.Tensor]:
    """What a denoiser calls the noisy latents, and these."""
    for name in ("sample", "hidden_states"):
        value = inputs.get(name)
        if isinstance(value, torch.Tensor):
            return name, value
    raise AssertionError(f"no latents among {', '.join(inputs)}")


def _flat(inputs: Inputs) -> dict[str, torch.Tensor]:
    flat: dict[str, torch.Tensor] = {}
    for name, value in inputs.items():
        flat.update(value if isinstance(value, dict) else {name: value})
    return flat


def _image_bytes(latents: Latents) -> int:
    """Of a decoded image in float32, twice: as it is and rescaled."""
    assert latents.vae_shape is not None
    return 2 * 3 * FLOAT32 * 64 * latents.vae_shape[1] * latents.vae_shape[2]


def _weight_bytes(denoiser: nn.Module, quantization: Quantization | None) -> int:
    total = sum(parameter.nbytes for parameter in denoiser.parameters())
    if quantization is None:
        return total
    linear = [layer.weight for layer in denoiser.modules() if isinstance(layer, nn.Linear)]
    saved = sum(weight.nbytes - int(weight.numel() * BYTES_PER_WEIGHT[quantization]) for weight in linear)
    return total - saved + max(weight.nbytes for weight in linear)  # and one layer's, expanded


def _optimizer_bytes(numel: int, options: OptimizerConfig) -> int:
    if options.is_trust_region:  # the running diagonal
        return FLOAT32 * numel * (options.preconditioner == "diagonal")
    if options.eight_bit and numel >= SMALLEST_8BIT:
        return 2 * (numel + FLOAT32 * -(-numel // 256) + FLOAT32 * 256)
    return 2 * FLOAT32 * numel
