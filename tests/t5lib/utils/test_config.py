"""Settings are read strictly: a typing slip is an error that names the place, what came and the remedy."""

from dataclasses import field
from typing import Any, Literal

import pytest
import yaml

from t5lib.utils.config import AtLeastOne, NotNegative, Several, from_dict, one_of, settings, to_dict
from t5lib.utils.errors import T5Error


@settings
class Inner:
    depth: int = 1
    names: tuple[str, ...] = ()


@settings
class Config:
    steps: int
    lr: float = 1e-3
    compile: bool = False
    mode: Literal["fast", "slow"] = "fast"
    size: int | tuple[int, int] = 98
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    ema: float | None = None
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    places: tuple[int, ...] | dict[str, str] | str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def read(text: str) -> Config:
    return from_dict(Config, yaml.safe_load(text), "params.yaml: targets.x.train")


def test_values_defaults_and_nesting_arrive_as_declared():
    config = read("{steps: 3, lr: 1, size: [98, 112], mean: [0, 1, 0.5], inner: {names: [a, b]}, extra: {k: [1]}}")
    assert config == Config(
        steps=3, lr=1.0, size=(98, 112), mean=(0.0, 1.0, 0.5), inner=Inner(names=("a", "b")), extra={"k": [1]}
    )
    assert [type(config.lr), *map(type, config.mean)] == [float] * 4


def test_an_optional_section_may_be_null_or_given():
    assert read("{steps: 1, maybe: null}").maybe is None
    assert read("{steps: 1, maybe: {depth: 4}}").maybe == Inner(depth=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{stepz: 1}", "targets.x.train: unknown setting 'stepz'; did you mean 'steps'"),
        ("{zzzzzz: 1}", "unknown setting 'zzzzzz'; known: steps, lr, compile"),
        ("{1: 1}", "unknown setting '1'"),
        ("{lr: 0.1}", "targets.x.train: missing steps; add it"),
        ("{steps: 1.0}", r"train\.steps: expected int, got 1\.0"),
        ("{steps: true}", "steps: expected int, got True"),
        ("{steps: null}", "steps: expected int, got None"),
        ("{steps: 1, lr: true}", "lr: expected float, got True"),
        ("{steps: 1, lr: 1e-3}", "lr: expected float, got '1e-3' .*in YAML write 1.0e-3"),
        ("{steps: 1, ema: 1e-3}", "ema: expected float, got '1e-3' .*in YAML write 1.0e-3"),
        ("{steps: 1, compile: 1}", "compile: expected bool, got 1"),
        ("{steps: 1, mode: fats}", "mode 'fats' is unknown; expected one of fast, slow; did you mean 'fast'"),
        ("{steps: 1, size: large}", "size: expected int, got 'large'"),
        ("{steps: 1, size: [1, 2, 3]}", r"size: .*at most 2 .*\(1, 2, 3\)"),
        ("{steps: 1, mean: [0, 1]}", r"mean.*: expected more values, got \(0, 1\)"),
        ("{steps: 1, mean: [0, 1, x]}", "mean.2: expected float, got 'x'"),
        ("{steps: 1, inner: {depht: 2}}", "train.inner: unknown setting 'depht'; did you mean 'depth'"),
        ("{steps: 1, inner: {names: a}}", "inner.names: expected a list, got 'a'"),
        ("{steps: 1, inner: 3}", "train.inner must be a mapping of settings, got 3"),
        ("{steps: 1, maybe: {depht: 2}}", "train.maybe: unknown setting 'depht'"),
        ("{steps: 1, places: {a: null}}", "places.a: expected str, got None"),
        ("{steps: 1, places: [x]}", "places.0: expected int, got 'x'"),
        ("[1]", r"targets.x.train must be a mapping of settings, got \[1\]"),
    ],
)
def test_a_slip_is_an_error_that_says_where_and_what(text, message):
    with pytest.raises(T5Error, match=message):
        read(text)


def test_an_empty_section_means_defaults():
    assert from_dict(Inner, None, "here") == from_dict(Inner, {}, "here") == Inner()


def test_to_dict_is_plain_and_reads_back():
    config = Config(steps=1, size=(2, 3), inner=Inner(names=("a",)))
    plain = to_dict(config)
    assert plain["size"] == [2, 3] and plain["inner"] == {"depth": 1, "names": ["a"]}
    assert from_dict(Config, yaml.safe_load(yaml.safe_dump(plain)), "copy") == config


def test_one_of_names_the_nearest():
    one_of("a", ("a", "b"), "letter")
    with pytest.raises(T5Error, match="letter 'alpa' is unknown; expected one of alpha, beta; did you mean 'alpha'"):
        one_of("alpa", ("alpha", "beta"), "letter")


@settings
class Bounded:
    count: AtLeastOne = 1
    rate: NotNegative = 0.1
    sides: Several[AtLeastOne] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 0}, "count is 0; expected 1 or more"),
        ({"count": "2"}, "count: expected int, got '2'"),
        ({"rate": float("nan")}, "rate is nan; expected a finite number"),
        ({"rate": float("inf")}, "rate is inf; expected a finite number"),
        ({"rate": -0.5}, "rate is -0.5; expected 0 or more"),
        ({"sides": [3, 0]}, "sides.1 is 0; expected 1 or more"),
        ({"rates": 1.0}, "unknown setting 'rates'; did you mean 'rate'"),
    ],
)
def test_values_are_checked_also_where_settings_are_made_in_python(values, message):
    with pytest.raises(T5Error, match=message):
        Bounded(**values)
