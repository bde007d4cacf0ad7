"""`ddpo configs`: what to begin with."""

import argparse

from trainers.cli.parser import Parser, command
from trainers.shipped_configs import CONFIGS, shipped

_CONFIGS_EPILOG = """\
  ddpo configs                                  the list
  ddpo configs shapes_ppo > mine.yaml           a copy to change; then ddpo train mine.yaml
"""


def add_starting_commands(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Adds the subcommands."""
    configs = command(commands, "configs", _configs, "list the shipped configurations", epilog=_CONFIGS_EPILOG)
    configs.add_argument("name", nargs="?", metavar="NAME", choices=list(shipped()), help="print this one")


def _configs(options: argparse.Namespace, _: list[str]) -> None:
    if options.name is not None:
        print((CONFIGS / f"{options.name}.yaml").read_text(encoding="utf-8"), end="")
        return
    known = shipped()
    width = max(map(len, known), default=0)
    print("\n".join(f"{name:<{width}}  {about}" for name, about in known.items()))
