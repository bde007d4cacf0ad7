"""The network of a pipeline, called as the pipeline calls it.

B is the number of samples; with stacked guidance the network sees 2 B rows.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor

from ddpo import ragged
from ddpo.pipeline.argument_learning import learn_arguments
from ddpo.pipeline.arguments import Arguments, groups
from ddpo.pipeline.guidance import GuidanceRule
from ddpo.pipeline.latent_place import BESIDE, LatentPlace, find_place
from ddpo.pipeline.nested import first_output, unflatten
from ddpo.pipeline.network import Network
from ddpo.pipeline.tracing import Call, Step, UntraceableError, call_names
from ddpo.trajectory import Condition

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Branches = tuple[Tensor | None, Tensor]
"""Outputs of the unconditional branch, None without one, and of the conditional branch."""


class Denoiser:
    """A denoiser with the arguments that every call of it shares.

    Attributes:
        network: What is called, shared by all policies over it.
        arguments: Which arguments belong to the samples; a `Condition` holds them.
        place: Where the latents are in what the network is given.
        output_type: Precision in which the pipeline guides; None for the network's own.
        one_row: Whether every sample needs a call of its own.
        experts: Which of several networks each step of the chain is for; empty where there is one.
    """

    def __init__(self, network: Network, *, precision: Precision, device: torch.device) -> None:
        self.network = network
        self.precision: Precision = precision
        self.device = device
        self.arguments = Arguments(network=type(network.module).__name__)
        self.place = LatentPlace()
        self.output_type: torch.dtype | None = None
        self.one_row = False
        self.experts: tuple[str, ...] = ()
        self._expert_times = torch.empty(0)
        self._names = call_names(network.module)
        self._listed = False
        self._time_share: Tensor | None = None
        self._one_time = False

    @property
    def module(self) -> ModelMixin:
        """The network itself."""
        return self.network.module

    @property
    def calls_differ(self) -> bool:
        """Whether how often the network is called for a batch depends on its prompts or steps."""
        return bool(self.arguments.grouped) or len(set(self.experts)) > 1

    def learn_arguments(self, one: Step, two: Step, three: Step, *, alone: bool = False) -> None:
        """Learns how the network is called, from the first steps of three runs; see `argument_learning`.

        Args:
            one: Of a run with one prompt.
            two: Of a run with two prompts.
            three: Of a run with three, the last of them long.
            alone: Whether the three runs had one prompt each, the last of them long.

        Raises:
            UntraceableError: It is called in a way that cannot be split into samples.
        """
        self.arguments = learn_arguments(type(self.module).__name__, one, two, three, alone=alone)
        self.place = find_place(two)
        call = two.calls[0]
        self._listed = call.listed
        self._time_share = _time_share(type(self.module).__name__, two) if call.timestep.ndim > 1 else None
        self._one_time = call.timestep.shape == (1,) and call.latents.shape[0] > 1

    def learn_experts(self, steps: Sequence[Step]) -> None:
        """Learns which network each step of the chain is for, by its time.

        Raises:
            UntraceableError: A step calls two of them.
        """
        if any(len({call.expert for call in step.calls}) > 1 for step in steps):
            raise UntraceableError("the pipeline calls both of its networks in one step; one of them must do")
        if steps[0].calls[0].expert:
            self.experts = tuple(step.calls[0].expert for step in steps)
            self._expert_times = torch.stack([step.calls[0].timestep.amax().float().cpu() for step in steps])

    def expert_of(self, k: int) -> str:
        """The network that makes step k; empty where there is one."""
        return self.experts[k] if self.experts else ""

    def _expert(self, time: float) -> str:
        return self.experts[int((self._expert_times - time).abs().argmin())]

    def condition(self, step: Step, rule: GuidanceRule) -> Condition:
        """The per-sample arguments of a recorded step, split into the two branches of a guidance rule."""
        taken = [self._take(call) for call in step.calls]
        sides = [rule.split([rows[name] for rows in taken]) for name in taken[0]]
        return Condition(
            positive={name: positive for name, (_, positive) in zip(taken[0], sides, strict=True)},
            negative={
                name: negative for name, (negative, _) in zip(taken[0], sides, strict=True) if negative is not None
            },
        )

    def _take(self, call: Call) -> dict[str, Tensor]:
        rows = self.arguments.take(call)
        if self.place.axis is not None:
            rows[BESIDE] = self.place.beside(call.latents)
        return rows

    def outputs(self, step: Step) -> list[Tensor]:
        """What a recorded step's calls returned for the noisy latents, in the precision that the pipeline guides in."""
        return [self._of_noise(call.output) for call in step.calls]

    def branches(self, x: Tensor, time: Tensor, condition: Condition, rule: GuidanceRule) -> Branches:
        """The outputs of the unconditional and the conditional branch.

        Args:
            x: Latents, (B, *latent).
            time: The denoiser's timestep of each sample, (B,).
            condition: B rows.
            rule: Which calls to make.

        Returns:
            (negative or None, positive), each (B, ...).
        """

        def padded(x: Tensor, time: Tensor, condition: Condition) -> Branches:
            sizes = self.network.batch_sizes
            if not sizes or x.shape[0] in sizes:
                return self._branches(x, time, condition, rule)
            pieces = padded_pieces(x.shape[0], sizes)
            negative, positive = _joined([self._branches(x[p], time[p], condition.index(p), rule) for p in pieces])
            return (None if negative is None else negative[: x.shape[0]]), positive[: x.shape[0]]

        together = self._together(time, condition, rule)
        if len(together) == 1:
            return padded(x, time, condition)
        negative, positive = _joined([padded(x[rows], time[rows], condition.index(rows)) for rows in together])
        back = torch.cat(together).argsort().to(x.device)
        return (None if negative is None else negative[back]), positive[back]

    def _together(self, time: Tensor, condition: Condition, rule: GuidanceRule) -> list[Tensor]:
        """Rows of each network call."""
        rows, names = time.shape[0], self.arguments.grouped
        if self.one_row:
            return list(torch.arange(rows).split(1))
        several = len(set(self.experts)) > 1 and not _is_one(time)
        if rows == 1 or not (names or several):
            return [torch.arange(rows)]
        sides = [condition.positive] if rule.layout == "single" else [condition.positive, condition.negative]
        experts = [self._expert(t) for t in time.tolist()] if several else [""] * rows
        return list(groups(sides, names, experts))

    def _branches(self, x: Tensor, time: Tensor, condition: Condition, rule: GuidanceRule) -> Branches:
        positive, negative = condition.positive, condition.negative
        match rule.layout:
            case "single":
                return None, self._call(x, time, positive)
            case "stacked":
                first, second = self._stacked(x, time, negative, positive)
                return first, second
            case "stacked_positive_first":
                first, second = self._stacked(x, time, positive, negative)
                return second, first
            case "positive_first":
                second = self._call(x, time, positive)
                return self._call(x, time, negative), second
            case "negative_first":
                first = self._call(x, time, negative)
                return first, self._call(x, time, positive)

    def _stacked(
        self, x: Tensor, time: Tensor, first: Mapping[str, Tensor], second: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        both = time if self._one_time and _is_one(time) else torch.cat([time, time])
        one, two = self._call(torch.cat([x, x]), both, ragged.join([first, second])).chunk(2)
        return one, two

    def autocast(self) -> AbstractContextManager[None]:
        """The network's precision: off for fp32."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def _call(self, x: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        rows = x.shape[0]
        latents = self.place.given(x if self.precision == "fp32" else x.to(DTYPES[self.precision]), tensors.get(BESIDE))
        arguments = unflatten(self.arguments.give(tensors, rows))
        given = list(latents.unbind()) if self._listed else latents
        expert = {"expert": self._expert(float(time[0]))} if self.experts else {}
        with self.autocast():
            output = self.network(
                rows,
                **expert,
                **{self._names.latents: given, self._names.timestep: self._times(time)},
                **arguments,
                return_dict=False,
            )
        return self._of_noise(first_output(output))

    def _times(self, time: Tensor) -> Tensor:
        """The timestep in the shape that the pipeline gives it in."""
        if self._one_time and _is_one(time):
            return time[:1]
        if self._time_share is None:
            return time
        share = self._time_share.to(time.device, time.dtype)
        return time.reshape(-1, *[1] * share.ndim) * share

    def _of_noise(self, output: Tensor) -> Tensor:
        output = self.place.noisy(output)
        return output if self.output_type is None else output.to(self.output_type)


def padded_pieces(rows: int, sizes: Sequence[int]) -> list[Tensor]:
    """Cuts `rows` rows into pieces of the given sizes; the last one repeats the last row to reach its size.

    Args:
        rows: Number of rows.
        sizes: Allowed sizes, ascending.

    Returns:
        Row indices of each piece, int64.
    """
    starts = range(0, rows, sizes[-1])
    lengths = [min(sizes[-1], rows - start) for start in starts]
    targets = [next(size for size in sizes if size >= length) for length in lengths]
    return [
        torch.arange(start, start + target).clamp(max=rows - 1) for start, target in zip(starts, targets, strict=True)
    ]


def _joined(parts: Sequence[Branches]) -> Branches:
    negatives = [negative for negative, _ in parts if negative is not None]
    return (torch.cat(negatives) if negatives else None), torch.cat([positive for _, positive in parts])


def _time_share(network: str, step: Step) -> Tensor:
    """What part of a sample's time each of its tokens is at: 1 where it is noisy, 0 where it is given.

    Raises:
        UntraceableError: It is not the same for all samples.
    """
    times = step.calls[0].timestep.cpu()
    whole = times.flatten(1).amax(1)
    if not torch.equal(times[:1].expand_as(times), times) or not whole.all():
        raise UntraceableError(f"{network} is given times that differ from sample to sample within one step")
    share = times[0] / whole[0]
    if not ((share == 0) | (share == 1)).all():
        raise UntraceableError(f"{network} is given several times in one sample, and a policy's latents have one")
    return share


def _is_one(time: Tensor) -> bool:
    """Whether all samples are known to be at the same time: it was expanded from one number."""
    return time.shape[0] == 1 or time.stride(0) == 0
