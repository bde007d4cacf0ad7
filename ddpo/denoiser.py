"""The network of a pipeline, called as the pipeline calls it.

B is the number of samples; with stacked guidance the network sees 2 B rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, TypeGuard

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ddpo import ragged
from ddpo.guidance import GuidanceRule
from ddpo.ragged import LENGTH
from ddpo.tracing import Call, Step, UntraceableError, beside_noise, call_names, same, unflatten
from ddpo.trajectory import Condition

BESIDE = "beside the noise"  # an argument's name that no denoiser has

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Denoiser:
    """A denoiser with the arguments that every call of it shares.

    Attributes:
        module: The network itself.
        network: What is called for it: the module, or a distributed wrapper around it.
        per_sample: Names of the arguments that have one row per sample; a `Condition` holds them.
        shared: All other arguments, by dotted name.
        repeated: Plain values that the pipeline passes as a list of equals, one a row.
        output_type: Precision in which the pipeline guides; None for the network's own.
        batch_sizes: Numbers of samples per call that the network was compiled for; empty for any number.
    """

    def __init__(self, module: ModelMixin, *, precision: Precision, device: torch.device) -> None:
        self.module = module
        self.network: nn.Module = module
        self.precision: Precision = precision
        self.device = device
        self.per_sample: frozenset[str] = frozenset()
        self.shared: dict[str, object] = {}
        self.repeated: dict[str, object] = {}
        self.output_type: torch.dtype | None = None
        self.batch_sizes: tuple[int, ...] = ()
        self._names = call_names(module)
        self._lists: frozenset[str] = frozenset()
        self._sequences: frozenset[str] = frozenset()
        self._mask: str | None = None
        self._mask_type = torch.bool
        self._mask_when_full = False
        self._extra_axis: int | None = None
        self._noisy_tokens: int | None = None
        self._time_shape: tuple[int, ...] = ()

    def learn_arguments(self, one: Step, two: Step, three: Step) -> None:
        """Tells per-sample arguments from shared ones, and sequences of the prompt's length from fixed ones.

        Args:
            one: The first step of a run with one prompt.
            two: The same with two prompts.
            three: The same with three, the last of them longer: an argument whose leading size follows the rows
                belongs to the samples; if its second size grew, it is as long as the longest prompt.

        Raises:
            UntraceableError: An argument depends on the prompts, but has no row for each.
        """
        self._lists = two.calls[0].lists
        self._noisy_tokens = two.sample.shape[1] if _image_follows(two) else None
        self._extra_axis = _extra_axis(two.calls[0].latents[:, : self._noisy_tokens], two.sample)
        time = two.calls[0].timestep
        self._time_shape = tuple(time.shape[1:]) if time.ndim > 1 else ()
        pairs = [pair for calls in zip(two.calls, three.calls, strict=True) for pair in _row_tensors(*calls)]
        self.per_sample = frozenset(name for name, _, _ in pairs)
        grown = {
            name: after
            for name, before, after in pairs
            if name not in self._lists and before.ndim > 1 and before.shape[1] != after.shape[1]
        }
        masks = [name for name, value in grown.items() if value.ndim == 2 and not value.is_floating_point()]
        self._sequences = frozenset(grown) - frozenset(masks)
        if self._sequences and len(masks) != 1:
            raise UntraceableError(
                f"{', '.join(sorted(self._sequences))} of {type(self.module).__name__} is as long as a batch's longest "
                f"prompt, and {len(masks)} masks say where a prompt ends; one is needed"
            )
        if masks:
            (self._mask,) = masks
            self._mask_type = grown[self._mask].dtype
            self._mask_when_full = all(self._mask in call.arguments for call in one.calls)
        self._learn_shared(two, three)

    def _learn_shared(self, two: Step, three: Step) -> None:
        rest = [_others(call, self.per_sample) for call in (*two.calls, *three.calls)]
        self.shared, self.repeated = dict(rest[0]), {}
        for name, value in rest[0].items():
            found = [other.get(name) for other in rest]
            rows = [call.latents.shape[0] for call in (*two.calls, *three.calls)]
            if isinstance(value, list) and all(_repeats(v, value[:1], n) for v, n in zip(found, rows, strict=True)):
                self.repeated[name] = self.shared.pop(name)[0]  # type: ignore[index]
            elif not all(same(value, other) for other in found):
                raise UntraceableError(
                    f"argument {name} of {type(self.module).__name__} depends on the prompts or differs between the "
                    "guidance branches, but has no row for each sample"
                )

    def condition(self, prompts: Sequence[str], step: Step, rule: GuidanceRule) -> Condition:
        """The per-sample arguments of a recorded step, split into the two branches of a guidance rule."""
        tensors = [self._rows_of(call) for call in step.calls]
        negative: dict[str, Tensor] = {}
        match rule.layout:
            case "single":
                (positive,) = tensors
            case "stacked":
                negative, positive = _halves(tensors[0])
            case "stacked_positive_first":
                positive, negative = _halves(tensors[0])
            case "positive_first":
                positive, negative = tensors
            case "negative_first":
                negative, positive = tensors
        return Condition(
            prompts=tuple(prompts), metadata=tuple({} for _ in prompts), positive=positive, negative=negative
        )

    def _rows_of(self, call: Call) -> dict[str, Tensor]:
        rows = {
            name: value for name, value in call.arguments.items() if name in self.per_sample and torch.is_tensor(value)
        }
        if self._noisy_tokens is not None:
            rows[BESIDE] = call.latents[:, self._noisy_tokens :]
        mask = rows.pop(self._mask, None) if self._mask is not None else None
        for name in self._sequences:
            size, longest = rows[name].shape[:2]
            lengths = torch.full((size,), longest) if mask is None else mask.long().sum(1).cpu()
            if mask is not None and not torch.equal(mask.bool().cpu(), ragged.prefix_mask(lengths, longest)):
                raise UntraceableError(f"{self._mask} of {type(self.module).__name__} does not pad at the end")
            rows[name + LENGTH] = lengths
        return rows

    def branches(
        self, x: Tensor, time: Tensor, condition: Condition, rule: GuidanceRule
    ) -> tuple[Tensor | None, Tensor]:
        """The outputs of the unconditional and the conditional branch.

        Args:
            x: Latents, (B, *latent).
            time: The denoiser's timestep of each sample, (B,).
            condition: B rows.
            rule: Which calls to make.

        Returns:
            (negative or None, positive), each (B, ...).
        """
        if not self.batch_sizes or x.shape[0] in self.batch_sizes:
            return self._branches(x, time, condition, rule)
        pieces = [
            self._branches(x[rows], time[rows], condition.index(rows), rule)
            for rows in padded_pieces(x.shape[0], self.batch_sizes)
        ]
        positive = torch.cat([piece[1] for piece in pieces])[: x.shape[0]]
        negatives = [piece[0] for piece in pieces if piece[0] is not None]
        return (torch.cat(negatives)[: x.shape[0]] if negatives else None), positive

    def _branches(
        self, x: Tensor, time: Tensor, condition: Condition, rule: GuidanceRule
    ) -> tuple[Tensor | None, Tensor]:
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
        one, two = self._call(torch.cat([x, x]), torch.cat([time, time]), ragged.join([first, second])).chunk(2)
        return one, two

    def autocast(self) -> AbstractContextManager[None]:
        """The network's precision: off for fp32."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def _call(self, x: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        latents = x if self.precision == "fp32" else x.to(DTYPES[self.precision])
        if self._noisy_tokens is not None:
            latents = torch.cat([latents, tensors[BESIDE].to(latents.dtype)], dim=1)
            tensors = {name: value for name, value in tensors.items() if name != BESIDE}
        if self._extra_axis is not None:
            latents = latents.unsqueeze(self._extra_axis)
        if self._time_shape:
            time = time[:, None].expand(-1, *self._time_shape)
        repeated = {name: [value] * x.shape[0] for name, value in self.repeated.items()}
        arguments = unflatten({**self.shared, **repeated, **self._unpadded(tensors)})
        given = list(latents.unbind()) if self._names.latents in self._lists else latents
        with self.autocast():
            output = self.network(
                **{self._names.latents: given, self._names.timestep: time}, **arguments, return_dict=False
            )[0]
        if isinstance(output, list):
            output = torch.stack(output)
        if self._extra_axis is not None:
            output = output.squeeze(self._extra_axis)
        if self._noisy_tokens is not None:
            output = output[:, : self._noisy_tokens]
        return output if self.output_type is None else output.to(self.output_type)

    def _unpadded(self, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        """The arguments as the pipeline passes them: lists, or padded to the longest of these rows with a mask."""
        arguments: dict[str, object] = {name: value for name, value in tensors.items() if not name.endswith(LENGTH)}
        for name, value in tensors.items():
            lengths = tensors.get(name + LENGTH)
            if lengths is None:
                continue
            sizes = lengths.tolist()
            if name in self._lists:
                arguments[name] = [row[:size] for row, size in zip(value, sizes, strict=True)]
                continue
            longest = max(sizes)
            arguments[name] = value[:, :longest]
            if self._mask is not None and (self._mask_when_full or min(sizes) < longest):
                mask = ragged.prefix_mask(lengths, longest).to(self._mask_type)
                arguments[self._mask] = mask.to(value.device, non_blocking=True)
        return arguments


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


def _row_tensors(call: Call, other: Call) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name and both values of the tensors that have one row per row of the latents in both calls."""
    for name, after in other.arguments.items():
        before = call.arguments.get(name)
        if _leads(before, call.latents.shape[0]) and _leads(after, other.latents.shape[0]):
            yield name, before, after


def _leads(value: object, size: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size


def _others(call: Call, per_sample: frozenset[str]) -> dict[str, object]:
    return {name: value for name, value in call.arguments.items() if name not in per_sample}


def _repeats(value: object, first: list[object], rows: int) -> bool:
    """Whether a value is `rows` copies of the one entry of `first`, which is no tensor."""
    return isinstance(value, list) and len(first) == 1 and not torch.is_tensor(first[0]) and value == first * rows


def _halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pairs = {name: value.chunk(2) for name, value in tensors.items()}
    return {name: first for name, (first, _) in pairs.items()}, {name: second for name, (_, second) in pairs.items()}


def _image_follows(step: Step) -> bool:
    """Whether the tokens of an input image stand after the noisy ones in the denoiser's latents.

    Raises:
        UntraceableError: Something does, but not after the noisy tokens as the scheduler has them.
    """
    latents, size = step.calls[0].latents, step.sample.shape[1]
    if beside_noise(step).numel() == 0:
        return False
    noisy = latents[:, :size].split(step.sample.shape[0])
    if not all(torch.equal(rows, step.sample.to(rows.dtype)) for rows in noisy):
        raise UntraceableError(
            f"the denoiser is given {latents.shape[1]} tokens where the scheduler steps {size}, and these are not the "
            "first of them"
        )
    return True


def _extra_axis(latents: Tensor, sample: Tensor) -> int | None:
    """Where the denoiser's latents have an axis of size 1 that the scheduler's lack; None for nowhere.

    Raises:
        UntraceableError: They differ in more than that.
    """
    seen, stepped = tuple(latents.shape[1:]), tuple(sample.shape[1:])
    if seen == stepped:
        return None
    for axis in range(len(seen)):
        if len(seen) == len(stepped) + 1 and seen[:axis] + seen[axis + 1 :] == stepped and seen[axis] == 1:
            return axis + 1
    raise UntraceableError(
        f"the denoiser is given {seen} where the scheduler steps {stepped}: an image or a mask in channels beside the "
        "noise is not supported; use the model's text-to-image pipeline"
    )
