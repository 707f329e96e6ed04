"""Strict settings: frozen dataclasses that pydantic checks however they are made, where a typing slip is an error.

    @settings
    class TrainConfig:
        batch_size: AtLeastOne = 64
        lr: NotNegative = 2e-5

    TrainConfig(batch_size=0)                      # T5Error: batch_size is 0; expected 1 or more
    from_dict(TrainConfig, section, "params.yaml: targets.x.finetune")

What one value must be stands at the value. What several must be together stands in `__post_init__`, which raises
T5Error.
"""

import dataclasses
import difflib
import functools
import reprlib
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import core_schema

from t5lib.utils.errors import T5Error

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
AnySettings = TypeVar("AnySettings", bound="DataclassInstance")  # made by `settings`

LONGEST = 800  # characters of what is wrong with a setting
LARGEST = 2**31 - 1  # of whole numbers: more is a slip, and no seed of NumPy's
AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST)]
WholeNumber = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# Past these bounds lie slips of the keyboard: nothing that could run, or nothing that would learn.
BatchSize = Annotated[int, Field(ge=1, le=2**16)]
Pixels = Annotated[int, Field(ge=1, le=2**14)]  # side of an image
Workers = Annotated[int, Field(ge=0, le=1024)]  # processes or threads
Tokens = Annotated[int, Field(ge=1, le=2**16)]  # of a text
Repeats = Annotated[int, Field(ge=1, le=10_000)]
Rate = Annotated[float, Field(ge=0, le=1000)]  # of learning: how far a weight moves in a step; or of its decay
Weight = Annotated[float, Field(ge=0, le=1e6)]  # of a term of a loss
Several = Annotated[tuple[T, ...], Strict(False)]  # a list will do, as YAML writes it
Pair = Annotated[tuple[T, T], Strict(False)]
Triple = Annotated[tuple[T, T, T], Strict(False)]


_repr = reprlib.Repr()
_repr.maxdict = _repr.maxlist = _repr.maxtuple = 12
_repr.maxstring = _repr.maxother = 100


def shown(value: Any) -> str:
    """A value as messages show it: as Python writes it, but short, whatever came."""
    try:
        return _repr.repr(value)
    except ValueError:  # a number with more digits than Python writes
        return "a number of thousands of digits"


class SettingError(T5Error):
    """A value that does not fit its annotation; the message begins with the setting's name."""


_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)


class Choice:
    """For names that a table holds: Annotated[str, Choice(TABLE)] is one of them."""

    def __init__(self, allowed: Iterable[str]):
        self.allowed = list(allowed)

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.literal_schema(self.allowed)


_TYPES = {
    "int_type": "int",
    "float_type": "float",
    "string_type": "str",
    "bool_type": "bool",
    "tuple_type": "a list",
    "dict_type": "dict",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "{} or more"),
    "greater_than": ("gt", "more than {}"),
    "less_than_equal": ("le", "at most {}"),
    "less_than": ("lt", "less than {}"),
}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass whose values are checked against its annotations.

    Values are not converted: text is no number. A value that does not fit raises T5Error with what came, what was
    expected and, where something is near, what may be meant.
    """
    made = dataclass(cls, frozen=True, kw_only=True, config=_STRICT)
    check = made.__init__

    @functools.wraps(check)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            check(self, *args, **values)
        except ValidationError as error:
            raise SettingError(_sentence(made, values, error)) from None

    made.__init__ = init  # type: ignore[method-assign]  # wrapping it is the purpose
    return made  # type: ignore[return-value]  # pydantic tells its own type in the place of the class's


def from_dict(cls: type[AnySettings], data: dict[str, Any] | None, where: str) -> AnySettings:
    """Build the settings `cls` from `data`, nested settings from nested dictionaries.

    Args:
        where: names the origin in messages, such as "params.yaml: targets.dinov2-fashion.convert".

    Raises:
        T5Error: an unknown key (names the nearest), a missing key, or a value that does not fit.
    """
    if not isinstance(data, dict | None):
        raise T5Error(f"{where} must be a mapping of settings, got {shown(data)}")
    data = data or {}
    if expand := getattr(cls, "expand", None):  # shorthands of the class, such as TTTConfig's presets
        data = expand(data)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise T5Error(f"{where}: unknown setting '{_word(key)}'; {_nearest(_word(key), fields)}")
    missing = [name for name, field in fields.items() if name not in data and _required(field)]
    if missing:
        raise T5Error(f"{where}: missing {', '.join(missing)}; add it to this section")
    hints = _hints(cls)
    values = {key: _nested(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except T5Error as error:
        problem = str(error) if len(str(error)) <= LONGEST else f"{str(error)[:LONGEST]} …"
        raise T5Error(f"{where}{'.' if isinstance(error, SettingError) else ': '}{problem}") from None


def checked(config: AnySettings | None, cls: type[AnySettings]) -> AnySettings:
    """`config`, or the defaults of `cls` for None. Raises T5Error when it is anything else."""
    if config is None:
        return cls()
    if not isinstance(config, cls):
        raise T5Error(f"expected settings, a {cls.__name__}, or None for the defaults; got {config!r:.60}")
    return config


def with_named_keys(mapping: dict[Any, T], where: str) -> dict[str, T]:
    """`mapping` with its keys as text, for YAML reads some as numbers. Raises T5Error where two are then one."""
    named = {str(key): item for key, item in mapping.items()}
    if len(named) < len(mapping):
        twice = sorted(key for key in named if sum(str(other) == key for other in mapping) > 1)
        raise T5Error(f"{where}: {', '.join(twice)} is given twice, as a number and as text; drop one")
    return named


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as JSON-ready plain values (tuples become lists)."""
    return _plain(dataclasses.asdict(config))


