"""A named reward: a function and what is known of it, called so that a wrong result never reaches training.

A reward declared `groupwise` compares images of one prompt with each other: it is called with one whole group at a
time, and the scores of one group depend on no other. Errors name the reward, the sample and the sample's prompt.

Legend: `B` batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.base import (
    Metadata,
    RewardError,
    RewardFunction,
    Scores,
    UserError,
    check_inputs,
    concatenate,
    group_rows,
    renumber_sample,
)
from rewards.frames import MIDDLE, chosen_frames
from rewards.process_state import kept
from rewards.results import read_scores

_DIAGNOSIS_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A named, checked reward function.

    Attributes:
        name: What logs and errors call it.
        function: The callable described in `rewards.base`.
        differentiable: Whether gradients reach the images through `function`.
        range: The values it can take, `(low, high)`, infinities allowed, for documentation and plots;
            None = not stated.
        description: One sentence.
        source: Where it is defined, for messages.
        groupwise: Whether `function` takes one whole group of images, of one prompt, at a time.
        frames: Which frames of a video it takes (`rewards.frames`): one picture of each, or `(B, F, 3, H, W)`.
    """

    name: str
    function: RewardFunction
    differentiable: bool = False
    range: tuple[float, float] | None = None
    description: str = ""
    source: str = ""
    groupwise: bool = False
    frames: str = MIDDLE

    def __call__(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
        *,
        gradient: bool = False,
    ) -> Scores:
        """Scores images.

        Args:
            images: `(B, 3, H, W)` or `(B, F, 3, H, W)` floating point in [0, 1].
            prompts: The `B` prompts the images were drawn for.
            metadata: `B` dictionaries, empty where the prompt source gives none.
            groups: `B` ids, equal for images that a groupwise reward compares; by equal prompts when None.
            gradient: Whether to keep the graph, so that `total.sum().backward()` reaches the images; valid for rewards
                declared differentiable.

        Returns:
            float32 scores: detached and on the CPU; with `gradient`, where the reward computed them.

        Raises:
            ValueError: The inputs are not images with a prompt and metadata each.
            UserError: A gradient is asked of a reward that is not declared differentiable.
            RewardError: The reward raised, its result is not one finite number per image, or the declared gradient does
                not exist.
        """
        check_inputs(images, prompts, metadata)
        if gradient and not self.differentiable:
            raise UserError(
                f"reward {self.name!r} is not differentiable{self._where}; use a policy-gradient objective, "
                f"or declare it with @register(..., differentiable=True) if gradients do reach the images"
            )
        with torch.set_grad_enabled(gradient):
            scores = self.compute(images, prompts, metadata, groups)
        if gradient:
            return scores
        detached = {name: values.detach().cpu() for name, values in scores.components.items()}
        return Scores(total=scores.total.detach().cpu(), components=detached)

    def compute(
        self,
        images: Tensor,
        prompts: Sequence[str],
        metadata: Sequence[Metadata],
        groups: Sequence[int] | None = None,
    ) -> Scores:
        """Scores as the function makes them, in the caller's gradient mode: for rewards that are made of others.

        The arguments are those of `__call__`, which has checked them.

        Raises:
            RewardError: As for `__call__`.
        """
        images = chosen_frames(images, self.frames, reward=self.name)
        if not self.groupwise:
            return self._run(images, prompts, metadata)
        rows = group_rows(prompts, groups)
        parts = [
            self._run_group(images[own], [prompts[b] for b in own], [metadata[b] for b in own], own) for own in rows
        ]
        joined = concatenate(parts, reward=self.name)
        order = torch.tensor([b for own in rows for b in own]).argsort().to(joined.total.device)
        return Scores(
            total=joined.total[order],
            components={name: values[order.to(values.device)] for name, values in joined.components.items()},
        )

    def _run_group(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata], rows: Sequence[int]
    ) -> Scores:
        """Scores the images of a group, which are these rows of the batch."""
        try:
            return self._run(images, prompts, metadata)
        except RewardError as error:
            renumber_sample(error, rows)
            raise

    def _run(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Scores:
        version = None if images.is_inference() else images._version
        try:
            with kept(f"reward {self.name!r}"):
                result = self.function(images, list(prompts), list(metadata))
        except RewardError:  # says all that there is to say
            raise
        except (Exception, SystemExit) as error:
            raise RewardError(self._failure(error, images, prompts, metadata)) from error
        if version is not None and images._version != version:
            raise RewardError(
                f"reward {self.name!r} changed the images in place{self._where}; other rewards see the same tensor: "
                f"work on images.clone(), or use the operations without a trailing underscore"
            )
        scores = read_scores(result, prompts, reward=self.name, source=self.source)
        if self.differentiable and torch.is_grad_enabled() and images.requires_grad and not scores.total.requires_grad:
            raise RewardError(
                f"reward {self.name!r} is declared differentiable but its score has no gradient{self._where}; "
                f"remove the detach(), no_grad() or numpy step in it, or declare differentiable=False"
            )
        return scores

    @property
    def _where(self) -> str:
        return f" ({self.source})" if self.source else ""

    def _failure(
        self, error: BaseException, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> str:
        """Names the sample on which the reward raises, found by scoring them one by one, for a limited time."""
        said = describe_exception(error)
        message = f"reward {self.name!r} {said}{self._where}"
        deadline = time.monotonic() + _DIAGNOSIS_SECONDS
        for b, prompt in enumerate(prompts):
            if time.monotonic() > deadline:
                break
            try:
                with torch.no_grad(), kept(f"reward {self.name!r}"):
                    self.function(images[b : b + 1].detach(), [prompt], [metadata[b]])
            except (Exception, SystemExit) as again:
                alone = describe_exception(again)
                return f"{message} for sample {b} (prompt {prompt!r})" + (
                    "" if alone == said else f", which alone {alone}"
                )
        whole = f"on a batch of {len(prompts)}, first prompt {prompts[0]!r}"
        return f"{message} {whole}; no single sample was seen to fail alone"


def describe_exception(error: BaseException) -> str:
    """What code did, as a predicate: `raised KeyError: 'cross'`, `called exit(1)`."""
    if isinstance(error, SystemExit):
        return f"called exit({'' if error.code is None else repr(error.code)})"
    return f"raised {type(error).__name__}: {error}".removesuffix(": ")
