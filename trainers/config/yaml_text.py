"""YAML as configuration files mean it: the core schema of YAML 1.2, duplicate keys refused.

PyYAML's default reads `1e-4` as text, `off` as false, `010` as eight, dates as objects, and keeps the last of two equal
keys in silence. Here `true` and `false` are the only booleans, every number format reads as a number, keys are words,
and tags of other types (`!!binary`, `!!set`) are refused.
"""

import re
from collections.abc import Hashable

import yaml

from ddpo.validation import UserError

_TAG = "tag:yaml.org,2002:"
_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)

_MOST_VALUES = 100_000  # of a document: a few hundred bytes of aliases can stand for gigabytes
_CORE = (None, *(_TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map")))  # None: all others


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _CORE}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a word, not a list or a mapping", key_node.start_mark
                )
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either reader would not read back as text."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Loader.add_implicit_resolver(_TAG + "bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))
_Loader.add_implicit_resolver(_TAG + "merge", re.compile(r"^<<$"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+0123456789."))


def parse(text: str) -> object:
    """Reads one YAML document.

    Raises:
        UserError: The text is not YAML, or would fill the memory; the message has line, column and what is wrong.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > _MOST_VALUES:
            raise UserError(f"aliases make more than {_MOST_VALUES:,} values of it; write out what is meant")
        return loader.construct_document(node)
    except RecursionError as error:
        raise UserError("is nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(" ".join(str(error).split())) from error


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is made of once its aliases are written out; counted, not expanded.

    Raises:
        UserError: It holds itself.
    """
    if id(node) in known:
        if known[id(node)] < 0:
            mark = node.start_mark
            raise UserError(f"line {mark.line + 1}, column {mark.column + 1}: holds itself by an alias")
        return known[id(node)]
    known[id(node)] = -1
    children = () if isinstance(node, yaml.ScalarNode) else node.value
    flat = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
    known[id(node)] = 1 + sum(_expanded(part, known) for part in flat)
    return known[id(node)]


def dump(value: object, *, inline: bool = False) -> str:
    """Writes YAML that `parse` reads back unchanged; `inline` gives one line without a newline."""
    style = {"default_flow_style": True, "width": 10**6} if inline else {"width": 110}
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, **style)
    if parse(text) != value:  # PyYAML does not read back some line separators, e.g. U+0085, unless they are escaped
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, **style)
    return text.removesuffix("...\n").strip() if inline else text
