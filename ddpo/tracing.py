"""Learns how a stock diffusers pipeline calls its denoiser, by running it once with the expensive parts hollowed out.

The pipeline's `__call__` runs with its denoiser's forward replaced by one that returns fixed numbers and its
scheduler's `step` by one that returns its input. That costs the encoding of the prompts and nothing else, and shows
every argument of every denoiser call: embeddings, pooled embeddings, size ids, guidance embeddings, timesteps. The
policy then makes the same calls itself, so that no model family needs code of its own.
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeGuard

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from ddpo import ragged

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class UntraceableError(ValueError):
    """A pipeline does not fit the stepwise Gaussian policy; the message says which part and what to do."""


class _StopTracing(Exception):
    """Ends the pipeline's loop once enough was seen."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the denoiser.

    Attributes:
        latents: Its first argument, (rows, *latent).
        timestep: The value of its timestep argument, as passed (0-dimensional, (rows,) or (rows, tokens)).
        arguments: All other arguments by dotted name (`added_cond_kwargs.text_embeds`), tensors and plain values; a
            list of tensors is padded to one tensor with the lengths beside it (`ddpo.ragged`).
        lists: Names of the arguments, the latents' among them, that were lists of tensors.
    """

    latents: Tensor
    timestep: Tensor
    arguments: dict[str, object]
    lists: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One pass of the pipeline's loop: its denoiser calls, and what it handed to the scheduler.

    Attributes:
        calls: The denoiser calls, in order.
        sample: The latents given to `scheduler.step`, (B, *latent).
        model_output: The combined model output given to `scheduler.step`, (B, ...).
    """

    calls: tuple[Call, ...]
    sample: Tensor
    model_output: Tensor


@dataclass(frozen=True, kw_only=True)
class CallNames:
    """Names under which a denoiser takes its latents and its timestep."""

    latents: str
    timestep: str


def find_denoiser(pipeline: DiffusionPipeline) -> str:
    """The component that denoises: `unet` or `transformer`.

    Raises:
        UntraceableError: There is none, or more than one.
    """
    names = [name for name in ("unet", "transformer") if isinstance(pipeline.components.get(name), nn.Module)]
    if len(names) != 1:
        raise UntraceableError(
            f"{type(pipeline).__name__} has {len(names)} denoisers ({', '.join(pipeline.components)}); "
            "a policy needs exactly one component named unet or transformer"
        )
    if isinstance(pipeline.components.get("transformer_2"), nn.Module):
        raise UntraceableError(f"{type(pipeline).__name__} switches between transformer and transformer_2; use one")
    if pipeline.components.get("scheduler") is None:
        raise UntraceableError(
            f"{type(pipeline).__name__} has no scheduler ({', '.join(pipeline.components)}); "
            "a policy is a chain of scheduler steps"
        )
    return names[0]


def call_names(denoiser: ModelMixin) -> CallNames:
    """How the denoiser's forward names its latents (the first parameter) and its timestep.

    Raises:
        UntraceableError: No parameter is a timestep.
    """
    parameters = list(inspect.signature(denoiser.forward).parameters)
    timestep = [name for name in parameters if name in TIMESTEP_NAMES]
    if not timestep:
        raise UntraceableError(f"{type(denoiser).__name__}.forward takes no timestep, only ({', '.join(parameters)})")
    return CallNames(latents=parameters[0], timestep=timestep[0])


def trace(
    pipeline: DiffusionPipeline,
    denoiser: ModelMixin,
    arguments: Mapping[str, object],
    *,
    num_steps: int | None = None,
    hollow: bool = True,
) -> list[Step]:
    """Runs the pipeline and records its steps.

    Args:
        pipeline: A stock pipeline with the scheduler that it is to be traced with.
        denoiser: Its denoiser.
        arguments: Keyword arguments of `pipeline.__call__`.
        num_steps: Stop after so many steps; None for all.
        hollow: Whether the denoiser returns fixed numbers, the same at every step, and the latents stay as they are;
            else the real loop runs.

    Returns:
        What was seen, one entry a step.

    Raises:
        UntraceableError: The pipeline did not call its denoiser and its scheduler as a stepwise sampler does.
    """
    with recording(pipeline, denoiser, num_steps=num_steps, hollow=hollow) as steps, suppress(_StopTracing):
        pipeline(**arguments)
    if not steps or any(not entry.calls for entry in steps):
        raise UntraceableError(
            f"{type(pipeline).__name__} does not call its denoiser before every scheduler.step; it cannot be traced"
        )
    return steps


@contextmanager
def recording(
    pipeline: DiffusionPipeline, denoiser: ModelMixin, *, num_steps: int | None = None, hollow: bool = False
) -> Iterator[list[Step]]:
    """Records the steps of a pipeline that is called in the `with` block; see `trace`."""
    names = call_names(denoiser)
    signature = inspect.signature(denoiser.forward)
    scheduler = pipeline.scheduler
    stock_forward, stock_step = denoiser.forward, scheduler.step
    steps: list[Step] = []
    calls: list[Call] = []

    def forward(*positional: object, **keywords: object) -> object:
        bound = _bind(signature, positional, keywords)
        calls.append(_record(bound, names))
        if hollow:
            return _hollow_output(denoiser, bound, names, call=len(calls))
        return stock_forward(*positional, **keywords)

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> object:
        steps.append(Step(calls=tuple(calls), sample=sample, model_output=model_output))
        calls.clear()
        if num_steps is not None and len(steps) >= num_steps:
            raise _StopTracing
        return step_output(sample, options) if hollow else stock_step(model_output, timestep, sample, **options)

    with replaced(denoiser, "forward", forward), replaced(scheduler, "step", step), _unhooked(denoiser, hollow):
        yield steps


