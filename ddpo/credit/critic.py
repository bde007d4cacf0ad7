"""A critic: what is still to be earned at a state of a chain, V_h(x_k, k, prompt), a head h for each score.

Scores are learnt apart and combined afterwards as the scores themselves are, so that weights, multipliers and alpha may
move without relearning. The head `kl` is the path KL still to come, this step's included, in nats.

A head predicts in units of its own: V_h = mean_h + std_h z_h. Before it is fitted to an epoch's targets, mean and std
become those of the targets, and the last layer is rescaled so that no prediction changes (Pop-Art, van Hasselt et al.,
arXiv:1602.07714): the KL may grow from nothing by orders of magnitude. A head whose targets have not differed yet is
constant and is not fitted.

N states, H heads, P entries of a prompt, T steps.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from ddpo import ragged
from ddpo.credit.advantage_scale import ROUNDING
from ddpo.credit.critic_networks import make_body
from ddpo.seeds import Purpose, fill_normal, one_seed, stream
from ddpo.trajectory import Condition
from ddpo.validation import UserError, check

NUM_COSINES = 16
_PLACE = 2**32  # of its weights' random numbers, beyond those of processes
FOLDER = "critic"  # beside the LoRA, which is looked for among the files
FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """A value function that is learnt beside the policy, for `advantages.baseline: critic`.

    Attributes:
        kind: `network` is one of its own, which sees the latents; `features` a small head on the denoiser's middle,
            which sampling computes anyway and the critic does not train; both are told the step and the mean of the
            prompt's embeddings. `none` for no critic.
        width: Features of its layers, a multiple of 8.
        learning_rate: Of its own AdamW.
        updates_per_epoch: Its optimizer steps an epoch, after the epoch's advantages are made. Each takes every sample
            at one of its steps, all steps in turn.
        batch_size: Per device: states at a time. Bounds memory; the size of an update does not depend on it.
        warmup_epochs: Epochs in which it only learns; advantages are then against the other samples of the prompt, or
            of the batch where prompts have one sample.
        target_lambda: What it is fitted to: 1 for what was earned from a state on, below 1 with its own values of later
            states in part (lambda-returns), which vary less and are biased where it is wrong.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["none", "network", "features"] = "none"
    width: int = 64
    learning_rate: float = 1e-3
    updates_per_epoch: int = 20
    batch_size: int = 256
    warmup_epochs: int = 5
    target_lambda: float = 1.0

    def __post_init__(self) -> None:
        check(self.width >= 8 and self.width % 8 == 0, "width", self.width, "a positive multiple of 8")
        check(0 < self.learning_rate <= 1, "learning_rate", self.learning_rate, "positive and at most 1")
        for name in ("updates_per_epoch", "batch_size"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        check(self.warmup_epochs >= 0, "warmup_epochs", self.warmup_epochs, "at least 0")
        check(0 <= self.target_lambda <= 1, "target_lambda", self.target_lambda, "in [0, 1]")

    @property
    def is_on(self) -> bool:
        """Whether there is a critic."""
        return self.kind != "none"


@dataclass(frozen=True, kw_only=True)
class CriticShape:
    """What a critic is built from.

    Attributes:
        heads: Names of the scores.
        num_steps: T.
        state: Shape of a state, without the batch.
        prompt_size: P.
        width: Features of its layers.
    """

    heads: tuple[str, ...]
    num_steps: int
    state: tuple[int, ...]
    prompt_size: int
    width: int


class Critic(nn.Module):
    """V_h(x_k, k, prompt); float32.

    Attributes:
        shape: What it is built from.
        mean: Of the targets that it was last fitted to, (H,); not trained.
        std: Their standard deviation, (H,), 0 where they have not differed yet; not trained.
    """

    def __init__(self, shape: CriticShape, *, seed: int = 0) -> None:
        """Makes a critic that predicts 0 everywhere.

        Args:
            shape: Sizes.
            seed: Of its weights.
        """
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):  # what the layers draw is not kept
            width = shape.width
            self.embed = nn.Sequential(
                nn.Linear(NUM_COSINES + shape.prompt_size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
            )
            self.body = make_body(shape.state, width)
            self.hidden = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
            self.leave = nn.Linear(width, len(shape.heads))
        _initialise(self, seed=seed)
        nn.init.zeros_(self.leave.weight)
        self.mean = nn.Parameter(torch.zeros(len(shape.heads)), requires_grad=False)
        self.std = nn.Parameter(torch.zeros(len(shape.heads)), requires_grad=False)

    def forward(self, k: Tensor, x: Tensor, prompt: Tensor) -> Tensor:
        """Values in the unit of each score, (N, H).

        Args:
            k: Steps, (N,) int64.
            x: States x_k, (N, *state).
            prompt: From `pooled_prompt`, (N, P).
        """
        return self.mean + self.std * self.standardised(k, x, prompt)

    def standardised(self, k: Tensor, x: Tensor, prompt: Tensor) -> Tensor:
        """z, (N, H); arguments as for values."""
        embedding = self.embed(torch.cat([step_cosines(k, self.shape.num_steps).to(x), prompt], dim=1))
        features = self.body(x, embedding)
        return self.leave(self.hidden(torch.cat([features, embedding], dim=1)))

    def loss(self, k: Tensor, x: Tensor, prompt: Tensor, targets: Tensor) -> Tensor:
        """Half the squared error of each state in standard deviations of the targets, mean over fitted heads, (N,).

        Args:
            k: As for values, like `x` and `prompt`.
            x: States.
            prompt: Of each.
            targets: (N, H), in the unit of each score.
        """
        is_fitted = self.std > 0
        wanted = (targets - self.mean) / self.std.where(is_fitted, 1.0)
        errors = (self.standardised(k, x, prompt) - wanted).where(is_fitted, 0.0)
        return 0.5 * errors.square().sum(1) / is_fitted.sum().clamp(min=1)

    @torch.no_grad()
    def rescale(self, targets: Tensor) -> None:
        """Takes mean and standard deviation of targets (M, H) for its own; no prediction changes.

        Of a head whose targets are equal to rounding, they stay.
        """
        targets = targets.double()
        std = targets.std(0, correction=0)
        varies = (std > ROUNDING * targets.abs().amax(0)).to(self.std.device)
        mean, std = targets.mean(0).to(self.mean).where(varies, self.mean), std.to(self.std).where(varies, self.std)
        divisor = std.where(std > 0, 1.0)
        self.leave.weight.mul_((self.std / divisor)[:, None])
        self.leave.bias.copy_((self.std * self.leave.bias + self.mean - mean) / divisor)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def save(self, folder: Path) -> None:
        """Writes `critic/model.safetensors`, with its sizes in the header.

        Args:
            folder: Where to.
        """
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.named_parameters()}
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / FOLDER / FILE, metadata={"shape": json.dumps(asdict(self.shape))})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What `save` wrote.

        Raises:
            UserError: There is no critic in the folder.
        """
        path = folder / FOLDER / FILE
        if not path.is_file():
            raise UserError(
                f"there is no {FOLDER}/{FILE} in {folder}: runs with advantages.baseline: critic export one"
            )
        with safe_open(path, framework="pt") as file:
            given = json.loads(file.metadata()["shape"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        critic = cls(CriticShape(**{**given, "heads": tuple(given["heads"]), "state": tuple(given["state"])}))
        critic.load_state_dict(weights)
        return critic


def step_cosines(k: Tensor, num_steps: int) -> Tensor:
    """cos(pi f (k + 1/2) / T) for f = 0, 1, ..., (N, `NUM_COSINES`): all functions of the step where T is no larger."""
    place = (k.to(torch.float32) + 0.5) / num_steps
    return torch.cos(math.pi * place[:, None] * torch.arange(NUM_COSINES, device=k.device))


def pooled_prompt(condition: Condition, rows: int) -> Tensor:
    """What a prompt's embeddings are on the whole, (B, P) float32.

    Each argument of the denoiser is averaged over its tokens, without padding, and brought to mean 0 and variance 1.

    Args:
        condition: B rows.
        rows: B.
    """
    parts = [
        _pooled(value, condition.positive.get(name + ragged.LENGTH))
        for name, value in sorted(condition.positive.items())
        if not name.endswith((ragged.LENGTH, ragged.GROUP))
    ]
    return torch.cat(parts, dim=1) if parts else torch.zeros(rows, 0)


def prompt_sizes(shapes: Sequence[Sequence[int]]) -> int:
    """P, of the shapes of a condition's tensors, without the batch."""
    return sum(shape[-1] if shape else 1 for shape in shapes)


