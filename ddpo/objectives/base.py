"""The seam for algorithms: an objective says what it demands, cuts its own batches and yields losses.

    demand                                      read before weights load: by the plan, the checks, the memory estimate
    gather(experience, rows, slots) -> batch    pure indexing: slot u of sample b is one *unit* of work
    losses(models, batch) -> losses             the trainer scales them by their share, adds up, and steps

A unit is whatever an objective trains on at a time: a denoising step, a noised clean image, a whole chain. A sample
offers `demand.units` of them; the trainer permutes them, deals them out to the updates and cuts each update into
micro-batches of any samples and units mixed, so that memory is bounded by the micro-batch alone.

Legend: `N` units of a micro-batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import Tensor

from ddpo.objectives.experience import Experience
from ddpo.sampling.gaussian import Gaussian
from ddpo.trajectory import Keep

if TYPE_CHECKING:  # the configurations of objectives are read without loading diffusers
    from ddpo.policy import Policy

Weights = Mapping[str, Tensor]
Score = Callable[[Tensor, Sequence[str], Sequence[Mapping[str, object]]], Tensor]
Gather = Callable[[Tensor], Tensor]
Batch = TypeVar("Batch")
Surveyed = TypeVar("Surveyed", contravariant=True)
Stepped = TypeVar("Stepped", contravariant=True)


class Preparation(Protocol):
    """What an objective makes of an epoch's experience before its first update, and what it remembers of it."""

    def __call__(
        self, models: "Models", experience: Experience, sizes: Iterable[int], *, seed: int, gather: Gather
    ) -> Experience:
        """The experience with what was made of it in `prepared`.

        Args:
            models: As for losses.
            experience: Of this process.
            sizes: Samples of each batch in which to go through them, in order; together all. Every process is given as
                many, of which some may be 0.
            seed: Of the epoch.
            gather: The rows (N, ...) of all processes, of this one's.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What is remembered between epochs, by name: a run that goes on from a checkpoint is given it again."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers what `tensors` gave, in place of what it did."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """What an objective makes before the first update of an epoch.

    Attributes:
        name: What people call what is made, in the plural.
        rows: Passes of the pretrained network, forward and back, a sample, given the number of its steps.
        kept_states: Tensors of the size of a latent that are kept a sample, given the number of its stochastic steps.
        decodes: Images of a sample that are decoded and scored with a graph.
        make: Makes one that remembers nothing yet.
    """

    name: str
    rows: Callable[[int], int]
    kept_states: Callable[[int], int]
    make: Callable[[], Preparation]
    decodes: int = 0


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What an objective needs of a run.

    Attributes:
        name: What people call the algorithm.
        unit: What a unit is, for people; its plural ends in s.
        units: Units that a sample offers, given the number of its stochastic steps.
        fraction: Share of them that a pass trains, in (0, 1], drawn anew for every pass; at least one.
        updates: Optimizer steps of a pass; each takes its own share of every sample's units.
        passes: Passes over an epoch's samples.
        guidance: Whether a unit runs both branches of guidance; else the conditional one alone.
        likelihood: Whether it needs the log-probabilities of sampling, which must then have noise; steps can then be
            worth different amounts, and the KL to the pretrained model can have a weight.
        weighs_kl: Whether that KL can have a weight without likelihoods, in losses that compute it themselves.
        needs_kl: Whether it must have one, which takes noise.
        kept_targets: Whether it trains again on what earlier epochs made with the weight of the KL, which must then
            stay as it is.
        reward_gradient: Whether its losses differentiate the rewards: those without derivatives are then measured
            alone, and all run in the training processes.
        keep: Which states of the chains it needs.
        means: Whether it needs the means that the steps with noise were sampled from.
        reference_means: Whether its KL can take the pretrained model's means of the steps with noise from sampling,
            where these are kept, in place of passes of its own.
        chain: Whether a unit is a chain of steps, so that a unit's memory and rows are those of several of them.
        chain_unit: Whether the last of a sample's units is a chain, from its first step without noise to the scored
            image, in which all of its steps are differentiated.
        graph_steps: Of a chain of T steps, the largest number that are differentiated.
        decodes: Images of a unit that are decoded and scored with a graph.
        recomputed: Whether a chain's steps are computed again one by one in the backward pass, so that the activations
            of one alone are alive at a time.
        spares: Whether samples may have no gradient at all, as the objective can tell before an epoch's first update
            (`Sparing`): they are then not trained on.
        varies: Whether how often a unit calls the network is drawn: not with a network that is split over processes.
        old_policy: Decay of the average of weights that counts as the old policy, after n epochs in which it was
            updated; None where there is none.
        samples_from_old: Whether epochs are sampled from the old policy, where there is one; else from the policy.
        frozen_passes: Passes of the network without a graph that a unit takes besides, by the pretrained weights and
            the old policy's; those of a KL with a weight are not among them.
        least_steps: The fewest sampling steps that it works with.
        last_steps: How many of a chain's last steps it is told to differentiate.
        margin: Pairs whose scores differ by less are skipped, reward units.
        rows: Latents of a unit that go through the network.
        group_rows: Whether it is so many of every sample of a group.
        whole_groups: Whether a unit compares the samples of a prompt, which must then be together in one process, and
            at least two.
        decisions: Whether units are steps of sampling that must have noise, though they have no KL with a weight.
        same_start: Whether the samples of a group start from the same initial noise.
        contended: Steps with noise, the last ones, at which several next states are drawn and scored by the clean
            latents predicted from them, given their number.
        contenders: How many next states, the chain's own among them; 0 for none.
        survey: Whether losses need a mean over the whole update first (`Surveying`).
        recorded: Whether its units are recorded steps with noise, whose Gaussians it gives (`Recorded`).
        joint_ratio: Whether updates after an epoch's first one weigh units by ratios of whole densities, into which the
            rounding of every latent dimension enters.
        prepare: What it makes of an epoch before the first update; None for nothing.
    """

    name: str
    unit: str
    units: Callable[[int], int]
    fraction: float = 1.0
    updates: int = 1
    passes: int = 1
    guidance: bool = True
    likelihood: bool = False
    weighs_kl: bool = False
    needs_kl: bool = False
    kept_targets: bool = False
    reward_gradient: bool = False
    keep: Keep = Keep.FINAL
    means: bool = False
    reference_means: bool = False
    chain: bool = False
    chain_unit: bool = False
    graph_steps: Callable[[int], int] = lambda num_steps: num_steps
    decodes: int = 0
    recomputed: bool = False
    spares: bool = False
    varies: bool = False
    old_policy: Callable[[int], float] | None = None
    prepare: Prepare | None = None
    samples_from_old: bool = True
    frozen_passes: int = 0
    least_steps: int = 1
    last_steps: int = 1
    margin: float = 0.0
    rows: int = 1
    group_rows: bool = False
    whole_groups: bool = False
    decisions: bool = False
    same_start: bool = False
    contended: Callable[[int], int] = lambda num_stochastic: 0
    contenders: int = 0
    survey: bool = False
    recorded: bool = False
    joint_ratio: bool = False

    @property
    def needs_noise(self) -> bool:
        """Whether sampling must have noise."""
        return self.likelihood or self.decisions

    def trained_units(self, num_stochastic: int) -> int:
        """Units of a sample that a pass trains, given the number of its stochastic steps."""
        return max(1, round(self.fraction * self.units(num_stochastic)))


