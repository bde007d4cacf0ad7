"""`ddpo configs` and `ddpo new`: what to begin with."""

import argparse
from pathlib import Path

from trainers.cli.arguments import as_given, model, positive
from trainers.cli.parser import Parser, command
from trainers.shipped_configs import CONFIGS, shipped

_CONFIGS_EPILOG = """\
  ddpo configs                                  the list
  ddpo configs shapes_ppo > mine.yaml           a copy to change; then ddpo train mine.yaml
"""


_NEW_EPILOG = """\
  ddpo new mine --model stable-diffusion-v1-5/stable-diffusion-v1-5 --reward aesthetic --gpu 24
  ddpo new demo --reward jpeg_compressibility --reward my_rewards.py:warmth

Then ddpo plan mine, ddpo doctor mine, ddpo train mine. Memory is estimated for the models that ddpo plan knows.
"""


def add_starting_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the subcommands."""
    configs = command(commands, "configs", _configs, "list the shipped configurations", epilog=_CONFIGS_EPILOG)
    configs.add_argument("name", nargs="?", metavar="NAME", choices=list(shipped()), help="print this one")
    new = command(commands, "new", _new, "write a commented configuration to begin with", epilog=_NEW_EPILOG)
    new.add_argument("file", type=_new_file, metavar="NAME", help="configuration to write: NAME.yaml")
    new.add_argument("--model", type=model, default="shapes", help="a folder, a hub id, or shapes (default)")
    new.add_argument("--reward", dest="rewards", action="append", required=True, metavar="R",
                     help="name, or FILE.py:NAME; repeat for a sum")  # fmt: skip
    new.add_argument("--prompts", metavar="SOURCE", help="file, list or data set (default: a shipped list)")
    new.add_argument("--gpu", type=positive, metavar="GIB", help="its memory: batches that fit, by `ddpo plan`")


def _configs(options: argparse.Namespace, _: list[str]) -> None:
    if options.name is not None:
        print((CONFIGS / f"{options.name}.yaml").read_text(encoding="utf-8"), end="")
        return
    known = shipped()
    width = max(map(len, known), default=0)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in known.items()))


def _new_file(text: str) -> Path:
    """The file of a new configuration, which must not exist yet."""
    path = Path(text)
    path = path if path.suffix == ".yaml" else path.with_name(f"{path.name}.yaml")
    if path.exists():
        raise argparse.ArgumentTypeError(f"{path} exists already: choose another name, or remove it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} to")
    return path


def _new(options: argparse.Namespace, _: list[str]) -> None:
    from trainers.planning.starting_config import Start, starting_config

    options.name = options.file.stem
    text = starting_config(as_given(Start, options))
    options.file.write_text(text, encoding="utf-8")
    print(f"{options.file}\nnext: ddpo plan {options.file}, ddpo doctor {options.file}, ddpo train {options.file}")
