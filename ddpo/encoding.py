"""From prompts, with their input images where a pipeline edits, to conditions; each is encoded once and remembered."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from PIL.Image import Image
from torch import Tensor

from ddpo import ragged
from ddpo.input_images import IMAGE, fit, identity, read_image, rewards_metadata
from ddpo.pipeline_call import PipelineCall
from ddpo.tracing import UntraceableError
from ddpo.trajectory import Condition

IMAGES_AT_ONCE = 2  # a VAE needs far more memory for a picture than a text encoder for a prompt

Key = tuple[str, str]
"""A text and the identity of its image, empty without one."""

Value = TypeVar("Value")


class Encoder:
    """Encodes prompts by a pipeline and remembers each."""

    def __init__(
        self,
        encode: Callable[[Sequence[str], Sequence[Image] | None], Condition],
        name: str,
        call: PipelineCall,
        *,
        store: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Starts without anything remembered.

        Args:
            encode: The condition of prompts and their images by the pipeline itself.
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
        self._branches: dict[Key, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        self._images: dict[str, Image] = {}
        self._shapes: dict[tuple[str, str], torch.Size] = {}

    def __call__(
        self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]] | None, *, chunk_size: int
    ) -> Condition:
        """The condition of B prompts; see `ddpo.Policy.encode`."""
        given = tuple({} for _ in prompts) if metadata is None else tuple(metadata)
        self.check(prompts, given)
        names = [identity(entry[IMAGE]) if IMAGE in entry else "" for entry in given]
        if self._call.image_size is not None:
            self._read(names, given, self._call.image_size)
            given = tuple(rewards_metadata(e, self._images[name]) for e, name in zip(given, names, strict=True))
            chunk_size = min(chunk_size, IMAGES_AT_ONCE)
        keys = list(zip(prompts, names, strict=True))
        for chunk in _chunks([key for key in dict.fromkeys(keys) if key not in self._branches], chunk_size):
            self._remember(chunk)
        rows = [self._branches[key] for key in keys]
        positive, negative = (ragged.collate([row[side] for row in rows]) for side in (0, 1))
        stored = Condition(prompts=tuple(prompts), metadata=given, positive=positive, negative=negative)
        return stored.to(self._device)

    def check(self, prompts: Sequence[str], metadata: Sequence[Mapping[str, object]]) -> None:
        """Refuses what does not fit the pipeline; see `ddpo.Policy.check_inputs`."""
        edits = self._call.image_size is not None
        for prompt, entry in zip(prompts, metadata, strict=True):
            if edits and IMAGE not in entry:
                raise ValueError(
                    f"{self._name} edits an input image, but the prompt {prompt!r} comes without one: give it the key "
                    '`image`, a file, e.g. {"prompt": "make it snow", "image": "photo.png"} in a .jsonl source'
                )
            if not edits and IMAGE in entry:
                raise ValueError(
                    f"the prompt {prompt!r} comes with an input image, which cannot be used: {self._call.no_images}; "
                    "leave out the key `image`, or choose a pipeline that edits, such as FLUX Kontext"
                )

    def _read(self, names: Sequence[str], metadata: Sequence[Mapping[str, object]], size: tuple[int, int]) -> None:
        for name, entry in zip(names, metadata, strict=True):
            if name not in self._images:
                self._images[name] = fit(read_image(entry[IMAGE]), size)

    def _remember(self, keys: Sequence[Key]) -> None:
        images = [self._images[image] for _, image in keys] if self._call.image_size is not None else None
        condition = self._encode([prompt for prompt, _ in keys], images)
        self._check_shapes(condition)
        for row, key in enumerate(keys):
            positive, negative = (
                ragged.trim({name: self._store(value[row].detach()) for name, value in side.items()})
                for side in (condition.positive, condition.negative)
            )
            self._branches[key] = (positive, negative)

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


def _chunks(values: Sequence[Value], size: int) -> list[Sequence[Value]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