@torch.no_grad()
def _initialise(module: nn.Module, *, seed: int) -> None:
    """Normal weights of variance 1 / fan-in, those of modulations and all biases 0 (LeCun et al. 1998)."""
    random = stream(one_seed(seed, 0, _PLACE, purpose=Purpose.GLOBAL))
    for name, value in module.named_parameters():
        if value.is_meta:
            continue
        if value.ndim == 1:
            value.fill_(1.0 if "norms" in name else 0.0)
        elif "modulations" in name:
            value.zero_()
        else:
            fill_normal(value.data, random)
            value.mul_(value[0].numel() ** -0.5)


def _pooled(value: Tensor, lengths: Tensor | None) -> Tensor:
    """One argument, (B, ...) to (B, its last size)."""
    value = value.float()
    if value.ndim == 1:
        return value[:, None]
    if lengths is not None:
        kept = ragged.prefix_mask(lengths.to(value.device), value.shape[1])
        value = (value * kept.reshape(*kept.shape, *[1] * (value.ndim - 2))).sum(1, keepdim=value.ndim == 2)
        value = value / lengths.to(value).reshape(-1, *[1] * (value.ndim - 1))
    middle = tuple(range(1, value.ndim - 1))
    value = value.mean(middle) if middle else value
    return functional.layer_norm(value, value.shape[-1:]) if value.shape[-1] > 1 else value