def step_output(latents: Tensor, options: Mapping[str, object]) -> object:
    """What `scheduler.step` returns for these latents, in the form that its `options` ask for."""
    return SchedulerOutput(prev_sample=latents) if options.get("return_dict", True) else (latents,)


def beside_noise(step: Step) -> Tensor:
    """What the denoiser is given after the noisy tokens of each row, such as those of an input image.

    Shape (rows, tokens, channels); of latents that are no sequences there is nothing, (rows, 0, ...).
    """
    latents = step.calls[0].latents
    noisy = step.sample.shape[1] if latents.ndim == step.sample.ndim == 3 else latents.shape[1]
    return latents[:, noisy:]


def same(value: object, other: object) -> bool:
    """Whether two recorded arguments are equal, tensors and lists of them among them."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        return len(value) == len(other) and all(same(*pair) for pair in zip(value, other, strict=True))
    return type(value) is type(other) and bool(value == other)


def flatten(arguments: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested dictionaries as one with dotted names; None values are dropped, as they are the defaults."""
    flat: dict[str, object] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif value is not None:
            flat[f"{prefix}{name}"] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict[str, object]:
    """Inverse of `flatten`."""
    nested: dict[str, object] = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})  # type: ignore[assignment]
        place[leaf] = value
    return nested


@contextmanager
def hollowed(denoiser: ModelMixin) -> Iterator[None]:
    """The denoiser returns zeros of the right shape, for the time of a `with` block."""
    names, signature = call_names(denoiser), inspect.signature(denoiser.forward)

    def forward(*positional: object, **keywords: object) -> object:
        return _hollow_output(denoiser, _bind(signature, positional, keywords), names, call=0)

    with replaced(denoiser, "forward", forward):
        yield


@contextmanager
def _unhooked(denoiser: ModelMixin, hollow: bool) -> Iterator[None]:
    """Hooks around a hollow forward, which gather or move weights, do not run: no weight is used.

    Those that gather split weights need all processes, which need not encode the same prompts at the same time.
    """
    if not hollow:
        yield
        return
    before: OrderedDict[int, object] = OrderedDict()
    with replaced(denoiser, "_forward_pre_hooks", before), replaced(denoiser, "_forward_hooks", before):
        yield


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """Sets an instance attribute for the time of a `with` block, shadowing the class's."""
    shadowed = vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if shadowed is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, shadowed)


def _bind(
    signature: inspect.Signature, positional: tuple[object, ...], keywords: Mapping[str, object]
) -> dict[str, object]:
    bound = dict(signature.bind(*positional, **keywords).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def _record(bound: Mapping[str, object], names: CallNames) -> Call:
    latents, timestep = bound[names.latents], bound[names.timestep]
    lists = set()
    if _is_list_of_tensors(latents):
        latents = torch.stack(latents)
        lists.add(names.latents)
    if not isinstance(latents, Tensor):
        raise UntraceableError(f"the denoiser's {names.latents} is a {type(latents).__name__}, not a tensor")
    rest = {name: value for name, value in bound.items() if name not in (names.latents, names.timestep, "return_dict")}
    arguments = flatten(rest)
    for name, value in list(arguments.items()):
        if _is_list_of_tensors(value) and len(value) == latents.shape[0]:
            arguments[name] = ragged.stack(value)
            arguments[name + ragged.LENGTH] = torch.tensor([row.shape[0] for row in value])
            lists.add(name)
    return Call(latents=latents, timestep=torch.as_tensor(timestep), arguments=arguments, lists=frozenset(lists))


def _is_list_of_tensors(value: object) -> TypeGuard[list[Tensor]]:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(row, Tensor) and row.ndim > 0 for row in value)


def _hollow_output(denoiser: ModelMixin, bound: Mapping[str, object], names: CallNames, *, call: int) -> object:
    """sin(call n) in the n-th entry: others in every row and call of a step, the same at every step; zeros for 0."""
    latents = bound[names.latents]
    if _is_list_of_tensors(latents):
        output: object = list(_waves(torch.stack(latents), call).unbind())
    else:
        assert isinstance(latents, Tensor)
        channels_in, channels_out = denoiser.config.get("in_channels"), denoiser.config.get("out_channels")
        shape = list(latents.shape)
        if channels_out and channels_in != channels_out and len(shape) > 3 and shape[1] == channels_in:
            shape[1] = channels_out
        output = _waves(latents.new_empty(shape), call)
    return Transformer2DModelOutput(sample=output) if bound.get("return_dict", True) else (output,)


def _waves(like: Tensor, call: int) -> Tensor:
    count = torch.arange(1, like.numel() + 1, dtype=torch.float32, device=like.device)
    return (call * count).sin().reshape(like.shape).to(like.dtype)
