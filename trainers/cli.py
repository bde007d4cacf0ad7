"""The command `ddpo`: reads arguments, calls one function per subcommand, turns user errors into one line.

Nothing heavy is imported until a subcommand runs, so `ddpo --help` is instant.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from trainers.interruption import EXIT_CODE, RunStopped, ignore_late_warnings
from trainers.launch import is_main_process, num_processes, prepare_threads, rank
from trainers.preferences import add_commands

_OURS = ("ddpo", "rewards", "trainers")
_ROOT = Path(__file__).resolve().parent.parent

_TRAIN_EPILOG = """\
CONFIG is a YAML file or a shipped name (shapes_ppo, sd15_jpeg, ...). It holds differences from the defaults.

Override any key with --group.key VALUE, where VALUE is YAML:
  --optimizer.learning_rate 1e-4   --rewards.0.weight 2   --model.offload true   --run.name null
  --adapter.kind full              (the file's keys of the other kind are dropped)
  --kl.kind adaptive --kl.target 3
  --rewards.1.name my_rewards.py:sharpness   (one past the end appends)

Several processes are started by the launcher, one per device:
  accelerate launch scripts/train.py CONFIG [--key value ...]
  accelerate launch --config_file configs/accelerate/multi_gpu_8.yaml scripts/train.py CONFIG
  torchrun --standalone --nproc_per_node 8 -m trainers train CONFIG
  ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m trainers train CONFIG     (two CPU processes)
  torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT -m trainers train CONFIG
  (`accelerate launch --cpu --num_processes 2` starts one process only.)

Continue a run, exactly where it stopped; epochs, max_minutes, checkpoints.*, tracking.*, distributed.* and
reward_processes.* may change:
  ddpo train --resume runs/NAME [--epochs 200]

SIGTERM, SIGUSR1 and Ctrl-C stop a run cleanly between two batches: the epoch begun is dropped, the whole ones are
saved, and the exit status is 75. A second signal ends it at once.
"""

_PLAN_EPILOG = """\
No weights are loaded: shapes come from a local pipeline folder's configuration files, or are known for SD 1.5, SDXL,
SD 3.5 medium and FLUX.1-dev. Activations are counted by running the networks on tensors without data (half a minute
for FLUX), so resolution, precision, adapter, gradient checkpointing, guidance and KL all count.

  ddpo plan sdxl_aesthetic --model.offload true --batch.train_batch_size 2
  ddpo plan sd15_jpeg --num-processes 8 --json
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        Exit status: 0, 1 when `verify` or `check` finds a failure, 2 for a user error, 75 when training stopped on a
        signal and can be resumed, 130 when anything else was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("DDPO_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    prepare_threads()
    try:
        return _run(arguments)
    except RunStopped as stop:
        ignore_late_warnings()
        if is_main_process():
            print(stop, file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        process = f" (process {rank()})" if num_processes() > 1 else ""
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error{process}: {line}", file=sys.stderr)
        return 2


def is_user_error(error: Exception) -> bool:
    """Whether the message alone helps: a missing file, or a refusal raised by this project's own code."""
    if isinstance(error, FileNotFoundError | PermissionError | NotADirectoryError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename).resolve()
    ours = file.is_relative_to(_ROOT) and file.relative_to(_ROOT).parts[0] in _OURS
    own_class = type(error).__module__.partition(".")[0] in _OURS
    return own_class or (ours and isinstance(error, ValueError | ImportError))


def _run(arguments: list[str]) -> int:
    parser, subparsers = _parser()
    command = arguments[0] if arguments else ""
    overrides: list[str] = []
    if command in ("train", "plan"):
        from trainers.overrides import split_overrides

        wants_help = any(argument in ("-h", "--help") for argument in arguments)
        if wants_help:
            _print_config_help(subparsers[command])
            return 0
        own = ("--resume", "--checkpoint", "--num-processes", "--utilisation", "--json")
        rest, overrides = split_overrides(arguments[1:], own=own)
        arguments = [command, *rest]
    elif command == "pareto" and "--sweep" in arguments:
        from trainers.overrides import split_overrides

        rest, overrides = split_overrides(arguments[1:], own=("--sweep", "--weights", "--x", "--y", "--out", "--help"))
        arguments = [command, *rest]
    options = parser.parse_args(arguments)
    return options.run_command(options, overrides) or 0


def _print_config_help(parser: argparse.ArgumentParser) -> None:
    from trainers.config_reference import reference

    print(f"{parser.format_help()}\nEvery key, as an override; in YAML, the dots are nesting.\n\n{reference()}")


# ------------------------------------------------------------------------------------------------------------- commands


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    if options.resume is not None:
        _resume(options, overrides)
        return
    if options.config is None:
        raise ValueError("train needs a configuration, e.g. ddpo train shapes_ppo (ddpo train --help lists every key)")
    from trainers.config_io import find_config, load_config, to_yaml
    from trainers.preflight import preflight

    config = load_config(options.config, overrides)
    plan = preflight(config, num_processes=num_processes())
    if is_main_process():
        print(plan.describe(), flush=True)
    from trainers.loop import train_from_config

    stem = find_config(options.config).stem
    _print_run(train_from_config(config, config_yaml=to_yaml(config, full=True), stem=stem))


def _resume(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.config_io import load_config, load_resumed, resume_overrides
    from trainers.preflight import preflight

    saved_file = options.resume / "config.yaml"
    if not saved_file.is_file():
        raise FileNotFoundError(f"{options.resume}: is no run folder (no config.yaml in it)")
    if options.config is not None:
        wanted = load_config(options.config, overrides)
        overrides = resume_overrides(load_config(saved_file), wanted, saved_file=saved_file)
    config = load_resumed(saved_file, overrides)
    plan = preflight(config, num_processes=num_processes())
    if is_main_process():
        print(plan.describe(), flush=True)
    from trainers.loop import resume

    _print_run(resume(options.resume, overrides, checkpoint=options.checkpoint))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.config_io import load_config
    from trainers.preflight import preflight

    config = load_config(options.config, overrides)
    plan = preflight(config, num_processes=options.num_processes, with_prompts=False)
    if not options.json:
        print(plan.describe(), flush=True)
    from trainers.estimate.command import describe

    print(describe(config, plan, options.num_processes, utilisation=options.utilisation, as_json=options.json))


def _sample(options: argparse.Namespace, _: list[str]) -> None:
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
    from trainers.finished import evaluate_run

    folder = evaluate_run(options.run, checkpoint=options.checkpoint, output=options.output)
    if is_main_process():
        print(folder)


def _verify(options: argparse.Namespace, _: list[str]) -> int:
    from trainers.verification.command import verify

    return verify(
        full=options.full,
        only=options.only,
        json_file=options.json,
        report=options.report,
        model=options.policy,
        sampler_kind=options.sampler,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        precision=options.precision,
    )


def _check(options: argparse.Namespace, _: list[str]) -> int:
    from trainers.verification.conformance import check, load_subject

    subject = load_subject(
        options.model,
        sampler_kind=options.sampler,
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        precision=options.precision,
        height=options.height,
        width=options.width,
    )
    return check(subject)


def _pareto(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.pareto import report, sweep

    if (options.sweep is None) != (options.weights is None):
        raise ValueError("--sweep CONFIG and --weights NAME=0,1,5 go together")
    swept = [] if options.sweep is None else sweep(options.sweep, options.weights, overrides)
    print(report([*options.runs, *swept], x=options.x, y=options.y, out=options.out))


def _dashboard(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.tracking import show_dashboard

    show_dashboard(options.run, port=options.port, open_browser=options.open_browser)


def _rewards_list(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.cli import catalogue, list_rewards

    print(catalogue() if options.markdown else list_rewards(verbose=options.verbose))


def _rewards_score(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.cli import score

    print(score(options.name, options.images, prompt=options.prompt))


def _rewards_test(options: argparse.Namespace, _: list[str]) -> int:
    from rewards.cli import run_selftests

    text, passed = run_selftests(options.names, options=options.options, prompt=options.prompt)
    print(text)
    return 0 if passed else 1


def _rewards_serve(options: argparse.Namespace, _: list[str]) -> None:
    from rewards.serve import serve
    from rewards.server import Limits

    limits = Limits(
        max_batch=options.max_batch,
        max_delay=options.max_delay_ms / 1000,
        max_body_mb=options.max_body_mb,
        timeout=options.timeout,
        max_queue=options.max_queue,
    )
    serve(
        options.names,
        host=options.host,
        port=options.port,
        device=options.device,
        token_file=options.token_file,
        limits=limits,
        ends_with_parent=options.ends_with_parent,
        announce=lambda line: print(line, flush=True),
    )


def _print_run(run: Path) -> None:
    ignore_late_warnings()
    if is_main_process():
        print(f"run folder: {run}")


# -------------------------------------------------------------------------------------------------------------- parsing


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="ddpo",
        description="Reinforcement learning for diffusers pipelines.",
        epilog="--debug, or DDPO_DEBUG=1, shows the traceback of an error. ddpo COMMAND --help tells more.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = _command(commands, "train", _train, "fine-tune a pipeline", epilog=_TRAIN_EPILOG)
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file or shipped name")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue this run folder")
    train.add_argument("--checkpoint", metavar="NAME", help="with --resume: checkpoint folder (default: the newest)")
    plan = _command(commands, "plan", _plan, "check all inputs, print an epoch's work, and estimate memory and speed")
    plan.epilog = _PLAN_EPILOG
    plan.add_argument("config", metavar="CONFIG", help="YAML file or shipped name, with --key value as in train")
    plan.add_argument("--num-processes", type=_positive, default=1, metavar="N", help="processes (default 1)")
    plan.add_argument(
        "--utilisation", type=_share, default=0.4, metavar="SHARE", help="of a card's peak FLOP/s (default 0.4)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    _add_sample(commands)
    _add_evaluate(commands)
    _add_verify(commands)
    _add_check(commands)
    _add_pareto(commands)
    _add_dashboard(commands)
    _add_rewards(commands)
    return parser, {"train": train, "plan": plan}


def _command(
    commands: argparse._SubParsersAction,
    name: str,
    function: Callable[[argparse.Namespace, list[str]], int | None],
    about: str,
    *,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    usage = f"ddpo {name} CONFIG [--key value ...]" if name in ("train", "plan") else None
    parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        usage=usage,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run_command=function)
    return parser


_SAMPLE_EPILOG = """\
The sampler is the evaluation's (evaluation.sampler: steps, size, guidance, noise), so that a prompt of the evaluation
set has the same pictures, bit for bit, as in the evaluation at that checkpoint; --sampler rollout takes training's.
"""


def _add_sample(commands: argparse._SubParsersAction) -> None:
    about = "pictures of the pretrained and the tuned pipeline, side by side"
    parser = _command(commands, "sample", _sample, about, epilog=_SAMPLE_EPILOG)
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
    parser.add_argument("--num-images", type=_positive, default=4, help="images per prompt (default 4)")
    parser.add_argument("--output", type=Path, help="folder to write (default: RUN/samples)")
    parser.add_argument("--checkpoint", help="name of a checkpoint (default: the newest)")


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "evaluate", _evaluate, "rewards, KL and diversity on fixed prompts and seeds")
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--checkpoint", help="name of a checkpoint (default: the newest)")
    parser.add_argument("--output", type=Path, help="folder to write (default: in the run folder)")


_VERIFY_EPILOG = """\
Without --policy: closed-form control problems, solvers, and the trainer held to an optimum that is known.
With --policy: the likelihood of that model (log-probabilities, KL, first ratio, stock images, gradient).

  ddpo verify                              about a minute on 2 cores
  ddpo verify --full --report verification
  ddpo verify --only lqr,trainer
  ddpo verify --policy stable-diffusion-v1-5/stable-diffusion-v1-5 --precision bf16

Exit status 1 when a measurement is outside its tolerance.
"""


def _add_verify(commands: argparse._SubParsersAction) -> None:
    parser = _command(
        commands, "verify", _verify, "hold the mathematics to exact answers, and print the table", epilog=_VERIFY_EPILOG
    )
    parser.add_argument("--full", action="store_true", help="also the slow checks (about 3 minutes on 2 cores)")
    parser.add_argument("--only", type=_names, metavar="GROUP,...", help="only these groups of checks")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the measurements as JSON (default: to stdout)"
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write figures and one HTML page here")
    parser.add_argument("--policy", metavar="MODEL", help="check this pipeline: a folder, a hub id, or shapes")
    parser.add_argument("--sampler", help="with --policy: sampler.kind (default: what fits the model)")
    parser.add_argument("--num-steps", type=_positive, default=10, help="with --policy: denoising steps (default 10)")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="with --policy: guidance (default 5)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="with --policy: of the network"
    )


_CHECK_EPILOG = """\
Holds the policy to the stock pipeline: model output of every step, noise-free images, the saved adapter in a fresh
pipeline; then the likelihood, as verify --policy does. The sampler is the one that fits the model unless named.
A model that edits is given input images made here.

  ddpo check stabilityai/stable-diffusion-xl-base-1.0 --precision bf16
  ddpo check ./my_pipeline --num-steps 4 --guidance-scale 1

Exit status 1 when a measurement is outside its tolerance, 2 with the reason when the pipeline cannot be trained.
"""


def _add_check(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "check", _check, "whether a pipeline can be trained: the table", epilog=_CHECK_EPILOG)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or shapes")
    parser.add_argument(
        "--sampler", choices=("ddim", "ddpm", "flow_sde", "dance_sde", "cps"), help="default: what fits"
    )
    parser.add_argument("--num-steps", type=_positive, default=10, help="denoising steps (default 10)")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="as the pipeline defines it (default 5)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the network")
    parser.add_argument("--height", type=_positive, help="pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=_positive, help="pixels (default: the pipeline's own)")


_PARETO_EPILOG = """\
Reads the evaluations of finished or running runs. More is better in every measure but kl.

  ddpo pareto runs/a runs/b runs/c --x jpeg_compressibility --y heldout/shapes_strict
  ddpo pareto --sweep shapes_ppo --weights jpeg_compressibility=0,1,5,20 --epochs 6     launches the runs first

With --sweep, any --key value of a configuration goes to every run; runs that are finished already are kept.
"""


def _add_pareto(commands: argparse._SubParsersAction) -> None:
    about = "the runs that no other one beats in two measures: table, JSON, figure"
    parser = _command(commands, "pareto", _pareto, about, epilog=_PARETO_EPILOG)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folders")
    parser.add_argument("--x", metavar="MEASURE", help="horizontal axis, e.g. shapes or kl (default: first reward)")
    parser.add_argument("--y", metavar="MEASURE", help="vertical axis (default: second reward, or first held-out one)")
    parser.add_argument("--out", type=Path, default=Path("pareto.png"), help="picture (default %(default)s)")
    parser.add_argument("--sweep", metavar="CONFIG", help="train this configuration once for each of --weights")
    parser.add_argument("--weights", metavar="NAME=0,1,5", help="with --sweep: a reward and its weights")


def _add_dashboard(commands: argparse._SubParsersAction) -> None:
    parser = _command(commands, "dashboard", _dashboard, "open the local page with all runs")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="run folder (default: the newest project)")
    parser.add_argument("--port", type=int, help="port of the page (default: a free one)")
    parser.add_argument("--no-browser", dest="open_browser", action="store_false", help="print the address only")


def _add_rewards(commands: argparse._SubParsersAction) -> None:
    rewards = commands.add_parser("rewards", help="list, score, test or serve rewards, or learn one from preferences")
    actions = rewards.add_subparsers(metavar="ACTION", required=True)
    listing = _command(actions, "list", _rewards_list, "every reward that can be named")
    listing.add_argument("--verbose", action="store_true", help="also typical scores, extras, licences, origins")
    listing.add_argument("--markdown", action="store_true", help="the built-in ones as the table of docs/rewards.md")
    scoring = _command(actions, "score", _rewards_score, "score image files")
    scoring.add_argument("name", metavar="NAME", help="registered name, file.py:name or module:name")
    scoring.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    scoring.add_argument("--prompt", metavar="TEXT", help="the prompt of the images")
    testing = _command(actions, "test", _rewards_test, "check rewards on sample pictures; status 1 when a check fails")
    testing.add_argument(
        "names", metavar="NAME", nargs="*", help="rewards (default: all built-in ones that can run here)"
    )
    testing.add_argument("--options", type=_mapping, metavar="JSON", help="options of the reward, for a single NAME")
    testing.add_argument("--prompt", metavar="TEXT", help="the prompt of the sample pictures")
    _add_rewards_serve(actions)
    add_commands(actions, _command)


_SERVE_EPILOG = """\
Serves rewards to `remote` rewards of runs elsewhere: another environment, machine or device.

  ddpo rewards serve ocr jpeg_compressibility
  ddpo rewards serve 'clip_score={"model": "ViT-L-14", "weights": "openai"}' my_rewards.py:sharp --device cuda:1
  DDPO_REWARD_TOKEN=... ddpo rewards serve ocr --host 0.0.0.0

A line of JSON with the address is printed once it is ready. Only 127.0.0.1 is served unless --host says otherwise, and
other machines only with a token. SIGTERM finishes what was accepted. Format and security: docs/reward_server.md
"""


def _add_rewards_serve(actions: argparse._SubParsersAction) -> None:
    parser = _command(actions, "serve", _rewards_serve, "score for runs elsewhere, over HTTP", epilog=_SERVE_EPILOG)
    parser.add_argument("names", metavar="NAME", nargs="+", help='as in a configuration; options: NAME={"key": value}')
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    parser.add_argument("--device", default="cpu", help="for rewards with weights, e.g. cuda:1 (default cpu)")
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="its first line is the token (default: DDPO_REWARD_TOKEN, if set)",
    )
    parser.add_argument(
        "--max-batch", type=_positive, default=64, help="images up to which requests are joined; 1: never (default 64)"
    )
    parser.add_argument(
        "--max-delay-ms", type=float, default=2.0, help="how long a request waits for others to join (default 2)"
    )
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="largest request (default 64)")
    parser.add_argument(
        "--timeout", type=float, default=120.0, help="seconds until a request is given up (default 120)"
    )
    parser.add_argument("--max-queue", type=_positive, default=64, help="requests waiting at once (default 64)")
    parser.add_argument(
        "--ends-with-parent", action="store_true", help="end when standard input closes, as with its starter's end"
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _mapping(text: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a mapping such as {{"head": "head.pth"}}, got {text}')
    return value


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {number:g}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
