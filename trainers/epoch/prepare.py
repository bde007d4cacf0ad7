"""What an objective makes of an epoch's experience before the first update (`ddpo.objectives.base.Preparation`)."""

import math
from collections.abc import Iterator

from ddpo.objectives import Experience, Models
from ddpo.objectives.base import Preparation
from ddpo.seeds import Purpose, one_seed
from trainers.config.groups import DistributedConfig
from trainers.epoch.score_gradient import ScoreGradient
from trainers.parallel.processes import Processes
from trainers.parallel.sharding import gathered
from trainers.parallel.shares import in_step
from trainers.planning.plan import BatchPlan
from trainers.tracking.progress import Progress


def prepared(
    preparation: Preparation,
    models: Models,
    experience: Experience,
    *,
    plan: BatchPlan,
    distributed: DistributedConfig,
    score: ScoreGradient | None,
    seed: int,
    epoch: int,
    processes: Processes,
    progress: Progress,
) -> Experience:
    """The experience with what its objective makes of it.

    Args:
        preparation: The run's.
        models: On the chain of the samples.
        experience: Of this process.
        plan: Sizes of the epoch; as many samples are taken at a time as units are in training.
        distributed: How the network is shared.
        score: The rewards, told where a backward pass ends; None where it has none.
        seed: Of the run.
        epoch: Finished epochs.
        processes: Who shares the epoch.
        progress: Shows the batches.

    Raises:
        Interrupted: A signal has reached some process.
    """
    own = one_seed(seed, epoch, plan.passes, purpose=Purpose.PASS)  # after those of the passes
    with gathered(models.policy, distributed):
        sizes = _sizes(plan, distributed, processes, progress)
        made = preparation(models, experience, sizes, seed=own, gather=processes.gather)
    if score is not None:
        score.tell("left out")
    return made


def _sizes(plan: BatchPlan, distributed: DistributedConfig, processes: Processes, progress: Progress) -> Iterator[int]:
    """Samples of each batch, as many batches in every process; a run can stop between them."""
    most = math.ceil(plan.images_per_epoch / plan.num_processes)
    sharded = plan.num_processes > 1 and distributed.strategy != "ddp"
    sizes = in_step(plan.samples_per_process, plan.train_batch_size, most=most, sharded=sharded)
    for size in progress.track(sizes, "preparing"):
        processes.safe_point("training")
        yield size
