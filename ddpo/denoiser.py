"""The network of a pipeline, called as the pipeline calls it.

B is the number of samples; with stacked guidance the network sees 2 B rows.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ddpo.guidance import GuidanceRule
from ddpo.tracing import Step, call_names, unflatten
from ddpo.trajectory import Condition

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Denoiser:
    """A denoiser with the arguments that every call of it shares.

    Attributes:
        module: The network itself.
        network: What is called for it: the module, or a distributed wrapper around it.
        per_sample: Names of the arguments that have one row per sample; a `Condition` holds them.
        shared: All other arguments, by dotted name.
    """

    def __init__(self, module: ModelMixin, *, precision: Precision, device: torch.device) -> None:
        self.module = module
        self.network: nn.Module = module
        self.precision: Precision = precision
        self.device = device
        self.per_sample: frozenset[str] = frozenset()
        self.shared: dict[str, object] = {}
        self._names = call_names(module)

    def learn_arguments(self, two: Step, three: Step) -> None:
        """Tells per-sample arguments from shared ones.

        Args:
            two: A step recorded with two prompts.
            three: The same step with three: an argument whose leading size follows the rows belongs to the samples.
        """
        call, other = two.calls[0], three.calls[0]
        rows, other_rows = call.latents.shape[0], other.latents.shape[0]

        def leads(arguments: Mapping[str, object], name: str, size: int) -> bool:
            value = arguments[name]
            return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size

        self.per_sample = frozenset(
            name
            for name in call.arguments
            if leads(call.arguments, name, rows) and leads(other.arguments, name, other_rows)
        )
        self.shared = {name: value for name, value in call.arguments.items() if name not in self.per_sample}

    def condition(self, prompts: Sequence[str], step: Step, rule: GuidanceRule) -> Condition:
        """The per-sample arguments of a recorded step, split into the two branches of a guidance rule."""
        tensors = [
            {
                name: value
                for name, value in call.arguments.items()
                if name in self.per_sample and torch.is_tensor(value)
            }
            for call in step.calls
        ]
        negative: dict[str, Tensor] = {}
        match rule.layout:
            case "single":
                (positive,) = tensors
            case "stacked":
                halves = {name: value.chunk(2) for name, value in tensors[0].items()}
                negative = {name: first for name, (first, _) in halves.items()}
                positive = {name: second for name, (_, second) in halves.items()}
            case "positive_first":
                positive, negative = tensors
            case "negative_first":
                negative, positive = tensors
        return Condition(
            prompts=tuple(prompts), metadata=tuple({} for _ in prompts), positive=positive, negative=negative
        )

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
        positive, negative = condition.positive, condition.negative
        match rule.layout:
            case "single":
                return None, self._call(x, time, positive)
            case "stacked":
                stacked = {name: torch.cat([negative[name], positive[name]]) for name in positive}
                first, second = self._call(torch.cat([x, x]), torch.cat([time, time]), stacked).chunk(2)
                return first, second
            case "positive_first":
                second = self._call(x, time, positive)
                return self._call(x, time, negative), second
            case "negative_first":
                first = self._call(x, time, negative)
                return first, self._call(x, time, positive)

    def autocast(self) -> AbstractContextManager[None]:
        """The network's precision: off for fp32."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def _call(self, x: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        latents = x if self.precision == "fp32" else x.to(DTYPES[self.precision])
        arguments = unflatten({**self.shared, **tensors})
        with self.autocast():
            return self.network(
                **{self._names.latents: latents, self._names.timestep: time}, **arguments, return_dict=False
            )[0]
