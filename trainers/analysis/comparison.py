"""Looks back at a run: pretrained and fine-tuned model on its evaluation set (`ddpo evaluate`)."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from trainers.analysis.tuned_model import load_tuned
from trainers.config import Config
from trainers.config.io import ConfigFile
from trainers.config.resumed import load_moved
from trainers.epoch.report import write_comparison
from trainers.evaluation.evaluator import Evaluator
from trainers.parallel.processes import Processes
from trainers.run_folder.folder import RunFolder
from trainers.run_folder.prompt_record import check_evaluated
from trainers.run_folder.python_runs import PIPELINE, evaluation_source, made_again, refuse_objects
from trainers.scoring.loading import load_heldout
from trainers.tracking.progress import Progress, say


def evaluate_run(
    run: Path,
    *,
    checkpoint: str | None = None,
    output: Path | None = None,
    accept: Collection[str] = (),
    overrides: Sequence[str] = (),
) -> Path:
    """Evaluates the pretrained and the fine-tuned model on the run's evaluation set and writes table and picture.

    Args:
        run: The run folder.
        checkpoint: Name of a checkpoint folder; None takes the newest, or the best weights where those were exported.
        output: Folder to write to; None for `<run>/evaluation_<epoch of the weights>`.
        accept: Holds `model` where another pretrained model than the run's is wanted.
        overrides: `--key value` tokens that say where files of the run lie now.

    Returns:
        The folder written: `summary.txt`, `summary.json` and `before_after.png`.

    Raises:
        UserError: The evaluation prompts have changed, or the run was started from Python with a pipeline of its own.
    """
    folder = open_run(run)
    config = load_moved(ConfigFile.read(folder.config_file), overrides)
    processes = Processes(device=config.model.device)
    evaluator = make_evaluator(folder, config, processes)
    tuned = load_tuned(folder, config, processes, checkpoint=checkpoint, accept=accept)
    heldout = load_heldout(
        replace(config, heldout_rewards=made_again(folder.path, config.heldout_rewards)), str(processes.device)
    )
    policy = tuned.policy.with_sampler(config.evaluation_sampler, seed=config.seed)
    with policy.reference():
        before = evaluator(policy, tuned.reward, heldout, epoch=tuned.epoch)
    after = evaluator(policy, tuned.reward, heldout, epoch=tuned.epoch)
    if tuned.is_complete:
        scales = before.scales(tuned.reward)
        before, after = (one.rescored(scales, epoch=tuned.epoch) for one in (before, after))
    else:
        before, after = before.without_total(), after.without_total()
    output = output or folder.path / f"evaluation_{tuned.shown}"
    if processes.is_main:
        shown = config.tracking.num_pictures
        table = write_comparison(output, before, after, num_pictures=shown, metadata=evaluator.metadata)
        say(table)
    return output


def make_evaluator(folder: RunFolder, config: Config, processes: Processes, *, seed: int | None = None) -> Evaluator:
    """The evaluation set of a run, with another noise seed if one is given; refuses prompts that have changed."""
    evaluator = Evaluator(
        config.evaluation if seed is None else replace(config.evaluation, seed=seed),
        evaluation_source(folder.path, config),
        batch_size=config.batch.sample_batch_size,
        processes=processes,
        progress=Progress(enabled=processes.is_main),
    )
    check_evaluated(folder.path, evaluator.sources)
    return evaluator


def open_run(run: Path) -> RunFolder:
    """The run folder of a command that looks back at it.

    Raises:
        RunError: There is no such run, or it was started from Python with a pipeline of its own.
    """
    folder = RunFolder.open(run)
    refuse_objects(folder.path, only=(PIPELINE,))
    return folder
