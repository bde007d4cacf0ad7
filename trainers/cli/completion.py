"""Shell completion, `ddpo completion bash|zsh|fish`: written from the parsers, so that it knows what they know."""

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from trainers.shipped_configs import shipped

OVERRIDABLE = ("train", "plan", "doctor", "sweep")
"""Commands whose `--key value` may be any key of a configuration."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """What may follow a command.

    Attributes:
        path: The command, and the one below it where it has some; empty for `ddpo` itself.
        commands: Names of commands below it, each with its line of help.
        options: The same of options.
        values: Of its positional arguments, as far as they are known.
    """

    path: tuple[str, ...]
    commands: dict[str, str]
    options: dict[str, str]
    values: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        """Every one."""
        return [*self.commands, *self.options, *self.values]


def collect(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Words]:
    """The words of a parser and of all below it."""
    commands: dict[str, str] = {}
    options: dict[str, str] = {}
    values: list[str] = []
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = dict(action.choices)
            commands = {choice.dest: choice.help or "" for choice in action._choices_actions}
        elif action.option_strings:
            options[action.option_strings[-1]] = action.help or ""
        elif action.choices is not None:
            values += map(str, action.choices)
        elif "CONFIG" in str(action.metavar):
            values += shipped()
    if path and path[0] in OVERRIDABLE:
        options |= dict.fromkeys(_keys(), "a key of the configuration")
    yield Words(path=path, commands=commands, options=options, values=tuple(values))
    for name, parser_below in below.items():
        yield from collect(parser_below, (*path, name))


def _keys() -> list[str]:
    """Every key of a configuration as an option, of lists the first entry's."""
    from trainers.config.reference import reference

    return list(dict.fromkeys(re.findall(r"^ +(--[\w.]+)", reference(), flags=re.MULTILINE)))


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The text that a shell sources.

    Args:
        shell: `bash`, `zsh` or `fish`.
        parser: Of the whole command line.
    """
    words = list(collect(parser))
    if shell == "fish":
        return _fish(words)
    prelude = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return prelude + _bash(words)


def _bash(words: list[Words]) -> str:
    """A function that looks at the words before the cursor; options once a dash is there, files where nothing fits."""
    deepest_first = sorted(words, key=lambda one: -len(one.path))
    cases = "\n".join(f"    {_pattern(one.path)}) words={shlex.quote(' '.join(one.all))} ;;" for one in deepest_first)
    return f"""\
_ddpo() {{
  local words="" current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[*]:1:COMP_CWORD-1}}"
  case "$before " in
{cases}
  esac
  [[ $current == -* ]] || words=$(printf "%s\\n" $words | grep -v "^-")
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ddpo ddpo
"""


def _pattern(path: tuple[str, ...]) -> str:
    return f'"{" ".join(path)} "*' if path else "*"


def _fish(words: list[Words]) -> str:
    """A line for each word, with its help."""
    lines = []
    for one in words:
        seen = " and ".join(f"__fish_seen_subcommand_from {name}" for name in one.path).replace(" and ", "; and ")
        below = f"; and not __fish_seen_subcommand_from {' '.join(one.commands)}" if one.commands else ""
        condition = f"{seen}{below}" if seen else "__fish_use_subcommand"
        prefix = f"complete -c ddpo -n {_quoted(condition)}"
        lines += [f"{prefix} -f -a {_quoted(name)} -d {_quoted(about)}" for name, about in one.commands.items()]
        lines += [f"{prefix} -a {_quoted(value)}" for value in one.values]
        options = {name.removeprefix("--"): about for name, about in one.options.items() if name.startswith("--")}
        lines += [f"{prefix} -l {_quoted(name)} -d {_quoted(_plain(about))}" for name, about in options.items()]
    return "\n".join(lines) + "\n"


def _plain(about: str) -> str:
    """A line of help without argparse's fields."""
    return re.sub(r"%\(\w+\)s", "...", about).replace("%%", "%")


def _quoted(text: str) -> str:
    """For fish, whose single quotes know two escapes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
