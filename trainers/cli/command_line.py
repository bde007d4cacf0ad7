"""The command `ddpo`: reads arguments, calls one function per subcommand, turns user errors into one line.

Nothing heavy is imported until a subcommand runs, so `ddpo --help` is instant.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainers.cli.arguments import add_accept, model, positive, run_folder, share, split_overrides
from trainers.cli.library_noise import quiet_libraries
from trainers.cli.parser import Parser, ShowVersion, command
from trainers.cli.rewards import add_reward_commands
from trainers.cli.runs import add_run_commands
from trainers.cli.starting import add_starting_commands
from trainers.cli.sweeping import PARETO_OPTIONS, SWEEP_OPTIONS, add_sweep_commands
from trainers.cli.verifying import add_verification_commands
from trainers.parallel.interruption import EXIT_CODE, PeerLost, RunStopped, ignore_late_warnings
from trainers.parallel.launcher import (
    alone_though_asked_for_more,
    is_main_process,
    num_processes,
    prepare_threads,
    rank,
)
from trainers.tracking.terminal import lasting_output

if TYPE_CHECKING:  # `ddpo --help` imports nothing heavy
    from trainers.config import Config
    from trainers.planning.plan import BatchPlan

_TRAIN_EPILOG = """\
CONFIG is a YAML file or a shipped name (shapes_ppo, sd15_jpeg, ...). It holds differences from the defaults.

