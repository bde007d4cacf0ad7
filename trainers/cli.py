"""The command `ddpo`: reads arguments, calls one function per subcommand, turns user errors into one line.

Nothing heavy is imported until a subcommand runs, so `ddpo --help` is instant.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from trainers.commands.arguments import command, positive, share
from trainers.commands.rewards import add_reward_commands
from trainers.commands.runs import add_run_commands
from trainers.commands.verifying import add_verification_commands
from trainers.interruption import EXIT_CODE, RunStopped, ignore_late_warnings
from trainers.launch import is_main_process, num_processes, prepare_threads, rank

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
reward_processes.* may change, and the run keeps them:
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
    if options.checkpoint is not None:
        raise ValueError("--checkpoint names where to continue a run: it goes with --resume RUN")
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
    from trainers.config_io import load_config, load_resumed, refuse_run_keys, resume_overrides
    from trainers.from_python import refuse_objects
    from trainers.preflight import preflight

    saved_file = options.resume / "config.yaml"
    if not saved_file.is_file():
        raise FileNotFoundError(f"{options.resume}: is no run folder (no config.yaml in it)")
    refuse_objects(options.resume)
    refuse_run_keys(load_config(saved_file), overrides)
    if options.config is not None:
        wanted = load_config(options.config, overrides)
        overrides = resume_overrides(load_config(saved_file), wanted, saved_file=saved_file)
    config = load_resumed(saved_file, overrides)
    plan = preflight(config, num_processes=num_processes(), resumed=options.resume)
    if is_main_process():
        print(plan.describe(), flush=True)
    from trainers.loop import resume

    _print_run(resume(options.resume, overrides, checkpoint=options.checkpoint))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.config_io import load_config
    from trainers.preflight import preflight

    config = load_config(options.config, overrides)
    plan = preflight(config, num_processes=options.num_processes, here=False)
    if not options.json:
        print(plan.describe(), flush=True)
    from trainers.estimate.command import describe

    print(describe(config, plan, utilisation=options.utilisation, as_json=options.json))


def _print_run(run: Path) -> None:
    ignore_late_warnings()
    if is_main_process():
        print(f"run folder: {run}")


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="ddpo",
        description="Reinforcement learning for diffusers pipelines.",
        epilog="--debug, or DDPO_DEBUG=1, shows the traceback of an error. ddpo COMMAND --help tells more.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = command(commands, "train", _train, "fine-tune a pipeline", epilog=_TRAIN_EPILOG)
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file or shipped name")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue this run folder")
    train.add_argument("--checkpoint", metavar="NAME", help="with --resume: checkpoint folder (default: the newest)")
    plan = command(commands, "plan", _plan, "check all inputs, print an epoch's work, and estimate memory and speed")
    plan.epilog = _PLAN_EPILOG
    plan.add_argument("config", metavar="CONFIG", help="YAML file or shipped name, with --key value as in train")
    plan.add_argument("--num-processes", type=positive, default=1, metavar="N", help="processes (default 1)")
    plan.add_argument(
        "--utilisation", type=share, default=0.4, metavar="SHARE", help="of a card's peak FLOP/s (default 0.4)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_run_commands(commands)
    add_verification_commands(commands)
    add_reward_commands(commands)
    return parser, {"train": train, "plan": plan}
