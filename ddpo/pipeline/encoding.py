"""From prompts, with their input images where a pipeline edits, to conditions; each is encoded and remembered.

Each prompt is encoded alone: the rounding of a text encoder depends on what is in a batch, and what a prompt means
must not depend on which prompts came before it, so that a run can be resumed and an evaluation repeated exactly.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ddpo import ragged
from ddpo.pipeline.call import PipelineCall
from ddpo.pipeline.input_images import Inputs, fit, identities, read_image, rewards_metadata, sources
from ddpo.pipeline.lru import Recent
from ddpo.pipeline.tracing import UntraceableError
from ddpo.trajectory import Condition
from ddpo.validation import UserError

REMEMBERED_BYTES = 2 * 2**30  # of encodings, and as much of input images

Key = tuple[str, str]
"""A text and the identities of its images, empty without one."""

Branches = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The tensors of one prompt: of the conditional and of the unconditional branch."""


class Encoder:
    """Encodes prompts by a pipeline and remembers those that were used most recently."""

    def __init__(
        self,
        encode: Callable[[Sequence[str], Sequence[Inputs] | None], Iterator[Condition]],
        name: str,
        call: PipelineCall,
        *,
        store: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Starts without anything remembered.

        Args:
            encode: The condition of each prompt, and its image, alone, by the pipeline itself.
            name: The pipeline's, for messages.
            call: How it is called.
            store: Puts an encoding where it waits to be used.
            device: Where conditions are.
        """
        self._encode = encode
        self._name = name
        self._call = call
        self._store = store
        self._device = device
        self._branches: Recent[Key, Branches] = Recent(REMEMBERED_BYTES)
        self._images: Recent[str, Inputs] = Recent(REMEMBERED_BYTES)
        self._negative: dict[str, Tensor] = {}
        self._shapes: dict[tuple[str, str], torch.Size] = {}

    def __call__(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None) -> Condition:
        """The condition of B prompts; see `ddpo.Policy.encode`."""
        given = _given(prompts, metadata)
        self.check(prompts, given)
        names = _names(given)
        size = self._call.image_size
        images = None if size is None else self._read(names, given, size)
        keys = list(zip(prompts, names, strict=True))
        known = self._known(dict.fromkeys(keys), images)
        rows = [known[key] for key in keys]
        positive, negative = (ragged.collate([row[side] for row in rows]) for side in (0, 1))
        return Condition(positive=positive, negative=negative).to(self._device)

    def rewards_metadata(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None
    ) -> tuple[Mapping[str, object], ...]:
        """The metadata of B prompts as rewards see it; see `ddpo.Policy.rewards_metadata`."""
        given = _given(prompts, metadata)
        self.check(prompts, given)
        size = self._call.image_size
        if size is None:
            return given
        names = _names(given)
        images = self._read(names, given, size)
        return tuple(rewards_metadata(entry, images[name]) for entry, name in zip(given, names, strict=True))

    def check(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Refuses what does not fit the pipeline; see `ddpo.Policy.check_inputs`."""
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a sequence of texts, got one text; give [{prompts!r}]")
        if len(prompts) == 0:
            raise UserError("there is no prompt to encode; give at least one")
        if len(metadata) != len(prompts):
            raise UserError(
                f"there must be one dictionary of metadata for each of {len(prompts)} prompts, got {len(metadata)}; "
                "leave metadata out for empty ones"
            )
        for prompt, entry in zip(prompts, metadata, strict=True):
            missing = next((name for name in self._call.inputs if name not in entry), None)
            if missing is not None:
                example = ", ".join(f'"{name}": "photo.png"' for name in self._call.inputs)
                raise UserError(
                    f"{self._name} takes an input image, but the prompt {prompt!r} comes without one: give it the key "
                    f'`{missing}`, a file, e.g. {{"prompt": "make it snow", {example}}} in a .jsonl source'
                )
            unused = next((name for name in sources(entry) if name not in self._call.inputs), None)
            if unused is not None:
                why = self._call.no_images or f"{self._name} takes {' and '.join(self._call.inputs)}"
                raise UserError(
                    f"the prompt {prompt!r} comes with an input image `{unused}`, which cannot be used: {why}; "
                    f"leave out the key `{unused}`, or choose a pipeline that edits, such as FLUX Kontext"
                )

    def _read(
        self, names: Sequence[str], metadata: Sequence[Mapping[str, object]], size: tuple[int, int]
    ) -> dict[str, Inputs]:
        """The input images of the prompts by their identities, at one size."""
        images: dict[str, Inputs] = {}
        for name, entry in dict(zip(names, metadata, strict=True)).items():
            found = self._images.get(name)
            if found is None:
                found = {key: fit(read_image(source), size) for key, source in sources(entry).items()}
                self._images.put(name, found, len(found) * 3 * size[0] * size[1])
            images[name] = found
        return images

    def _known(self, keys: Collection[Key], images: Mapping[str, Inputs] | None) -> dict[Key, Branches]:
        """The encodings of all keys; those that are not remembered are made."""
        known = {key: branches for key in keys if (branches := self._branches.get(key)) is not None}
        missing = [key for key in keys if key not in known]
        if missing:
            given = None if images is None else [images[image] for _, image in missing]
            conditions = self._encode([prompt for prompt, _ in missing], given)
            known |= {key: self._remember(key, condition) for key, condition in zip(missing, conditions, strict=True)}
        return known

    def _remember(self, key: Key, condition: Condition) -> Branches:
        """Keeps the one row of a condition; an unconditional branch that equals the last one is not kept twice."""
        self._check_shapes(condition)
        positive, negative = (
            # A copy: a row of a tensor, or what remains of one without its padding, would keep all of it.
            {name: self._store(value).clone() for name, value in ragged.trim(_first_row(side)).items()}
            for side in (condition.positive, condition.negative)
        )
        if _equal(negative, self._negative):
            negative, size = self._negative, _bytes(positive)
        else:
            self._negative, size = negative, _bytes(positive) + _bytes(negative)
        self._branches.put(key, (positive, negative), size)
        return positive, negative

    def _check_shapes(self, condition: Condition) -> None:
        """Refuses rows as long as what was encoded together: without a length, padding cannot be told from a prompt."""
        for side, tensors in (("positive", condition.positive), ("negative", condition.negative)):
            for name, value in tensors.items():
                shape = self._shapes.setdefault((side, name), value.shape[1:])
                if name + ragged.LENGTH not in tensors and value.shape[1:] != shape:
                    raise UntraceableError(
                        f"{self._name} makes {name} of shape {tuple(value.shape[1:])} for some prompts and "
                        f"{tuple(shape)} for others, without a mask that says where a prompt ends: a picture would "
                        "depend on what was encoded together. It cannot be trained."
                    )


def _given(prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None) -> tuple[Mapping[str, object], ...]:
    return tuple({} for _ in prompts) if metadata is None else tuple(metadata)


def _names(metadata: Sequence[Mapping[str, object]]) -> list[str]:
    """The identities of each prompt's input images, empty without one."""
    return [identities(entry) for entry in metadata]


def _first_row(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0].detach() for name, value in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())