Override any key with --group.key VALUE, where VALUE is YAML:
  --optimizer.learning_rate 1e-4   --rewards.0.weight 2   --model.offload true   --run.name null
  --adapter.kind full              (the file's keys of the other kind are dropped)
  --kl.kind adaptive --kl.target 3
  --rewards.1.name my_rewards.py:sharpness   (one past the end appends)
  --rewards.0.name my_rewards.py:sharpness   (another reward: weight and options of the file's are dropped)

Several processes are started by the launcher, one per device:
  accelerate launch scripts/train.py CONFIG [--key value ...]
  accelerate launch --config_file configs/accelerate/multi_gpu_8.yaml scripts/train.py CONFIG
  torchrun --standalone --nproc_per_node 8 -m trainers train CONFIG
  ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m trainers train CONFIG     (two CPU processes)
  torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT -m trainers train CONFIG
  (`accelerate launch --cpu --num_processes 2` starts one process only, which says so.)

Continue a run, exactly where it stopped; epochs, max_minutes, optimizer.schedule_epochs, checkpoints.*, tracking.*,
distributed.* and reward_processes.* may change, and the run keeps them:
  ddpo train --resume runs/NAME [--epochs 200]
A run may be moved or copied; where its files lie now is said by the keys that named them:
  ddpo train --resume /elsewhere/NAME --model.path /models/sd15 --rewards.0.name /code/my_rewards.py:sharpness

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C stop a run cleanly between two batches: the epoch begun is dropped, the whole ones
are saved, and the exit status is 75. A second signal ends it at once.
"""


_PLAN_EPILOG = """\
No weights are loaded: shapes come from a local pipeline folder's configuration files, or are known for SD 1.5, SDXL,
SD 3.5 medium and FLUX.1-dev. Activations are counted by running the networks on tensors without data (half a minute
for FLUX), so resolution, precision, adapter, gradient checkpointing, guidance and KL all count.

  ddpo plan sdxl_aesthetic --model.offload true --batch.train_batch_size 2
  ddpo plan sd15_jpeg --num-processes 8 --json
"""


_COMPLETION_EPILOG = """\
  ddpo completion bash > ~/.local/share/bash-completion/completions/ddpo
  ddpo completion zsh >> ~/.zshrc              (after compinit)
  ddpo completion fish > ~/.config/fish/completions/ddpo.fish
"""


_TOLD = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
"""What a file system refuses and its message explains: names, full disks, what is read-only."""


def entry_point(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command line as a whole process, which ends with its status, also when it is warned on its way out."""
    status = main(arguments)
    ignore_late_warnings()
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        Exit status, whether anybody reads the output or not: 0, 1 when `verify`, `check` or `doctor CONFIG` finds a
        failure or a run of a sweep failed, 2 for a user error, 75 when training stopped on a signal and can be resumed,
        130 when anything else was interrupted.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or os.environ.get("DDPO_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    prepare_threads()
    _replace_what_terminals_lack()
    quiet_libraries()
    with lasting_output():
        return _status(arguments, debug=debug)


def _status(arguments: list[str], *, debug: bool) -> int:
    """Runs a command; errors that the user can mend become lines and a status."""
    try:
        return _run(arguments)
    except RunStopped as stop:
        if is_main_process() or isinstance(stop, PeerLost):
            print(stop, file=sys.stderr)
        return EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        if is_told_elsewhere(error):
            return 2
        process = f" (process {rank()})" if num_processes() > 1 else ""
        for line in str(error).splitlines() or [type(error).__name__]:
            print(f"error{process}: {line}", file=sys.stderr)
        return 2


def _replace_what_terminals_lack() -> None:
    """In a locale that is not UTF-8, signs outside of it are replaced when they are printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError):  # a file whose descriptor has become a pipe cannot say where it is
                stream.reconfigure(errors="replace")


def is_user_error(error: Exception) -> bool:
    """Whether the message alone helps: something that the user can mend, or a path that is missing, closed or no path.

    Any other exception is a defect and keeps its traceback, also a ValueError.
    """
    from ddpo.validation import UserError
    from rewards.base import UserError as RewardUserError

    files = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    named = isinstance(error, OSError) and error.errno in _TOLD
    return named or isinstance(error, (UserError, RewardUserError, *files))


def is_told_elsewhere(error: Exception) -> bool:
    """Whether another process of the run prints this error."""
    from trainers.parallel.agreement import ToldElsewhere

    return isinstance(error, ToldElsewhere)


def _run(arguments: list[str]) -> int:
    parser, subparsers = _parser()
    command = arguments[0] if arguments else ""
    overrides: list[str] = []
    if command in ("train", "plan"):
        wants_help = any(argument in ("-h", "--help") for argument in arguments)
        if wants_help:
            _print_config_help(subparsers[command])
            return 0
        own = ("--resume", "--checkpoint", "--accept", "--num-processes", "--utilisation", "--json")
        rest, overrides = split_overrides(arguments[1:], own=own)
        arguments = [command, *rest]
    elif command == "doctor":
        rest, overrides = split_overrides(arguments[1:], own=("--images", "--overfit", "--help"))
        arguments = [command, *rest]
    elif command == "sweep" or (command == "pareto" and "--sweep" in arguments):
        rest, overrides = split_overrides(arguments[1:], own=SWEEP_OPTIONS if command == "sweep" else PARETO_OPTIONS)
        arguments = [command, *rest]
    elif command in ("evaluate", "export", "sample"):
        undotted = [name for name in (argument.partition("=")[0] for argument in arguments) if "." not in name]
        rest, overrides = split_overrides(arguments[1:], own=undotted)
        arguments = [command, *rest]
    elif arguments[:2] == ["rewards", "label"] and "--train" in arguments:
        known = ("--out", "--num", "--port", "--no-browser", "--train", "--help")
        rest, overrides = split_overrides(arguments[2:], own=known)
        arguments = ["rewards", "label", *rest]
    try:
        options, unknown = parser.parse_known_args(arguments)
        options.parser.refuse_unknown(unknown)
        options.check(options)
        _check_model(overrides, subparsers.get(command, parser))
    except SystemExit as end:  # argparse's way to end; its message is printed
        return int(end.code or 0)
    return options.run_command(options, overrides) or 0


def _check_model(overrides: Sequence[str], parser: Parser) -> None:
    """Refuses a model folder of the command line that is not there, before anything heavy is imported."""
    for place, token in enumerate(overrides):
        name, _, value = token.partition("=")
        if name == "--model.path":
            try:
                model(value or "".join(overrides[place + 1 : place + 2]))
            except argparse.ArgumentTypeError as error:
                parser.error(f"model.path: {error}")


def _print_config_help(parser: Parser) -> None:
    from trainers.config.reference import reference

    print(f"{parser.format_help()}\nEvery key, as an override; in YAML, the dots are nesting.\n\n{reference()}")


# ------------------------------------------------------------------------------------------------------------- commands


def _train(options: argparse.Namespace, overrides: list[str]) -> None:
    from ddpo.validation import UserError

    if notice := alone_though_asked_for_more():
        print(notice, file=sys.stderr)
    if options.resume is not None:
        _resume(options, overrides)
        return
    if options.checkpoint is not None:
        raise UserError("--checkpoint names where to continue a run: it goes with --resume RUN")
    if options.config is None:
        raise UserError("train needs a configuration, e.g. ddpo train shapes_ppo (ddpo train --help lists every key)")
    from trainers.config.io import ConfigFile, to_yaml
    from trainers.config.locations import absolute
    from trainers.planning.preflight import preflight

    file = ConfigFile.read(options.config)
    config = file.config(overrides)
    plan = preflight(config, num_processes=num_processes())
    _print_plan(config, plan)
    config = absolute(config)
    from trainers.loop import train_from_config

    _print_run(train_from_config(config, config_yaml=to_yaml(config, full=True), stem=file.path.stem, plan=plan))


def _resume(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.planning.preflight import preflight
    from trainers.run_folder.resume import Resume

    resumed = Resume.read(
        options.resume, overrides, given=options.config, checkpoint=options.checkpoint, accept=options.accept
    )
    plan = preflight(resumed.config, num_processes=num_processes(), resumed=options.resume)
    _print_plan(resumed.config, plan)
    from trainers.loop import continue_run

    _print_run(continue_run(resumed, plan=plan))


def _plan(options: argparse.Namespace, overrides: list[str]) -> None:
    from trainers.config.io import load_config
    from trainers.planning.preflight import preflight

    config = load_config(options.config, overrides)
    plan = preflight(config, num_processes=options.num_processes, here=False)
    if not options.json:
        _print_plan(config, plan)
    from trainers.planning.estimate.command import describe

    print(describe(config, plan, utilisation=options.utilisation, as_json=options.json))


def _print_plan(config: "Config", plan: "BatchPlan") -> None:
    """What is optimised, and what an epoch of it takes."""
    if is_main_process():
        from trainers.config.goal import describe_goal

        print(f"{describe_goal(config)}\n{plan.describe()}", flush=True)


def _print_run(run: Path) -> None:
    if is_main_process():
        print(f"run folder: {run}")


def make_parser() -> Parser:
    """The parser of the whole command line."""
    return _parser()[0]


def _completion(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.cli.completion import script

    print(script(options.shell, make_parser()), end="")


def _parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(
        prog="ddpo",
        description="Reinforcement learning for diffusers pipelines.",
        epilog="--debug, or DDPO_DEBUG=1, shows the traceback of an error. ddpo COMMAND --help tells more.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = command(commands, "train", _train, "fine-tune a pipeline", epilog=_TRAIN_EPILOG)
    train.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file or shipped name")
    train.add_argument("--resume", type=run_folder, metavar="RUN", help="continue this run folder")
    train.add_argument("--checkpoint", metavar="NAME", help="with --resume: checkpoint folder (default: the newest)")
    add_accept(train, "model", "evaluations", about="with --resume: go on though these changed or are damaged")
    plan = command(commands, "plan", _plan, "check all inputs, print an epoch's work, and estimate memory and speed")
    plan.epilog = _PLAN_EPILOG
    plan.add_argument("config", metavar="CONFIG", help="YAML file or shipped name, with --key value as in train")
    plan.add_argument("--num-processes", type=positive, default=1, metavar="N", help="processes (default 1)")
    plan.add_argument(
        "--utilisation", type=share, default=0.4, metavar="SHARE", help="of a card's peak FLOP/s (default 0.4)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_starting_commands(commands)
    add_run_commands(commands)
    add_sweep_commands(commands)
    add_verification_commands(commands)
    add_reward_commands(commands)
    completion = command(commands, "completion", _completion, "print what a shell completes ddpo by",
                         epilog=_COMPLETION_EPILOG)  # fmt: skip
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="which one")
    return parser, {"train": train, "plan": plan}