def one_of(value: Any, allowed: Iterable[Any], what: str) -> None:
    """Raise T5Error naming the nearest allowed value unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        near = difflib.get_close_matches(_word(value), [str(a) for a in allowed], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise T5Error(f"{what} '{_word(value)}' is unknown; expected one of {', '.join(map(str, allowed))}{hint}")


def _word(value: Any) -> str:
    """A name as messages show it."""
    return value if isinstance(value, str) and len(value) <= 100 else shown(value)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _nested(hint: Any, value: Any, where: str) -> Any:
    """`value` with dictionaries made the settings that `hint` wants in their place, and lists made tuples."""
    options = (hint, *typing.get_args(hint))
    kinds = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
    tuples = [option for option in options if typing.get_origin(option) is tuple]
    if isinstance(value, list | tuple) and tuples:
        member = typing.get_args(tuples[0])[0]
        return tuple(_nested(member, item, where) for item in value)
    if kinds and value is None and hint is kinds[0]:
        raise T5Error(f"{where} is null; expected its settings, {{}} for the defaults")
    if kinds and (isinstance(value, dict) or hint is kinds[0]):
        return value if isinstance(value, kinds[0]) else from_dict(kinds[0], value, where)
    return with_named_keys(value, where) if isinstance(value, dict) else value


def _sentence(cls: type, values: dict[str, Any], error: ValidationError) -> str:
    """The problem in our words; of several, which a choice of types has, the one that came nearest to fitting."""
    problem = max(error.errors(), key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    name = _place(problem["loc"], values)
    kind, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if kind == "unexpected_keyword_argument":
        return f"unknown setting '{_word(name)}'; {_nearest(name, [field.name for field in dataclasses.fields(cls)])}"
    if kind == "unexpected_positional_argument":
        example = next(iter(cls.__annotations__))
        return f"got {shown(value)} without a name; settings are given by name, such as {example}=…"
    if kind == "missing":
        return f"missing {name}" if len(problem["loc"]) == 1 else f"{name}: expected more values, got {shown(value)}"
    if kind == "literal_error":
        return _unknown(name, value, context["expected"])
    if kind in _BOUNDS:
        key, phrase = _BOUNDS[kind]
        return f"{name} is {shown(value)}; expected {phrase.format(f'{context[key]:.10g}')}"
    if kind == "finite_number":
        return f"{name} is {shown(value)}; expected a finite number"
    expected = _TYPES.get(kind) or problem["msg"].removeprefix("Input should be ")
    return f"{name}: expected {expected}, got {shown(value)}{_number_hint(expected, value)}"


def _place(loc: tuple[int | str, ...], values: Any) -> str:
    """Where in `values` a problem is. Pydantic's path also names the types that it tried; those are left out."""
    parts = [loc[0]]
    values = values.get(loc[0]) if isinstance(values, dict) else None
    for part in loc[1:]:
        if isinstance(values, dict) and part in values:
            parts.append(part)
            values = values[part]
        elif isinstance(part, int) and isinstance(values, list | tuple):
            parts.append(part)
            values = values[part] if part < len(values) else None
    return ".".join(map(str, parts))


def _unknown(name: str, value: Any, expected: str) -> str:
    allowed = [word.strip(" '") for part in expected.split(" or ") for word in part.split(",")]
    near = difflib.get_close_matches(_word(value), allowed, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"{name} '{_word(value)}' is unknown; expected one of {', '.join(allowed)}{hint}"


def _number_hint(expected: str, value: Any) -> str:
    """YAML reads 1e-3 as text; the usual slip deserves its own remedy."""
    if expected in ("int", "float") and isinstance(value, str):
        return " (text, not a number; in YAML write 1.0e-3, with a dot)"
    return ""
