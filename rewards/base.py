"""What a reward is, and the checks around calling one.

A reward scores finished images. It is any callable `(images, prompts, metadata) -> scores`: images `(B, 3, H, W)`
float32 in [0, 1], `B` prompts, `B` metadata dictionaries (whatever the prompt source attached), scores `(B,)`, higher
is better. It may instead return a dictionary of such tensors in which `"score"` is the total and every other key a
component to report.

A reward declared `groupwise` compares images of one prompt with each other: it is called with one whole group at a
time, and the scores of one group depend on no other.

`Reward` wraps the callable so that a wrong result never reaches training: its errors name the reward, the sample and
the sample's prompt.

Legend: `B` batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Metadata = Mapping[str, object]
RewardFunction = Callable[[Tensor, list[str], list[Metadata]], "Tensor | dict[str, Tensor]"]

TOTAL_KEY = "score"
_DIAGNOSIS_SECONDS = 10.0


class RewardError(RuntimeError):
    """A reward failed or returned something that is not a score for every image."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores of one batch of images.

    Attributes:
        total: `(B,)` float32, the number to maximise.
        components: name to `(B,)` float32, parts of the total worth logging; empty when the reward has none.
    """

    total: Tensor
    components: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A named, checked reward function.

    Attributes:
        name: what logs and errors call it.
        function: the callable described in the module docstring.
        differentiable: whether gradients reach the images through `function`.
        range: the values it can take, `(low, high)`, infinities allowed, for documentation and plots;
            None = not stated.
        description: one sentence.
        source: where it is defined, for messages.
        groupwise: whether `function` takes one whole group of images, of one prompt, at a time.
    """

    name: str
    function: RewardFunction
    differentiable: bool = False
    range: tuple[float, float] | None = None
    description: str = ""
    source: str = ""
    groupwise: bool = False

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """Score images without gradients.

        Args:
            images: `(B, 3, H, W)` floating point in [0, 1].
            prompts: the `B` prompts the images were drawn for.
            metadata: `B` dictionaries, empty where the prompt source gives none.
            groups: `B` ids, equal for images that a groupwise reward compares; by equal prompts when None.

        Returns:
            Detached float32 scores on the CPU.

        Raises:
            ValueError: the inputs are not images with a prompt and metadata each.
            RewardError: the reward raised, or its result is not one finite number per image.
        """
        check_inputs(images, prompts, metadata)
        return self.score_checked(images, prompts, metadata, groups)

    def score_checked(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """`__call__` for inputs that already went through `check_inputs`."""
        with torch.no_grad():
            scores = self._score(images, prompts, metadata, groups)
        detached = {name: values.detach().cpu() for name, values in scores.components.items()}
        return Scores(total=scores.total.detach().cpu(), components=detached)

    def differentiable_score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """Score images with the graph kept, so that `total.sum().backward()` reaches the images.

        Valid only for rewards declared differentiable.

        Args:
            images: `(B, 3, H, W)` floating point in [0, 1].
            prompts: the `B` prompts.
            metadata: `B` dictionaries.
            groups: as for `__call__`.

        Returns:
            float32 scores on the device where the reward computed them.

        Raises:
            ValueError: the reward is not declared differentiable, or the inputs are wrong.
            RewardError: as for `__call__`, and when the declared gradient does not exist.
        """
        if not self.differentiable:
            raise ValueError(
                f"reward {self.name!r} is not differentiable ({self.source}); use a policy-gradient objective, "
                f"or declare it with @register(..., differentiable=True) if gradients do reach the images"
            )
        check_inputs(images, prompts, metadata)
        with torch.enable_grad():
            scores = self._score(images, prompts, metadata, groups)
        if images.requires_grad and not scores.total.requires_grad:
            raise RewardError(
                f"reward {self.name!r} is declared differentiable but its score has no gradient ({self.source}); "
                f"remove the detach(), no_grad() or numpy step in it, or declare differentiable=False"
            )
        return scores

    def _score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], groups: Sequence[int] | None
    ) -> Scores:
        """All images in one call, or a call for each group."""
        if not self.groupwise:
            return self._run(images, prompts, metadata)
        rows = group_rows(prompts, groups)
        parts = [self._run(images[own], [prompts[b] for b in own], [metadata[b] for b in own]) for own in rows]
        joined = concatenate(parts, reward=self.name)
        order = torch.tensor([b for own in rows for b in own]).argsort().to(joined.total.device)
        return Scores(
            total=joined.total[order],
            components={name: values[order.to(values.device)] for name, values in joined.components.items()},
        )

    def _run(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        version = None if images.is_inference() else images._version
        try:
            result = self.function(images, list(prompts), list(metadata))
        except RewardError:  # says all that there is to say
            raise
        except Exception as error:
            raise RewardError(_describe_failure(self, error, images, prompts, metadata)) from error
        if version is not None and images._version != version:
            raise RewardError(
                f"reward {self.name!r} changed the images in place ({self.source}); other rewards see the same tensor: "
                f"work on images.clone(), or use the operations without a trailing underscore"
            )
        return _check_result(self, result, prompts)


def check_inputs(images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
    """Raise ValueError unless these are images in [0, 1] with one prompt and one metadata dictionary each."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a torch.Tensor (B, 3, H, W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, H, W), none of them 0, got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {images.dtype}; divide uint8 images by 255")
    low, high = (float(bound) for bound in images.detach().aminmax())
    if not (low >= 0.0 and high <= 1.0):  # also true for NaN
        raise ValueError(f"images must lie in [0, 1], got values in [{low:g}, {high:g}]; clamp after decoding")
    for label, values in (("prompts", prompts), ("metadata", metadata)):
        if isinstance(values, str) or len(values) != images.shape[0]:
            count = "a single string" if isinstance(values, str) else str(len(values))
            raise ValueError(f"{label} must have one entry for each of the {images.shape[0]} images, got {count}")


def concatenate(parts: Sequence[Scores], *, reward: str = "") -> Scores:
    """The scores of several batches, at least one, as those of one.

    Args:
        parts: of the batches, in order.
        reward: whose they are; empty for a sum, whose components name their rewards.

    Raises:
        RewardError: the batches have different components.
    """
    for part in parts:
        check_components(parts[0].components, part.components, reward=reward)
    return Scores(
        total=torch.cat([part.total for part in parts]),
        components={name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components},
    )


def check_components(first: Iterable[str], names: Iterable[str], *, reward: str = "") -> None:
    """Raise RewardError unless a batch reports the same components as the first one, in whatever order.

    Args:
        first: of the first batch.
        names: of another batch.
        reward: whose they are; empty for a sum, whose components `<reward>/<component>` name their rewards.
    """
    expected, got = sorted(set(first)), sorted(set(names))
    different = sorted(set(expected) ^ set(got))
    if not different:
        return
    if not reward:
        reward = different[0].partition("/")[0]
        expected, got = ([name for name in own if name.startswith(f"{reward}/")] for own in (expected, got))
    raise RewardError(
        f"reward {reward!r} reports other components for one batch ({', '.join(got) or 'none'}) than for the first "
        f"({', '.join(expected) or 'none'}); return the same keys for every batch, with 0 where one has no meaning"
    )


def total_and_parts(total: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a reward made of others returns: its own total, and theirs as components.

    A part that is itself called `score` is reported as `raw/score`, which no other part can be called.
    """
    return {TOTAL_KEY: total, **{f"raw/{name}" if name == TOTAL_KEY else name: part for name, part in parts.items()}}


def group_rows(prompts: Sequence[str], groups: Sequence[int] | None) -> list[list[int]]:
    """Rows of each group, in the order in which groups first occur.

    Args:
        prompts: `B` texts, which name the groups when `groups` is None.
        groups: `B` ids, or None.

    Raises:
        ValueError: the ids are not one for each prompt.
    """
    if groups is not None and len(groups) != len(prompts):
        raise ValueError(f"groups must have one id for each of the {len(prompts)} images, got {len(groups)}")
    rows: dict[str | int, list[int]] = {}
    ids: Sequence[str | int] = prompts if groups is None else groups
    for b, key in enumerate(ids):
        rows.setdefault(key, []).append(b)
    return list(rows.values())


def _check_result(reward: Reward, result: object, prompts: Sequence[str]) -> Scores:
    """Turn what the function returned into Scores, or say what is wrong with it."""
    if not isinstance(result, dict):
        return Scores(total=_check_values(reward, result, prompts, label="result"))
    names = [name for name in result if not (isinstance(name, str) and name)]
    if names:
        raise RewardError(
            f"reward {reward.name!r} returned a dict with the key {names[0]!r}; keys must be non-empty strings"
        )
    if TOTAL_KEY not in result:
        raise RewardError(
            f"reward {reward.name!r} returned a dict without the key {TOTAL_KEY!r} "
            f"(keys: {', '.join(result) or 'none'}); the total to maximise goes under "
            f"{TOTAL_KEY!r}, every other key is a component"
        )
    checked = {name: _check_values(reward, values, prompts, label=f"{name!r}") for name, values in result.items()}
    return Scores(total=checked.pop(TOTAL_KEY), components=checked)


def _check_values(reward: Reward, values: object, prompts: Sequence[str], *, label: str) -> Tensor:
    """Check one `(B,)` tensor and return it as float32."""
    size = len(prompts)
    if not isinstance(values, Tensor):
        raise RewardError(
            f"reward {reward.name!r}: its {label} must be a torch.Tensor of shape ({size},), "
            f"got {type(values).__name__} ({reward.source}); end with torch.as_tensor(scores, dtype=torch.float32)"
        )
    if values.is_complex():
        raise RewardError(f"reward {reward.name!r}: its {label} must be real numbers, got {values.dtype}")
    if values.shape != (size,):
        raise RewardError(
            f"reward {reward.name!r}: its {label} must have shape ({size},), one number per image, "
            f"got {tuple(values.shape)} ({reward.source}); {_shape_cure(values, size)}"
        )
    numbers = values.to(torch.float32)
    bad = (~torch.isfinite(numbers.detach())).nonzero().flatten().tolist()
    if bad:
        others = f", and for {len(bad) - 1} more of {size}" if len(bad) > 1 else ""
        raise RewardError(
            f"reward {reward.name!r}: its {label} is {values[bad[0]].item():g} for sample {bad[0]} "
            f"(prompt {prompts[bad[0]]!r}){others}; scores must be finite in float32: find the division, log or "
            f"overflow in {reward.source or 'the reward'}, or give such images a finite lowest score"
        )
    return numbers


def _shape_cure(values: Tensor, size: int) -> str:
    if values.ndim == 0:
        return "it looks averaged over the batch: leave out the mean, or use .mean(dim=(1, 2, 3))"
    if values.numel() == size:
        return "add .flatten()"
    if values.ndim > 1 and values.shape[0] == size:
        return f"reduce the other dimensions, for example .flatten(1).mean(dim=1) for {tuple(values.shape)}"
    return "return one score for each image, in order"


def _describe_failure(
    reward: Reward, error: Exception, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
) -> str:
    """Name the sample on which the reward raises, found by scoring the samples one by one (for a limited time)."""
    message = f"reward {reward.name!r} raised {type(error).__name__}: {error} ({reward.source})"
    deadline = time.monotonic() + _DIAGNOSIS_SECONDS
    for b, prompt in enumerate(prompts):
        if time.monotonic() > deadline:
            break
        try:
            with torch.no_grad():
                reward.function(images[b : b + 1].detach(), [prompt], [metadata[b]])
        except Exception as again:
            return f"{message}; sample {b} (prompt {prompt!r}) fails alone with {type(again).__name__}: {again}"
    return (
        f"{message}; on a batch of {len(prompts)}, first prompt {prompts[0]!r}; no single sample was seen to fail alone"
    )
