"""Which denoising steps are stochastic; the others are steps of the noise-free ODE.

Only stochastic steps have a log-probability and a KL: with w of T steps, training costs w/T of what it costs with all,
and only sampling still runs T steps. The number of stochastic steps is the same in every epoch, so that updates keep
their size.

The price is a bias. The ODE's steps are made by the same weights: the gradient lacks how the image moves with the
weights through them, and no KL sees that they move. Drawing other steps in other epochs does not average it out
(`ddpo verify --only gradient --full` measures both against the exact gradient).

    all             every step that has noise under the sampler
    window          w neighbouring steps that start at the noisiest and move towards the image as training goes on
                    (MixGRPO, arXiv:2507.21802, "progressive" with w = 4, one step every 25 iterations), and stay there
                    or start again
    random_window   w neighbouring steps at a place drawn anew for every epoch (Flow-GRPO-Fast, w = 1 or 2; there in the
                    noisier half: high_noise_fraction 0.5)
    random          any w steps, drawn anew for every epoch (MixGRPO's "random")

The choice is a function of the configuration, a seed and the epoch alone: all processes agree without a word, and a
resumed run goes on with what the uninterrupted one would have taken. Deviation from Flow-GRPO-Fast: there, each batch
of rollouts draws its window; here, all samples of an epoch share it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ddpo.seeds import Purpose, one_seed, stream
from ddpo.validation import check

SelectionKind = Literal["all", "window", "random_window", "random"]
DEFAULT_SIZE: dict[SelectionKind, int] = {"window": 4, "random_window": 2, "random": 4}
SHIFT_EVERY_EPOCHS = 25


@dataclass(frozen=True, kw_only=True)
class StepSelection:
    """Which steps have noise and are trained.

    Attributes:
        kind: `all`; `window`, neighbouring steps that move towards the image (MixGRPO); `random_window`, neighbouring
            steps drawn anew each epoch (Flow-GRPO-Fast); `random`, any steps drawn anew each epoch.
        size: Stochastic steps per image, with any kind but `all`; null takes 4, or 2 for `random_window`.
        start: First step of a `window` before it has moved, counted from the noisiest, 0.
        stride: Steps by which a `window` moves; null takes 1.
        shift_every_epochs: Epochs after which a `window` moves, until it has come to the last steps; 0 for never, null
            takes 25.
        restart: Whether a `window` that has been at the last steps for as long goes back to `start`, so that later
            epochs train all steps in turn; null takes false.
        high_noise_fraction: Only this share of the steps, the noisiest, may be stochastic, in (0, 1].
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: SelectionKind = "all"
    size: int | None = None
    start: int | None = None
    stride: int | None = None
    shift_every_epochs: int | None = None
    restart: bool | None = None
    high_noise_fraction: float = 1.0

    def __post_init__(self) -> None:
        alone = "null with kind: all (it has every step; choose kind: window, random_window or random)"
        check(self.kind != "all" or self.size is None, "size", self.size, alone)
        check(self.size is None or self.size >= 1, "size", self.size, "at least 1 or null")
        for name, value, least in (
            ("start", self.start, 0), ("stride", self.stride, 1), ("shift_every_epochs", self.shift_every_epochs, 0)
        ):  # fmt: skip
            fits = value is None or self.kind == "window"
            check(fits, name, value, f"null with kind: {self.kind} (only a window has one)")
            check(value is None or value >= least, name, value, f"at least {least} or null")
        fits = self.restart is None or (self.kind == "window" and self.shift_every_epochs != 0)
        check(fits, "restart", self.restart, "null but for a window that moves")
        fraction = self.high_noise_fraction
        check(0 < fraction <= 1, "high_noise_fraction", fraction, "in (0, 1]")

    @property
    def changes(self) -> bool:
        """Whether different epochs have different stochastic steps."""
        return self.kind in ("random_window", "random") or (self.kind == "window" and self.shift_every_epochs != 0)

    def candidates(self, noisy: Sequence[int], num_steps: int) -> tuple[int, ...]:
        """The steps among which is chosen.

        Args:
            noisy: Steps that have noise under the sampler, in order.
            num_steps: T, of which high_noise_fraction is taken: the first steps are the noisiest.
        """
        limit = max(1, round(self.high_noise_fraction * num_steps))
        return tuple(k for k in noisy if k < limit)

    def count(self, candidates: Sequence[int]) -> int:
        """How many of the candidates are stochastic, the same in every epoch.

        Raises:
            FieldError: There are too few candidates.
        """
        if self.kind == "all":
            return len(candidates)
        size, start = self._size, self.start or 0
        there_are = f"{len(candidates)}, the steps that can be stochastic here"
        check(size <= len(candidates), "size", size, f"at most {there_are}")
        check(start + size <= len(candidates), "start", start, f"at most {len(candidates) - size} with size {size}")
        return size

    @property
    def starts_noisy(self) -> bool:
        """Whether the stochastic steps are the first ones in every epoch, with nothing before or between them."""
        return self.kind == "all" or (self.kind == "window" and not self.changes and not self.start)

    def reaches_last(self, num_steps: int) -> bool:
        """Whether the last of T steps, all of which can have noise, is stochastic in some epoch."""
        steps = self.candidates(range(num_steps), num_steps)
        stays = self.kind == "window" and not self.changes
        return steps[-1] == num_steps - 1 and not (stays and (self.start or 0) + self._size < num_steps)

    @property
    def _size(self) -> int:
        return DEFAULT_SIZE[self.kind] if self.size is None else self.size


def select_steps(
    config: StepSelection, noisy: Sequence[int], *, num_steps: int, epoch: int, seed: int
) -> tuple[int, ...]:
    """The stochastic steps of an epoch, in order; a pure function of its arguments.

    Args:
        config: How to choose.
        noisy: Steps that have noise under the sampler, in order.
        num_steps: T.
        epoch: Finished epochs, 0 for the first.
        seed: Of the run, at least 0; only the random kinds depend on it.

    Raises:
        FieldError: There are fewer candidates than steps to choose.
    """
    steps = config.candidates(noisy, num_steps)
    size = config.count(steps)
    last_place = len(steps) - size
    random = stream(one_seed(seed, epoch, purpose=Purpose.STEPS))
    match config.kind:
        case "all":
            return steps
        case "random":
            return tuple(steps[i] for i in sorted(random.permutation(len(steps))[:size].tolist()))
        case "random_window":
            first = int(random.integers(last_place + 1))
        case "window":
            every = SHIFT_EVERY_EPOCHS if config.shift_every_epochs is None else config.shift_every_epochs
            moves, start, stride = epoch // every if every else 0, config.start or 0, config.stride or 1
            if config.restart:
                moves %= 1 + math.ceil((last_place - start) / stride)  # the last place may be nearer than a stride
            first = min(start + moves * stride, last_place)
    return steps[first : first + size]