@dataclass(frozen=True, kw_only=True)
class Models:
    """What losses are computed with.

    Attributes:
        policy: The view of the policy that is trained, on the chain of the samples.
        old: Weights of the old policy by name; None where the objective demands none.
        score: The total of the rewards that have derivatives, in reward units, with its graph, (N,), of images
            (N, 3, H, W) in [0, 1], their N prompts and metadata; None where the objective demands no gradient of it.
        surveyed: What the objective's survey has measured at the present weights, a mean over all units of the update,
            a scalar; None where it demands none.
    """

    policy: "Policy"
    old: Weights | None = None
    score: Score | None = None
    surveyed: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss of a micro-batch and what was measured on the way.

    Attributes:
        value: Scalar with a graph; the losses of a micro-batch add up to a mean over its units.
        metrics: Detached values by name, each (N,), or of those units that the loss is of; reports print their means.
        steps: The denoising step of each row of `metrics` and `drift`, (N,) int64; None where they belong to none.
        drift: How far what training recomputes is from what sampling did, (N,), at least 0, nats; of states that have
            no likelihood half their squared distance, the KL of unit Gaussians about them. The run stops where it is
            not negligible before the first update of an epoch. None where nothing is recomputed.
    """

    value: Tensor
    metrics: Mapping[str, Tensor]
    steps: Tensor | None = None
    drift: Tensor | None = None


def trained_view(policy: "Policy", demand: Demand) -> "Policy":
    """The view of a policy whose distributions are trained: with guidance, or the conditional branch alone."""
    return policy if demand.guidance else policy.conditional


class Objective(Protocol[Batch]):
    """An algorithm; `Batch` is a frozen dataclass beside it."""

    @property
    def demand(self) -> Demand:
        """What it needs of a run."""

    def gather(self, experience: Experience, rows: Tensor, slots: Tensor, *, seed: int) -> Batch:
        """The units (rows[n], slots[n]) of an epoch.

        Args:
            experience: Of this process.
            rows: Samples, (N,) int64 on the CPU.
            slots: Units, (N,) int64 on the CPU, in [0, demand.units).
            seed: Of this pass. What is drawn for a unit may depend on it, on the sample's own seed and on the slot, but
                not on the rest of the micro-batch.
        """

    def losses(self, models: Models, batch: Batch) -> Iterator[Loss]:
        """The losses of a micro-batch, each of all its units or of some; graphs may be freed after each."""


class Surveying(Protocol[Surveyed]):
    """An objective whose losses need to know something of the whole update: it goes through it once without a graph."""

    def survey(self, models: Models, batch: Surveyed) -> Tensor:
        """What is measured of each unit of a micro-batch, (N,)."""


class Recorded(Protocol[Stepped]):
    """An objective whose units are recorded steps with noise: what a trust region asks of them."""

    def distribution(self, models: Models, batch: Stepped) -> Gaussian:
        """The steps as the policy would take them now, N rows, with a graph."""

    def improvement(self, models: Models, batch: Stepped, distribution: Gaussian) -> Tensor:
        """What each step would now be worth, (N,): its derivative is that of the losses, up to a positive factor.

        Args:
            models: As for losses.
            batch: The steps.
            distribution: As the policy would take them now.
        """


class Sparing(Protocol):
    """An objective that knows samples on which no work needs to be done."""

    def idle(self, experience: Experience) -> Tensor:
        """Of which samples no unit has a gradient in any update, (B,) bool on their device."""


class ObjectiveConfig(Protocol):
    """The keys of an algorithm in a configuration."""

    def build(self) -> "Objective[Any]":
        """The objective with these keys; cheap, since plans ask it for its demand."""
