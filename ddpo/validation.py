"""One way to refuse a value: name the field, show what was received, say what is valid."""


class FieldError(ValueError):
    """A configuration field holds a value outside its range.

    Attributes:
        field: Name of the field, as written in a configuration file.
        value: The value received.
        expected: What the field must be, e.g. "at least 1".
    """

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field} must be {expected}, got {value!r}")
        self.field = field
        self.value = value
        self.expected = expected


def check(ok: bool, field: str, value: object, expected: str) -> None:
    """Raises `FieldError` unless `ok`."""
    if not ok:
        raise FieldError(field, value, expected)
