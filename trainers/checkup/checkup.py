"""`ddpo doctor CONFIG`, and the test that one prompt can be overfitted."""

import tempfile
from dataclasses import replace
from pathlib import Path

from ddpo.validation import UserError
from trainers.checkup.checks import findings
from trainers.checkup.readings import reduced, take
from trainers.config import Config
from trainers.config.groups import EvaluationConfig
from trainers.config.io import to_yaml
from trainers.config.locations import absolute
from trainers.diagnosis.course import read_course, rise
from trainers.diagnosis.finding import Finding
from trainers.loop import train_from_config
from trainers.parallel.processes import Processes
from trainers.planning.preflight import preflight
from trainers.run_folder.folder import RunFolder
from trainers.session import prepare


def examine_config(config: Config, *, num_images: int) -> list[Finding]:
    """Samples, scores and trains a little of a run, and says what to expect of it.

    Args:
        config: The run.
        num_images: To sample in each of two epochs; rounded up to whole groups, at least two.

    Raises:
        UserError: Something that it needs is missing, as for training; or several processes were launched.
    """
    processes = Processes(device=config.model.device)
    if processes.count > 1:
        raise UserError(f"doctor CONFIG looks at one process, and {processes.count} were launched; start it alone")
    with tempfile.TemporaryDirectory() as folder:
        small = absolute(reduced(config, num_images, Path(folder)))
        preflight(small, num_processes=1)
        return findings(config, take(small, prepare(small, processes), processes))


def overfit(config: Config, *, epochs: int) -> Finding:
    """Trains on a single prompt, whose reward must rise.

    Args:
        config: The run.
        epochs: To train, 6 at least, for a rise to be told from noise.

    Raises:
        UserError: Something is missing, as for training.
    """
    with tempfile.TemporaryDirectory() as folder:
        small = reduced(config, config.batch.samples_per_epoch, Path(folder))
        small = absolute(
            replace(
                small,
                epochs=epochs,
                prompts=replace(config.prompts, limit=1),
                evaluation=EvaluationConfig(every_epochs=0, num_prompts=1, images_per_prompt=1, ode=False),
                gate_tolerance=config.gate_tolerance,
            )
        )
        plan = preflight(small, num_processes=1)
        run = train_from_config(small, config_yaml=to_yaml(small, full=True), plan=plan)
        course = read_course(RunFolder.open(run))
    change, errors = rise(course.reward)
    told = f"{epochs} epochs on one prompt changed the reward by {change:+.3g} ({errors:+.1f} standard errors)"
    if course.kl:
        told += f" at {course.kl[-1]:.3g} nats"
    if errors > 2:
        return Finding(name="overfit", verdict="fine", evidence=told, series=course.reward)
    cure = "optimizer.learning_rate (see step size); more epochs of --overfit; then the reward"
    return Finding(name="overfit", verdict="wrong", evidence=told, cure=cure, series=course.reward)
