"""Strict configuration: frozen dataclasses built from plain dictionaries, where a typing slip is an error."""

import dataclasses
import difflib
import types
import typing
from typing import Any, TypeVar

from t5lib.utils.errors import T5Error

T = TypeVar("T")


def from_dict(cls: type[T], data: dict[str, Any] | None, where: str) -> T:
    """Build the dataclass `cls` from `data`.

    Nested dataclasses and lists (for tuple fields) are converted; `where` names the origin in messages,
    e.g. "params.yaml: targets.dinov2-fashion.convert".

    Raises:
        T5Error: unknown key (names the nearest), missing key, or a value of the wrong type.
    """
    if not isinstance(data, dict | None):
        raise T5Error(f"{where} must be a mapping of settings, got {data!r}")
    data = data or {}
    if expand := getattr(cls, "expand", None):  # shorthands of the class, such as TTTConfig's presets
        data = expand(data)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(fields)}"
            raise T5Error(f"{where}: unknown setting '{key}'; {hint}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise T5Error(f"{where}: missing {', '.join(missing)}; add it to this section")
    return cls(**values)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as JSON-ready plain values (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def one_of(value: Any, allowed: typing.Iterable[Any], what: str) -> None:
    """Raise T5Error naming the nearest allowed value unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise T5Error(f"{what} '{value}' is unknown; expected one of {', '.join(map(str, allowed))}{hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return _convert_union(hint, value, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        one_of(value, args, where)
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = args[0] if len(args) == 2 and args[1] is Ellipsis else None
        if inner is None and len(args) != len(value):
            raise T5Error(f"{where}: expected {len(args)} values, got {value!r}")
        kinds = [inner] * len(value) if inner is not None else args
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict and isinstance(value, dict):  # keys are names; YAML reads some as numbers
        return {str(key): _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    expected = origin or hint
    if expected is Any or (isinstance(value, expected) and not (isinstance(value, bool) and expected is not bool)):
        return value
    raise T5Error(
        f"{where}: expected {getattr(expected, '__name__', hint)}, got {value!r}{_number_hint(expected, value)}"
    )


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    options = typing.get_args(hint)
    if value is None and type(None) in options:  # first: a missing section would otherwise mean its defaults
        return None
    problems: dict[bool, str] = {}  # the first of each; of an option of the value's own kind says more
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except T5Error as error:
                problems.setdefault(type(value) is (typing.get_origin(option) or option), str(error))
    raise T5Error(problems.get(True) or problems[False])


def _number_hint(expected: Any, value: Any) -> str:
    """YAML reads 1e-3 as text; the usual slip deserves its own remedy."""
    if expected in (int, float) and isinstance(value, str):
        return " (text, not a number; in YAML write 1.0e-3, with a dot)"
    return ""
