"""The arguments of a denoiser's call that belong to the samples: how they are stored and given back.

They are told apart in `ddpo.pipeline.argument_learning`:

    per row    a size follows the number of rows, on some axis, once or several times (an embedding for each frame)
    ragged     one more size follows the prompt's length; a mask may say where it ends
    common     without rows, but another for another prompt: a network call is for rows that share it
    repeated   a list of equals, one a row
    shared     always the same

A `Condition` holds the first three, one row a sample: B is the number of samples, L the length of the longest.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ddpo import ragged
from ddpo.pipeline.nested import is_list_of_tensors, same
from ddpo.pipeline.tracing import Call, UntraceableError
from ddpo.ragged import GROUP, LENGTH


@dataclass(frozen=True, kw_only=True)
class PerRow:
    """How an argument's rows are found in it.

    Attributes:
        axis: Where the rows are.
        entries: Entries of that axis for each row.
        listed: Whether it is a list with a tensor for each row.
        layered: Whether it is a list of tensors of one shape with all rows each, such as one for each layer; `axis` is
            that of these tensors stacked.
        ragged: Axis of a row's own tensor that is as long as the prompt; None for none.
    """

    axis: int = 0
    entries: int = 1
    listed: bool = False
    layered: bool = False
    ragged: int | None = None

    def take(self, value: object, rows: int) -> Tensor:
        """The rows of an argument, (rows, ...), with the ragged axis first in each."""
        if self.listed:
            assert is_list_of_tensors(value), "a list when it was learnt"
            return ragged.stack(value)
        if self.layered:
            assert is_list_of_tensors(value), "a list when it was learnt"
            value = torch.stack(value)
        assert isinstance(value, Tensor), "a tensor when it was learnt"
        taken: Tensor = value.movedim(self.axis, 0)
        if self.entries > 1:
            taken = taken.unflatten(0, (rows, self.entries))
        return taken if self.ragged is None else taken.movedim(self.ragged + 1, 1)

    def give(self, rows: Tensor) -> Tensor | list[Tensor]:
        """Inverse of `take`, of an argument that is no list with a tensor for each row."""
        value = rows if self.ragged is None else rows.movedim(1, self.ragged + 1)
        if self.entries > 1:
            value = value.flatten(0, 1)
        value = value.movedim(0, self.axis)
        return list(value.unbind()) if self.layered else value


@dataclass(frozen=True, kw_only=True)
class Mask:
    """An argument that says where prompts end.

    Attributes:
        name: Its own.
        covers: The ragged arguments that it is about.
        dtype: Of its values.
        when_full: Whether it is given where nothing is padded, too.
        padded: Whether a prompt alone is padded; then its padding is kept, as the network sees it.
    """

    name: str
    covers: frozenset[str]
    dtype: torch.dtype
    when_full: bool
    padded: bool


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The arguments of a denoiser besides latents and time.

    Attributes:
        network: Class of the denoiser, for messages.
        rows: Arguments with a row for each sample.
        common: Those without rows that another prompt changes, and whether they are plain numbers.
        shared: Values that are always the same.
        repeated: Plain values that the pipeline passes as a list of equals, one a row.
        mask: Where prompts end; None where no argument says so.
    """

    network: str
    rows: Mapping[str, PerRow] = field(default_factory=dict)
    common: Mapping[str, bool] = field(default_factory=dict)
    shared: Mapping[str, object] = field(default_factory=dict)
    repeated: Mapping[str, object] = field(default_factory=dict)
    mask: Mask | None = None

    @property
    def grouped(self) -> list[str]:
        """Entries of a condition that must be equal in all rows of a network call."""
        covered = self.mask.covers | {self.mask.name} if self.mask else frozenset()
        loose = [n for n, spec in self.rows.items() if spec.ragged is not None and not spec.listed and n not in covered]
        return sorted([*(name + LENGTH for name in loose), *(name + GROUP for name in self.common)])

    def take(self, call: Call) -> dict[str, Tensor]:
        """What a recorded call has for each of its rows.

        Raises:
            UntraceableError: An argument that was always the same is another here, or a mask has gaps.
        """
        size = call.latents.shape[0]
        taken: dict[str, Tensor] = {}
        for name, spec in self.rows.items():
            if self.mask is not None and name == self.mask.name:
                continue
            value = call.arguments[name]
            taken[name] = spec.take(value, size)
            if spec.listed:
                taken[name + LENGTH] = torch.tensor([row.shape[0] for row in value])  # type: ignore[attr-defined]
            elif spec.ragged is not None:
                taken[name + LENGTH] = torch.full((size,), taken[name].shape[1])
        if self.mask is not None:
            self._take_lengths(call, taken)
        for name in self.common:
            value = torch.as_tensor(call.arguments[name])
            taken[name] = value.expand(size, *value.shape)
            if value.ndim:
                taken[name + LENGTH] = torch.full((size,), value.shape[0])
            taken[name + GROUP] = torch.full((size,), _digest(value))
        self._check_shared(call)
        return taken

    def _take_lengths(self, call: Call, taken: dict[str, Tensor]) -> None:
        assert self.mask is not None
        given = call.arguments.get(self.mask.name)
        width = max(taken[name].shape[1] for name in self.mask.covers)
        lengths = torch.full((call.latents.shape[0],), width)
        if isinstance(given, Tensor):
            mask = self.rows[self.mask.name].take(given, len(lengths))
            lengths = mask.long().sum(1).cpu()
            if not torch.equal(mask.bool().cpu(), ragged.prefix_mask(lengths, mask.shape[1])):
                raise UntraceableError(f"{self.mask.name} of {self.network} does not pad at the end")
        if self.mask.padded:
            taken[self.mask.name + LENGTH] = lengths
        else:
            taken.update({name + LENGTH: lengths for name in self.mask.covers})

    def _check_shared(self, call: Call) -> None:
        known = {*self.rows, *self.common, *self.repeated}
        for name in {**self.shared, **call.arguments}:
            if name not in known and not _alike(self.shared.get(name), call.arguments.get(name)):
                raise UntraceableError(
                    f"argument {name} of {self.network} was the same for all probes, and is another for this prompt"
                )

    def give(self, tensors: Mapping[str, Tensor], rows: int) -> dict[str, object]:
        """The arguments as the pipeline passes them, of rows that are equal in everything in `grouped`."""
        given: dict[str, object] = {**self.shared, **{name: [value] * rows for name, value in self.repeated.items()}}
        for name, spec in self.rows.items():
            if name not in tensors:
                continue
            lengths = tensors.get(name + LENGTH)
            if lengths is None:
                given[name] = spec.give(tensors[name])
            elif spec.listed:
                given[name] = [row[:size] for row, size in zip(tensors[name], lengths.tolist(), strict=True)]
            else:
                given[name] = spec.give(tensors[name][:, : max(lengths.tolist())])
        if self.mask is not None:
            self._give_mask(tensors, given)
        for name, plain in self.common.items():
            lengths = tensors.get(name + LENGTH)
            value = tensors[name][0] if lengths is None else tensors[name][0, : int(lengths[0])]
            given[name] = value.item() if plain else value
        return given

    def _give_mask(self, tensors: Mapping[str, Tensor], given: dict[str, object]) -> None:
        assert self.mask is not None
        covered = min(self.mask.covers)
        longest = int(tensors[covered + LENGTH].max())
        lengths = tensors[(self.mask.name if self.mask.padded else covered) + LENGTH]
        if self.mask.when_full or int(lengths.min()) < longest:
            mask = self.rows[self.mask.name].give(ragged.prefix_mask(lengths, longest).to(self.mask.dtype))
            device = tensors[covered].device
            given[self.mask.name] = (
                [part.to(device, non_blocking=True) for part in mask]
                if isinstance(mask, list)
                else mask.to(device, non_blocking=True)
            )


def _alike(value: object, other: object) -> bool:
    """Whether two values are equal, up to the precision that a pipeline computed them in."""
    if isinstance(value, Tensor) and isinstance(other, Tensor) and value.dtype != other.dtype:
        return value.shape == other.shape and torch.allclose(value.float(), other.float(), rtol=1e-2, atol=1e-2)
    return same(value, other)


def _digest(value: Tensor) -> int:
    """A number that is another for another tensor."""
    content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content + repr(value.shape).encode(), digest_size=7).digest(), "big")


def groups(
    conditions: Sequence[Mapping[str, Tensor]], names: Sequence[str], experts: Sequence[str] = ()
) -> Iterator[Tensor]:
    """Row indices of those that may share a network call: equal in all these entries of both branches.

    Args:
        conditions: The branches' tensors.
        names: Entries of them.
        experts: Which network each row is for, where there are several.
    """
    keys: list[list[object]] = [tensors[name].tolist() for tensors in conditions for name in names if name in tensors]
    if experts:
        keys.append(list(experts))
    members: dict[tuple[object, ...], list[int]] = {}
    for row, key in enumerate(zip(*keys, strict=True)):
        members.setdefault(key, []).append(row)
    for rows in members.values():
        yield torch.tensor(rows)
