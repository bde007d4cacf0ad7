"""The gate: before the first update of an epoch, training must reproduce what sampling computed."""

import math

from torch import Tensor

from ddpo.validation import UserError
from trainers.parallel.processes import Processes
from trainers.tracking.metrics import StepMean, StepMeans


class GateError(UserError):
    """Training does not reproduce the log-probabilities of sampling."""


class Gate:
    """Refuses to train when the recomputed log-probabilities of the first update are not those of sampling.

    Attributes:
        drift: mean |log-prob recomputed - sampled| of each step before the first update, (T,) nats, NaN at steps that
            this update did not train; None before it, and where nothing is recomputed.
    """

    def __init__(self, *, tolerance: float, dims: int) -> None:
        """Opens with the first update.

        Args:
            tolerance: Nats per latent dimension.
            dims: Latent dimensions.
        """
        self.drift: Tensor | None = None
        self._tolerance, self._dims = tolerance, dims

    def check(self, measured: StepMeans, processes: Processes) -> None:
        """Looks at the first update's drift; later ones follow changed weights.

        Raises:
            GateError: A step is above the tolerance, or NaN.
        """
        if self.drift is None:
            for mean in measured.reduce(processes).values():
                check_drift(mean, tolerance=self._tolerance, dims=self._dims)
                self.drift = mean.mean


def check_drift(drift: StepMean, *, tolerance: float, dims: int) -> None:
    """Refuses a drift above the tolerance at a step that was seen; a NaN there is a difference without bound.

    Args:
        drift: mean |difference| of each step, nats.
        tolerance: Nats per latent dimension.
        dims: Latent dimensions.

    Raises:
        GateError: A step is above it, or NaN.
    """
    worst = int(drift.mean.nan_to_num(math.inf).where(drift.seen, -1.0).argmax())
    if not float(drift.mean[worst]) <= tolerance * dims:
        raise GateError(
            "before the first update, the log-probabilities recomputed in training differ from those of sampling by "
            f"{float(drift.mean[worst]):.3g} nats on average at step {worst} (tolerance {tolerance:g} nats per "
            f"dimension x {dims} dimensions = {tolerance * dims:.3g}): importance ratios would be wrong. Causes: "
            "dropout or other randomness in the network, different precision or weights in the two phases, or "
            "batch-dependent kernels (try equal sample_batch_size and train_batch_size, or model.precision: fp32). If "
            "this size is expected, raise gate_tolerance."
        )
