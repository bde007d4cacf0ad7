"""A dictionary that forgets: what was used most recently, up to a number of bytes."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """The values that were used most recently."""

    def __init__(self, limit: int) -> None:
        """Starts empty.

        Args:
            limit: Bytes that all values together may take; a larger value is not kept at all.
        """
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def get(self, key: Key) -> Value | None:
        """The value of a key, used by this; None if it was forgotten or never known."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keeps the value of a new key and forgets those that were not used for longest, where there are too many.

        Args:
            key: Not known at present.
            value: Its value.
            size: Of the value in bytes, of what no other value holds.
        """
        assert key not in self._entries
        self._entries[key] = (value, size)
        self._size += size
        while self._size > self._limit:
            _, (_, freed) = self._entries.popitem(last=False)
            self._size -= freed
