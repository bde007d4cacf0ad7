"""`ddpo runs`, `doctor`, `report`, `sample`, `evaluate`, `export` and `dashboard`: looking at runs."""

import argparse
import json
from pathlib import Path

from trainers.cli.arguments import (
    add_accept,
    as_given,
    epochs_of_a_rise,
    existing,
    model,
    positive,
    run_folder,
    run_or_config,
)
from trainers.cli.parser import Parser, command
from trainers.parallel.launcher import is_main_process


def add_run_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the subcommands."""
    _add_runs(commands)
    _add_doctor(commands)
    _add_report(commands)
    _add_sample(commands)
    _add_evaluate(commands)
    _add_export(commands)
    _add_dashboard(commands)


def _add_runs(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(commands, "runs", _runs, "the runs of a folder: state, epochs, reward, KL, minutes, size")
    parser.add_argument("folder", type=existing, nargs="?", default=Path("runs"), metavar="FOLDER",
                        help="folder of runs, or one run (default %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


_DOCTOR_EPILOG = """\
  ddpo doctor runs/NAME                          reads a finished or running run
  ddpo doctor sd15_aesthetic --model.path ...    before a run: samples, scores and trains a little of it

Before a run: spread of the scores, their noise floor, what sampling noise costs, signal in the gradient, nats that an
epoch moves, the clip in nats, time and memory. --key value as in train. --overfit 20: the reward must rise on a single
prompt. Exit status 1 when something of a configuration is wrong.
"""


def _add_doctor(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "what happened in a run, or what to expect of a configuration: why, and what to change"
    parser = command(commands, "doctor", _doctor, about, epilog=_DOCTOR_EPILOG)
    parser.add_argument("subject", type=run_or_config, metavar="RUN|CONFIG", help="run folder, or a configuration")
    parser.add_argument("--images", type=positive, metavar="N", help="of CONFIG: images of an epoch (default 32)")
    parser.add_argument(
        "--overfit", type=epochs_of_a_rise, metavar="EPOCHS", help="of CONFIG: also train on one prompt"
    )


_REPORT_EPILOG = """\
One HTML file that needs no network: configuration, findings, evaluations, curves, pictures, steps, time.

  ddpo report runs/a                     writes runs/a/report.html, as the end of a run does
  ddpo report runs/a runs/b runs/c       writes report.html here: the runs beside each other, what differs first
"""


def _add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "one HTML page of a run, or of several beside each other"
    parser = command(commands, "report", _report, about, epilog=_REPORT_EPILOG)
    parser.add_argument("runs", type=run_folder, nargs="+", metavar="RUN", help="run folders, finished or running")
    parser.add_argument("--output", type=Path, help="HTML file (default: RUN/report.html, of several report.html)")


_SAMPLE_EPILOG = """\
The sampler is the evaluation's (evaluation.sampler: steps, size, guidance, noise), so that a prompt of the evaluation
set has the same pictures, bit for bit, as in the evaluation of those weights; --sampler rollout takes training's.
Where files of the run lie elsewhere now, name them as in training: --model.path FOLDER, --rewards.0.name FILE.py:NAME.

--steer raises rewards while sampling, without training, of a run's tuned weights or of a pretrained MODEL: a folder, a
hub id, or shapes. The picture shows unsteered and steered images with their rewards, samples.json also the cost.
  best_of_n         the best of N images         --steer.particles 4
  feynman_kac       resampled particles          --steer.alpha 0.1  --steer.particles 4  --steer.every 5
  svdd              chosen next states           --steer.alpha 0.1  --steer.candidates 4
  reward_gradient   a differentiable reward      --steer.alpha 0.1  --steer.through network|image
  langevin          corrections by reward        --steer.alpha 0.1  --steer.corrections 2
alpha is in reward units per nat: the smaller, the stronger. All but best_of_n and langevin need a sampler with noise.
Rewards are combined as in training. A MODEL's sampler is the one that fits it, but for the keys that are given.

  ddpo sample shapes --prompt "a red circle" --steer feynman_kac --reward shapes --steer.alpha 0.05
  ddpo sample shapes --prompt "a red circle" --num-images 16 --steer feynman_kac --reward jpeg_compressibility \
      --steer.alpha 0.02 --constraints.0.reward shapes_strict --constraints.0.at_least 0.9    a bound on their mean
  ddpo sample runs/NAME --prompt "a red circle" --steer svdd              the run's own rewards
  ddpo sample MODEL --prompt "a cat" --steer best_of_n --reward pickscore --reward jpeg_estimate --rewards.1.weight 0.1
      --sampler.num_steps 20 --batch.sample_batch_size 8 --model.precision bf16 --output pictures
