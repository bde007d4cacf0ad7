"""What the user has to mend is a `UserError`: it says what was received and the cure, and needs no traceback.

Any other exception is a defect, or somebody else's, and keeps its traceback. A configuration's field is refused in one
way: its name, what was received, what is valid.
"""

from collections.abc import Iterator
from contextlib import contextmanager

SHOWN_LETTERS = 200  # of a value received, in a message


class UserError(ValueError):
    """Something that the user can mend; the message says what was received and the cure."""


class MissingPackageError(UserError, ImportError):
    """An optional package is not installed; the message names the extra that has it."""


class FieldError(UserError):
    """A configuration field holds a value outside its range.

    Who refuses a value knows the field; who owns the group of fields adds its name (`within`).

    Attributes:
        field: Name of the field, as written in a configuration file.
        value: The value received.
        expected: What the field must be, e.g. "at least 1".
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        received = shown if len(shown) <= SHOWN_LETTERS else f"{shown[: SHOWN_LETTERS - 3]}..."
        super().__init__(f"{field} must be {expected}, got {received}")
        self.field = field
        self.value = value
        self.expected = expected


@contextmanager
def within(group: str) -> Iterator[None]:
    """Puts a group's name before the fields that are refused in a `with` block: `kind` becomes `sampler.kind`."""
    try:
        yield
    except FieldError as error:
        raise FieldError(f"{group}.{error.field}", error.value, error.expected) from error


def check(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises `FieldError` unless `ok`."""
    if not ok:
        raise FieldError(field, value, expected)


def misfit(text: str) -> str | None:
    """What of a text no file and no tokenizer can hold, in words; None where there is nothing."""
    for place, letter in enumerate(text, 1):
        if letter == "\0":
            return f"a NUL, its letter {place}"
        if "\ud800" <= letter <= "\udfff":
            return f"half of a surrogate pair, its letter {place}"
    return None
