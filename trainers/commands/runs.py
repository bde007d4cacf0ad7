"""`ddpo sample`, `evaluate`, `pareto` and `dashboard`: looking at runs."""

import argparse
from pathlib import Path

from trainers.commands.arguments import command, positive
from trainers.launch import is_main_process
from trainers.outputs import check_folder


def add_run_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the subcommands."""
    _add_sample(commands)
    _add_evaluate(commands)
    _add_pareto(commands)
    _add_dashboard(commands)


_SAMPLE_EPILOG = """\
The sampler is the evaluation's (evaluation.sampler: steps, size, guidance, noise), so that a prompt of the evaluation
set has the same pictures, bit for bit, as in the evaluation of those weights; --sampler rollout takes training's.
"""


def _add_sample(commands: argparse._SubParsersAction) -> None:
    about = "pictures of the pretrained and the tuned pipeline, side by side"
    parser = command(commands, "sample", _sample, about, epilog=_SAMPLE_EPILOG)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="repeat for several")
    parser.add_argument(
        "--image",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="input image, for a model that edits: one for all prompts, or one for each",
    )
    parser.add_argument("--seed", type=int, help="noise seed (default: the evaluation's)")
    parser.add_argument(
        "--sampler",
        choices=("evaluation", "rollout"),
        default="evaluation",
        help="sample as evaluations do (default) or as training does",
    )
    parser.add_argument("--num-images", type=positive, default=4, help="images per prompt (default 4)")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/samples)")
    parser.add_argument("--checkpoint", help="checkpoint (default: the newest, or the best if that is exported)")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "evaluate", _evaluate, "rewards, KL and diversity on fixed prompts and seeds")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", help="checkpoint (default: the newest, or the best if that is exported)")
    parser.add_argument("--output", type=Path, help="folder to write (default: in the run folder)")


_PARETO_EPILOG = """\
Reads the evaluations of finished or running runs. More is better in every measure but kl.

  ddpo pareto runs/a runs/b runs/c --x jpeg_compressibility --y heldout/shapes_strict
  ddpo pareto --sweep shapes_ppo --weights jpeg_compressibility=0,1,5,20 --epochs 6     launches the runs first

With --sweep, any --key value of a configuration goes to every run. Runs that are finished already are kept, others go
on where they stopped, also with more --epochs; a run of another configuration is refused. Ctrl-C saves the run at work.
"""


def _add_pareto(commands: argparse._SubParsersAction) -> None:
    about = "the runs that no other one beats in two measures: table, JSON, figure"
    parser = command(commands, "pareto", _pareto, about, epilog=_PARETO_EPILOG)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--x", metavar="MEASURE", help="horizontal axis, e.g. shapes or kl (default: first reward)")
    parser.add_argument("--y", metavar="MEASURE", help="vertical axis (default: second reward, or first held-out one)")
    parser.add_argument("--out", type=Path, default=Path("pareto.png"), help="picture (default %(default)s)")
    parser.add_argument("--sweep", metavar="CONFIG", help="train this configuration once for each of --weights")
    parser.add_argument("--weights", metavar="NAME=0,1,5", help="with --sweep: a reward and its weights")


def _add_dashboard(commands: argparse._SubParsersAction) -> None:
    parser = command(commands, "dashboard", _dashboard, "open the local page with all runs")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder (default: all projects of ./runs)")
    parser.add_argument("--port", type=int, help="port of the page (default: a free one)")
    parser.add_argument("--no-browser", dest="open_browser", action="store_false", help="print the address only")


def _sample(options: argparse.Namespace, _: list[str]) -> None:
    _check_output(options)
    from trainers.finished import sample_run

    picture = sample_run(
        options.run,
        prompts=options.prompt,
        seed=options.seed,
        num_images=options.num_images,
        images=options.image,
        output=options.output,
        checkpoint=options.checkpoint,
        sampler=options.sampler,
    )
    print(picture)


def _evaluate(options: argparse.Namespace, _: list[str]) -> None:
    _check_output(options)
    from trainers.finished import evaluate_run

    folder = evaluate_run(options.run, checkpoint=options.checkpoint, output=options.output)
    if is_main_process():
        print(folder)


def _check_output(options: argparse.Namespace) -> None:
    """Finds what cannot be written before pictures are made."""
    if options.output is not None:
        check_folder("--output", options.output)


def _pareto(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.pareto import check_picture, report, sweep

    if (options.sweep is None) != (options.weights is None):
        raise ValueError("--sweep CONFIG and --weights NAME=0,1,5 go together")
    check_picture(options.out)
    swept = [] if options.sweep is None else sweep(options.sweep, options.weights, overrides)
    print(report([*options.runs, *swept], x=options.x, y=options.y, out=options.out))


def _dashboard(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.tracking import show_dashboard

    show_dashboard(options.run, port=options.port, open_browser=options.open_browser)
