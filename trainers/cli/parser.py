"""How a subcommand is declared, and how it is refused: in one line, with the word that may have been meant."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser that says in one line what is wrong, and which word may have been meant."""

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        message = re.sub(r"^argument [A-Z]+: ", "", message)
        chosen = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if chosen:
            option = re.match("argument .*?: ", message)
            message = (option[0] if option else "") + self._unknown(chosen[1], re.findall(r"[\w-]+", chosen[2]))
        known = message.startswith(("argument", "there is no", "model.path")) or "is not a run folder" in message
        self.exit(2, f"error: {message}" + ("\n" if known else f" ({self.prog} --help tells more)\n"))

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """Ends with status 2 if there are words that the command does not take."""
        if words:
            self.error(self._unknown(words[0].partition("=")[0], list(self._option_string_actions)))

    @staticmethod
    def _unknown(word: str, valid: Sequence[str]) -> str:
        close = difflib.get_close_matches(word, valid, n=1)
        return f"unknown {word!r}" + (f", did you mean {close[0]!r}?" if close else f", there are {', '.join(valid)}")


class ShowVersion(argparse.Action):
    """Prints the installed version and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Does so."""
        print(f"ddpo {version('ddpo')}")
        parser.exit()


def command(
    commands: "argparse._SubParsersAction[Parser]",
    name: str,
    function: Callable[[argparse.Namespace, list[str]], int | None],
    about: str,
    *,
    epilog: str | None = None,
    check: Callable[[argparse.Namespace], None] = lambda options: None,
) -> Parser:
    """Adds a subcommand.

    Args:
        commands: Where to.
        name: What it is called by.
        function: Runs it, given the arguments and the `--key value` overrides; returns the exit status, None for 0.
        about: One line, for the list of commands and the top of its help.
        epilog: What its help ends with.
        check: Refuses arguments that do not go together, by the parser's `error`.
    """
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
    parser.set_defaults(run_command=function, check=check, parser=parser)
    return parser