"""


_ACCEPT_HELP = "take another pretrained model than the run was trained with"


def _add_sample(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "pictures of the pretrained and the tuned pipeline, or of a steered one, side by side"
    parser = command(commands, "sample", _sample, about, epilog=_SAMPLE_EPILOG, check=_check_sample)
    parser.add_argument("source", metavar="RUN", help="run folder; with --steer also a model")
    parser.add_argument(
        "--prompt", dest="prompts", action="append", required=True, metavar="TEXT", help="repeat for several"
    )
    parser.add_argument(
        "--image",
        dest="images",
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
    parser.add_argument("--output", type=Path, help="folder to make (default: a new one in RUN/samples)")
    add_accept(parser, "model", about=_ACCEPT_HELP)
    parser.add_argument("--checkpoint", help="checkpoint (default: the newest, or the best if that is exported)")
    kinds = ("best_of_n", "feynman_kac", "svdd", "reward_gradient", "langevin")
    parser.add_argument("--steer", choices=kinds, metavar="KIND", help=f"steer by one of {', '.join(kinds)}")
    parser.add_argument(
        "--reward",
        dest="rewards",
        action="append",
        default=[],
        metavar="NAME",
        help="with --steer: towards what, repeat for several (default: the run's rewards)",
    )


def _check_sample(options: argparse.Namespace) -> None:
    """A run folder, or, to be steered, a model and a reward."""
    refuse, path = options.parser.error, Path(options.source)
    if options.steer is None and options.rewards:
        refuse("--reward names what to steer by: it goes with --steer KIND")
    is_model = options.steer is not None and not (path / "config.yaml").is_file()
    is_model = is_model and (path.is_dir() or not path.parent.is_dir() or options.source == "shapes")
    try:
        options.run = model(options.source) if is_model else run_folder(options.source)
    except argparse.ArgumentTypeError as error:
        refuse(str(error))
    if is_model and not options.rewards:
        refuse(f"{options.source} has no rewards of its own: name what to steer by, --reward NAME (ddpo rewards list)")
    if is_model and options.checkpoint is not None:
        refuse(f"--checkpoint is of a run, and {options.source} is a model")


def _add_evaluate(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(commands, "evaluate", _evaluate, "rewards, KL and diversity on fixed prompts and seeds")
    parser.add_argument("run", type=run_folder, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", help="checkpoint (default: the newest, or the best if that is exported)")
    parser.add_argument("--output", type=Path, help="folder to write (default: in the run folder)")
    add_accept(parser, "model", about=_ACCEPT_HELP)


_EXPORT_EPILOG = """\
  diffusers   pipe.load_lora_weights(FOLDER), or the networks that were trained whole
  peft        peft.PeftModel.from_pretrained(network, FOLDER)
  kohya       one file, the names of kohya's scripts: A1111, Forge, ComfyUI (Stable Diffusion, SDXL, SD3, FLUX.1)
  comfyui     one file for ComfyUI's folder loras
  merged      a pipeline of its own: DiffusionPipeline.from_pretrained(FOLDER), also for model.path of a further run

