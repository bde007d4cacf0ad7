"""The command line `ddpo`."""

from trainers.cli.command_line import entry_point, main

__all__ = ["entry_point", "main"]
