"""Configuration as data: frozen dataclasses to canonical JSON and back, with every number that is not an integer as text.

- `encode`: a dataclass, or plain data, to JSON values; floats become decimal strings, because nothing signed holds a float
- `decode`: back again, strictly: an unknown, missing or mistyped field is an error that names it
- `decimal_string`: the shortest decimal that gives the same float64, without an exponent; `is_decimal`: its form
"""

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from records.errors import MalformedError

T = TypeVar("T")
DECIMAL = re.compile(r"-?[0-9]{1,40}(\.[0-9]{1,400})?")


def decimal_string(value: float) -> str:
    """Shortest decimal text whose float64 is `value`, never in exponent form; non-finite values raise ValueError."""
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value}")
    text = format(Decimal(repr(float(value))), "f")
    return "0.0" if text == "-0.0" else text


def is_decimal(value: object) -> bool:
    """Whether a foreign value is a decimal string, of a length that is no burden."""
    return isinstance(value, str) and DECIMAL.fullmatch(value) is not None


def encode(value: Any) -> Any:
    """JSON values of a dataclass instance or of plain data: floats as decimal strings, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float):
        return decimal_string(value)
    return value


def decode(cls: type[T], data: Any, *, where: str = "") -> T:
    """Instance of the dataclass `cls` from what `encode` gave.

    Raises:
        MalformedError: names the first field that is unknown, missing or of another type.
    """
    where = where or cls.__name__
    if not isinstance(data, Mapping):
        raise MalformedError(f"{where}: expected an object, found {type(data).__name__}")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise MalformedError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    values = {name: _decode_value(hints[name], item, where=f"{where}.{name}") for name, item in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise MalformedError(f"{where}: {error}") from error


def _decode_value(hint: Any, value: Any, *, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (arg for arg in args if arg is not type(None))
        return _decode_value(hint, value, where=where)
    if dataclasses.is_dataclass(hint):
        return decode(hint, value, where=where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_decode_value(args[0], item, where=where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            number = float(Decimal(value))
        except ArithmeticError:
            number = math.nan
        if not math.isfinite(number):  # Decimal reads NaN and 1e999 too, and no number of ours is such
            raise MalformedError(f"{where}: expected a decimal string, found {value[:60]!a}")
        return number
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return dict(value)
    if hint is Any or (isinstance(hint, type) and type(value) is hint) or (origin is not None and value in args):
        return value
    raise MalformedError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
