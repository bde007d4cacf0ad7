"""The command line `ddpo`."""

from trainers.cli.command_line import main

__all__ = ["main"]
