"""The one reader of JSON documents: values of a stated type, or an error that names field, expectation and finding.

It is our own because a message here says what was found, and which file and field to look at. msgspec's and pydantic's
messages leave out one or the other, and the runtime would carry another compiled package for them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .checks import MOST_QUOTED, quoted

T = TypeVar("T")


def expect(kind: type[T], value: Any, where: str, error: type[Exception]) -> T:
    """The value, if it is of a type.

    Raises:
        error: it is of another type; `where` names the value.
    """
    # JSON's true is Python's 1: a number must not be a truth value.
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise unexpected(kind, value, where, error)
    return value


def unexpected(kind: type, value: object, where: str, error: type[Exception]) -> Exception:
    """The error for a value that is not what its type promises."""
    return error(f"{where}: expected {kind.__name__}, found {type(value).__name__} {str(value)[:60]!r}")


class Fields:
    """A JSON object, read field by field.

    Args:
        content: the object.
        where: names it in messages.
        error: the type of the errors that are raised.

    Raises:
        error: `content` is no object.
    """

    def __init__(self, content: object, where: str, error: type[Exception]) -> None:
        if not isinstance(content, dict):
            raise error(f"{where}: expected a JSON object, found {type(content).__name__}")
        self._content, self.where, self.error = content, where, error

    def has(self, key: str) -> bool:
        """Whether the object has this field."""
        return key in self._content

    def get(self, key: str, kind: type[T]) -> T:
        """The value of a field, checked for its type."""
        if key not in self._content:
            raise self.error(f"{self.where}: {key}: expected {kind.__name__}, found nothing")
        return expect(kind, self._content[key], f"{self.where}: {key}", self.error)

    def optional(self, key: str, kind: type[T]) -> T | None:
        """The value of a field, or None if the field is missing or null."""
        return None if self._content.get(key) is None else self.get(key, kind)

    def count(self, key: str, least: int = 0, most: int = 2**63 - 1) -> int:
        """A whole number in a range."""
        value = self.get(key, int)
        if not least <= value <= most:
            limit = f"{least} or more" if value < least else f"at most {most}"
            raise self.error(f"{self.where}: {key}: expected a number of {limit}, found {value}")
        return value

    def child(self, key: str) -> Fields:
        """An object."""
        return Fields(self.get(key, dict), f"{self.where}: {key}", self.error)

    def children(self, key: str) -> list[Fields]:
        """A list of objects."""
        items = enumerate(self.get(key, list))
        return [Fields(item, f"{self.where}: {key}[{index}]", self.error) for index, item in items]

    def named(self, key: str, read: Callable[[Fields], T]) -> dict[str, T]:
        """Read each object in an object of objects."""
        items = self.get(key, dict)
        places = {name: f"{self.where}: {key}.{name[:MOST_QUOTED]}" for name in items}
        return {name: read(Fields(item, places[name], self.error)) for name, item in items.items()}

    def choice(self, key: str, *choices: str) -> str:
        """One of some texts."""
        value = self.get(key, str)
        if value not in choices:
            raise self.error(
                f"{self.where}: {key}: expected {' or '.join(map(repr, choices))}, found {quoted(value)}; "
                "update prefix-runtime"
            )
        return value


class DataclassReader:
    """Reads dataclasses by their annotations: dataclasses, tuples, mappings of text, numbers, text and None.

    Args:
        error: the type of the errors that are raised.
        scalars: for int, float or str a function that returns the value or raises, in place of `expect`.
    """

    def __init__(self, error: type[Exception], scalars: Mapping[type, Callable[[Any, str], Any]] | None = None) -> None:
        self._error, self._scalars = error, scalars or {}

    def read(self, kind: type[T], value: Any, where: str) -> T:
        """The value as a type; `where` names it in messages.

        Raises:
            error: it does not fit the type.
        """
        result: Any
        if is_dataclass(kind):
            result = self._object(kind, value, where)
        elif get_origin(kind) in (types.UnionType, Union):
            result = None if value is None else self.read(get_args(kind)[0], value, where)
        elif get_origin(kind) is tuple:
            result = tuple(self._items(get_args(kind), value, where))
        elif get_origin(kind) is Mapping:
            items = self._scalar(dict, value, where).items()
            result = {name: self.read(get_args(kind)[1], item, f"{where}.{name}") for name, item in items}
        else:
            result = value if kind is Any else self._scalar(kind, value, where)
        return result  # type: ignore[no-any-return]  # by the branches above

    def _object(self, kind: type[Any], value: Any, where: str) -> Any:
        content = self._scalar(dict, value, where)
        hints = get_type_hints(kind)
        names = [each.name for each in fields(kind)]
        missing = [name for name in names if name not in content]
        if missing:
            raise self._error(f"{where}: {missing[0]}: expected a value, found nothing")
        values = {name: self.read(hints[name], content[name], f"{where}: {name}") for name in names}
        try:
            return kind(**values)
        except self._error as error:
            raise self._error(f"{where}: {error}") from error

    def _items(self, kinds: tuple[Any, ...], value: Any, where: str) -> Iterator[Any]:
        items = self._scalar(list, value, where)
        is_uniform = kinds[-1] is Ellipsis
        if not is_uniform and len(items) != len(kinds):
            raise self._error(f"{where}: expected {len(kinds)} values, found {len(items)}")
        for index, item in enumerate(items):
            yield self.read(kinds[0] if is_uniform else kinds[index], item, f"{where}[{index}]")

    def _scalar(self, kind: type[Any], value: Any, where: str) -> Any:
        read = self._scalars.get(kind)
        return expect(kind, value, where, self._error) if read is None else read(value, where)
