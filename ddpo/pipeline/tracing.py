"""Learns how a stock diffusers pipeline calls its denoiser, by running it once with the expensive parts hollowed out.

The pipeline's `__call__` runs with its denoiser's forward replaced by one that returns fixed numbers and its
scheduler's `step` by one that returns its input. That costs the encoding of the prompts and nothing else, and shows
every argument of every denoiser call: embeddings, pooled embeddings, size ids, guidance embeddings, timesteps. The
policy then makes the same calls itself, so that no model family needs code of its own.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor, nn

from ddpo.pipeline.experts import Experts, parts_of
from ddpo.pipeline.hollow import hollow_output, learn_form, unhooked
from ddpo.pipeline.nested import first_output, flatten, is_list_of_tensors
from ddpo.validation import UserError

SECOND = "transformer_2"
TIMESTEP_NAMES = ("timestep", "timesteps", "t")


class UntraceableError(UserError):
    """A pipeline does not fit the stepwise Gaussian policy; the message says which part and what to do."""


def first_line(error: Exception) -> str:
    """The first line of an error's text, for a message of one line."""
    return (str(error).strip().splitlines() or [""])[0]


class _StopTracing(Exception):
    """Ends the pipeline's loop once enough was seen."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the denoiser.

    Attributes:
        latents: Its first argument, (rows, *latent).
        timestep: The value of its timestep argument, as passed (0-dimensional, (rows,) or (rows, tokens)).
        arguments: All other arguments by dotted name (`added_cond_kwargs.text_embeds`), as they were passed.
        listed: Whether the latents were a list of rows.
        output: What the denoiser returned first; of a hollow one its fixed numbers.
        expert: Which of several networks was called; empty where there is one.
    """

    latents: Tensor
    timestep: Tensor
    arguments: dict[str, object]
    listed: bool
    output: Tensor
    expert: str = ""


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
    if pipeline.components.get("scheduler") is None:
        raise UntraceableError(
            f"{type(pipeline).__name__} has no scheduler ({', '.join(pipeline.components)}); "
            "a policy is a chain of scheduler steps"
        )
    return names[0]


def find_network(pipeline: DiffusionPipeline) -> ModelMixin:
    """The network that denoises; where two do, each a part of the chain, both as one (`ddpo.pipeline.experts`).

    Raises:
        UntraceableError: As `find_denoiser`.
    """
    name = find_denoiser(pipeline)
    second = pipeline.components.get(SECOND)
    parts = {name: getattr(pipeline, name), SECOND: second}
    return Experts(parts) if isinstance(second, nn.Module) else parts[name]


def call_names(denoiser: ModelMixin) -> CallNames:
    """How the denoiser's forward names its latents (the first parameter) and its timestep.

    Raises:
        UntraceableError: No parameter is a timestep.
    """
    parameters = list(_signature(denoiser).parameters)
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
    idle = sum(not entry.calls for entry in steps)
    if steps and steps[0].calls and 2 * idle >= len(steps):
        raise UntraceableError(
            f"{type(pipeline).__name__} steps more than one chain with each call of its denoiser, such as sound beside "
            "a video; a policy is one chain, and the other would have no likelihood. It cannot be trained"
        )
    if not steps or idle:
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
    signature, scheduler = _signature(denoiser), pipeline.scheduler
    stock_step = scheduler.step
    steps: list[Step] = []
    calls: list[Call] = []

    def forward(stock: Callable[..., object], expert: str, *positional: object, **keywords: object) -> object:
        bound = _bind(signature, positional, keywords)
        if hollow:
            output = _hollow_output(denoiser, bound, names, call=len(calls) + 1)
        else:
            output = stock(*positional, **keywords)
            learn_form(denoiser, _latents(bound, names), output)
        calls.append(_record(bound, names, output, expert))
        return output

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **options: object) -> object:
        steps.append(Step(calls=tuple(calls), sample=sample.clone(), model_output=model_output))
        calls.clear()
        if num_steps is not None and len(steps) >= num_steps:
            raise _StopTracing
        return step_output(sample, options) if hollow else stock_step(model_output, timestep, sample, **options)

    with ExitStack() as stack:
        stack.enter_context(replaced(scheduler, "step", step))
        for expert, part in parts_of(denoiser).items():
            stack.enter_context(replaced(part, "forward", partial(forward, part.forward, expert)))
            if hollow:
                stack.enter_context(unhooked(part))
        yield steps


def step_output(latents: Tensor, options: Mapping[str, object]) -> object:
    """What `scheduler.step` returns for these latents, in the form that its `options` ask for.

    A second entry is the predicted clean latents, which the loops of consistency models end with.
    """
    return SchedulerOutput(prev_sample=latents) if options.get("return_dict", True) else (latents, latents)


@contextmanager
def hollowed(denoiser: ModelMixin) -> Iterator[None]:
    """The denoiser returns zeros of the right shape, for the time of a `with` block."""
    names, signature = call_names(denoiser), _signature(denoiser)

    def forward(*positional: object, **keywords: object) -> object:
        return _hollow_output(denoiser, _bind(signature, positional, keywords), names, call=0)

    with ExitStack() as stack:
        for part in parts_of(denoiser).values():
            stack.enter_context(unhooked(part))
            stack.enter_context(replaced(part, "forward", forward))
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


def _signature(denoiser: ModelMixin) -> inspect.Signature:
    return inspect.signature(next(iter(parts_of(denoiser).values())).forward)


def _bind(
    signature: inspect.Signature, positional: tuple[object, ...], keywords: Mapping[str, object]
) -> dict[str, object]:
    bound = dict(signature.bind(*positional, **keywords).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


def _latents(bound: Mapping[str, object], names: CallNames) -> Tensor:
    """The latents of a call; a list with a tensor for each row is stacked."""
    latents = bound[names.latents]
    if is_list_of_tensors(latents):
        return torch.stack(latents)
    if not isinstance(latents, Tensor):
        raise UntraceableError(f"the denoiser's {names.latents} is a {type(latents).__name__}, not a tensor")
    return latents


def _record(bound: Mapping[str, object], names: CallNames, output: object, expert: str) -> Call:
    rest = {name: value for name, value in bound.items() if name not in (names.latents, names.timestep, "return_dict")}
    return Call(
        latents=_latents(bound, names).clone(),  # some loops write the next latents into the same tensor
        timestep=torch.as_tensor(bound[names.timestep]),
        arguments=flatten(rest),
        listed=is_list_of_tensors(bound[names.latents]),
        output=first_output(output),
        expert=expert,
    )


def _hollow_output(denoiser: ModelMixin, bound: Mapping[str, object], names: CallNames, *, call: int) -> object:
    listed, return_dict = is_list_of_tensors(bound[names.latents]), bool(bound.get("return_dict", True))
    return hollow_output(denoiser, _latents(bound, names), listed=listed, return_dict=return_dict, call=call)
