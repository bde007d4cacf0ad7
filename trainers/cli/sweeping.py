"""`ddpo sweep` and `ddpo pareto`: many runs of one configuration, and which of them no other beats."""

import argparse
from pathlib import Path

from trainers.cli.arguments import as_given, count, positive, run_folder
from trainers.cli.parser import Parser, command

_SWEEP_EPILOG = """\
Trains every combination of the grid's values with every seed, a folder a run below one of the sweep, prints the means
of the last evaluations with their standard errors over seeds, and writes a report of all runs. --key value as in train.

  ddpo sweep shapes_ppo --grid optimizer.learning_rate=1e-3,2e-3 --grid kl.alpha=0,0.1 --seeds 3 --jobs 2
  ddpo sweep shapes_ppo --grid objective.kind=policy_gradient,clean_sample --name kinds --epochs 20
  ddpo sweep sd15_jpeg --grid kl.alpha=0,0.1 --seeds 3 --slurm sweep.sbatch            then: sbatch sweep.sbatch

Ctrl-C stops the runs at work with their last whole epochs saved. The same command goes on: finished runs are kept,
killed ones go on from their checkpoints, more seeds or values are added. A run that fails does not stop the others; it
is listed, and the exit status is 1. --jobs 0 trains nothing and shows what there is. Of several GPUs, each job has one.
"""

SWEEP_OPTIONS = ("--grid", "--seeds", "--jobs", "--name", "--slurm", "--task", "--dry-run", "--help")
PARETO_OPTIONS = ("--sweep", "--weights", "--jobs", "--x", "--y", "--out", "--help")
"""The commands' own options; others are keys of the configuration."""


def add_sweep_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the subcommands."""
    about = "train every combination of some values, with several seeds: table and report"
    parser = command(commands, "sweep", _sweep, about, epilog=_SWEEP_EPILOG)
    parser.add_argument("config", metavar="CONFIG", help="YAML file or shipped name")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=A,B", help="a key and its values; repeat")
    parser.add_argument("--seeds", type=positive, default=1, metavar="N", help="runs of each combination (default 1)")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--name", type=_plain_name, help="folder in run.output_dir (default: CONFIG-sweep)")
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="write an sbatch array instead of training here")
    parser.add_argument("--task", type=count, metavar="N", help="train only run N of the plan: what the array does")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan only")
    _add_pareto(commands)


def _plain_name(text: str) -> str:
    if not text.strip() or "/" in text or text.startswith("."):
        raise argparse.ArgumentTypeError(f"must be a folder name without '/', got {text!r}")
    return text


def _sweep(options: argparse.Namespace, overrides: list[str]) -> int:
    from trainers.run_folder.writable import check_file
    from trainers.sweep.command import SweepRequest, run_sweep

    if options.slurm is not None:
        check_file("--slurm", options.slurm)
    options.grid = tuple(options.grid)
    return run_sweep(as_given(SweepRequest, options), overrides)


_PARETO_EPILOG = """\
Reads the evaluations of finished or running runs. More is better in every measure but kl.

  ddpo pareto runs/a runs/b runs/c --x jpeg_compressibility --y heldout/shapes_strict
  ddpo pareto --sweep shapes_ppo --weights jpeg_compressibility=0,1,5,20 --epochs 6     launches the runs first

With --sweep, any --key value of a configuration goes to every run. Runs that are finished already are kept, others go
on where they stopped, also with more --epochs; a run of another configuration is refused. Ctrl-C saves those at work.
"""


def _add_pareto(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "the runs that no other one beats in two measures: table, JSON, figure"
    parser = command(commands, "pareto", _pareto, about, epilog=_PARETO_EPILOG)
    parser.add_argument("runs", type=run_folder, nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--x", metavar="MEASURE", help="horizontal axis, e.g. shapes or kl (default: first reward)")
    parser.add_argument("--y", metavar="MEASURE", help="vertical axis (default: second reward, or first held-out one)")
    parser.add_argument("--out", type=Path, default=Path("pareto.png"), help="picture (default %(default)s)")
    parser.add_argument("--sweep", metavar="CONFIG", help="train this configuration once for each of --weights")
    parser.add_argument("--weights", metavar="NAME=0,1,5", help="with --sweep: a reward and its weights")
    parser.add_argument(
        "--jobs", type=positive, default=1, metavar="N", help="with --sweep: runs at a time (default 1)"
    )


def _pareto(options: argparse.Namespace, overrides: list[str]) -> int:
    from ddpo.validation import UserError
    from trainers.analysis.pareto import check_picture, report
    from trainers.sweep.command import ended, plan, train_missing
    from trainers.sweep.weights import plan_weights

    if (options.sweep is None) != (options.weights is None):
        raise UserError("--sweep CONFIG and --weights NAME=0,1,5 go together")
    check_picture(options.out)
    runs, failures = list(options.runs), []
    if options.sweep is not None:
        swept = plan_weights(options.sweep, options.weights, overrides)
        failures = train_missing(swept, plan(swept), jobs=options.jobs)
        runs += [member.run for member in ended(swept)]
    if runs or not failures:
        print(report(runs, x=options.x, y=options.y, out=options.out))
    return int(bool(failures))
