"""The reference of all configuration keys, made from the configuration classes and their docstrings."""

import dataclasses
import inspect
import textwrap

from rewards.docstrings import documented
from trainers.config import Config
from trainers.config.errors import show
from trainers.config.schema import declared, default_of, element_of, fields_of, is_optional, kinds_of, plain, words

_NAMES: dict[object, str] = {bool: "true|false", int: "int", float: "float", str: "text"}


def reference(*, width: int = 110) -> str:
    """Every key with its type, default and one line of documentation, by group."""
    parts = []
    single = []
    for field in dataclasses.fields(Config):
        hint = fields_of(Config)[field.name]
        about = documented(Config, "Attributes")[field.name]
        if kinds := kinds_of(hint):
            groups = [_group(kind, field.name, field, width) for kind in kinds.values()]
            parts.append("\n".join([f"{field.name}: {about}", *groups]))
        elif fields_of(plain(hint)):
            parts.append(f"{field.name}: {about}\n{_group(plain(hint), field.name, None, width)}")
        elif fields_of(element_of(hint)):
            entry = _group(element_of(hint), f"{field.name}.0", None, width)
            parts.append(f"{field.name}: {about} A list, numbered from 0.\n{entry}")
        else:
            single.append(_key(Config, field, "", width))
    return "\n\n".join([*parts, "others\n" + "\n".join(single)])


def _group(group: object, prefix: str, union: dataclasses.Field | None, width: int) -> str:
    lines = []
    if union is not None:
        kind = fields_of(group)["kind"]
        chosen = "  (default)" if type(default_of(union)) is group else ""
        about = (inspect.getdoc(group) or "").partition("\n")[0]
        lines.append(f"  --{prefix}.kind {words(kind)[0]}{chosen}  {about}")
    for field in declared(group):
        only_kind = field.name == "kind" and len(words(fields_of(group)["kind"])) == 1
        if not only_kind:
            lines.append(_key(group, field, f"{prefix}.", width))
            nested = plain(fields_of(group)[field.name])
            if fields_of(nested):
                lines.append(_group(nested, f"{prefix}.{field.name}", None, width))
    return "\n".join(lines)


def _key(group: object, field: dataclasses.Field, prefix: str, width: int) -> str:
    hint = fields_of(group)[field.name]
    default = default_of(field)
    value = "required" if default is dataclasses.MISSING else f"default {_plain_default(default)}"
    value = "below" if default is not None and fields_of(type(default)) else value
    head = f"  --{prefix}{field.name} {_type(hint)}  ({value})"
    text = documented(group, "Attributes").get(field.name, "")
    return head + "\n" + textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _plain_default(default: object) -> str:
    if isinstance(default, tuple):
        return f"[{', '.join(map(str, default))}]"
    return default if isinstance(default, str) else show(default)


def _type(hint: object) -> str:
    optional = "|null" if is_optional(hint) else ""
    inner = plain(hint)
    if choices := words(inner):
        return "|".join(choices) + optional
    if element_of(inner) is not object:
        return f"[{_type(element_of(inner))}, ...]{optional}"
    if fields_of(inner):
        return "group" + optional
    return _NAMES.get(inner, "mapping") + optional