The LoRA's scale is in its weights, so alpha is the rank in every file. All weights: diffusers or merged.
--push OWNER/NAME uploads what was written, with the model card, its table and its picture.
"""


def _add_export(commands: "argparse._SubParsersAction[Parser]") -> None:
    about = "write a run's weights in the format of another tool"
    parser = command(commands, "export", _export, about, epilog=_EXPORT_EPILOG)
    parser.add_argument("run", type=run_folder, metavar="RUN", help="run folder")
    formats = ("diffusers", "peft", "kohya", "comfyui", "merged")
    parser.add_argument("--format", choices=formats, required=True, help=f"one of {', '.join(formats)}")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the file (default fp32)")
    parser.add_argument("--epoch", type=positive, metavar="N", help="checkpoint (default: what the run exported)")
    parser.add_argument("--output", type=Path, help="file or folder to make (default: in RUN/exports)")
    parser.add_argument("--push", metavar="OWNER/NAME", help="also upload it to the Hugging Face hub, with its card")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    add_accept(parser, "model", about=_ACCEPT_HELP)


def _add_dashboard(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = command(commands, "dashboard", _dashboard, "open the local page with all runs")
    parser.add_argument(
        "run", type=run_folder, nargs="?", metavar="RUN", help="run folder (default: all projects of ./runs)"
    )
    parser.add_argument("--port", type=int, help="port of the page (default: a free one)")
    parser.add_argument("--no-browser", dest="open_browser", action="store_false", help="print the address only")


def _runs(options: argparse.Namespace, _: list[str]) -> None:
    from dataclasses import asdict

    from trainers.run_folder.listing import as_table, list_runs

    runs = list_runs(options.folder)
    if options.json:
        print(json.dumps([asdict(run) for run in runs], indent=1))
    else:
        print(as_table(runs) if runs else f"there are no runs in {options.folder}")


def _doctor(options: argparse.Namespace, overrides: list[str]) -> int:
    from ddpo.validation import UserError
    from trainers.diagnosis.doctor import describe, examine

    if isinstance(options.subject, Path):
        if overrides or options.images or options.overfit:
            raise UserError("a run is read as it is: --images, --overfit and --key value are for a configuration")
        print(describe(examine(options.subject)))
        return 0
    from trainers.checkup.checkup import examine_config, overfit
    from trainers.config.io import load_config

    config = load_config(options.subject, overrides)
    found = examine_config(config, num_images=options.images or 32)
    print(describe(found), flush=True)
    if options.overfit is not None:
        found.append(overfit(config, epochs=options.overfit))
        print(describe(found[-1:]))
    return int(any(finding.verdict == "wrong" for finding in found))


def _report(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.report.page import REPORT, write_report
    from trainers.run_folder.writable import check_file, check_folder

    alone = options.runs[0] if len(options.runs) == 1 else Path()
    output = options.output or alone / REPORT
    check_folder("--output", output.parent)
    if output.parent.is_dir():
        check_file("--output", output)
    print(write_report(options.runs, output))


def _sample(options: argparse.Namespace, overrides: list[str]) -> None:
    _check_output(options, default=Path("samples") if isinstance(options.run, str) else options.run / "samples")
    from trainers.analysis.samples import SampleRequest, sample_run

    request = as_given(SampleRequest, options)
    if options.steer is None:
        print(sample_run(options.run, request, overrides=overrides))
        return
    from trainers.analysis.steered_pictures import SteerRequest, steer_model, steer_run

    steered = SteerRequest(kind=options.steer, rewards=options.rewards, pictures=request)
    if isinstance(options.run, str):
        print(steer_model(options.run, steered, overrides=overrides))
    else:
        print(steer_run(options.run, steered, overrides=overrides))


def _evaluate(options: argparse.Namespace, overrides: list[str]) -> None:
    _check_output(options, default=options.run)
    from trainers.analysis.comparison import evaluate_run

    folder = evaluate_run(
        options.run, checkpoint=options.checkpoint, output=options.output, accept=options.accept, overrides=overrides
    )
    if is_main_process():
        print(folder)


def _export(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.analysis.conversion import Conversion, convert, source_of
    from trainers.analysis.publishing import check_push, push
    from trainers.run_folder.folder import RunFolder

    if options.push is not None:
        check_push(options.push)
    written = convert(options.run, as_given(Conversion, options), overrides=overrides)
    print(written, flush=True)
    if options.push is not None:
        card = source_of(RunFolder.open(options.run), options.epoch)
        print(push(written, card, options.push, private=options.private))


def _check_output(options: argparse.Namespace, *, default: Path) -> None:
    """Refuses a folder that cannot be written before pictures are made.

    Args:
        options: The command's.
        default: Where pictures go without `--output`.
    """
    from trainers.run_folder.writable import check_folder

    check_folder("--output", options.output or default)


def _dashboard(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.tracking.tracker import show_dashboard

    show_dashboard(options.run, port=options.port, open_browser=options.open_browser)
