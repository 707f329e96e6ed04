"""Classes of converted models: like a library's own and under its name, made when they are needed."""

from collections.abc import Callable
from typing import Any


def subclass(kind: Any, make: Callable[[Any], type], attributes: dict[str, Any], *mixins: type) -> type:
    """A subclass of `kind` under its name. Its objects are copied and pickled although nobody can import it.

    Args:
        make: gives this very class for `kind`; a cached function of a module.
        attributes: of the new class, among them `__module__` and `__qualname__` if they are to differ.
        mixins: stand before `kind` among its bases.

    Returns:
        The class, whose attribute `softmax_class` is `kind`.
    """
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    own = {"softmax_class": kind, "made_by": staticmethod(make), "__reduce_ex__": _reduced}
    return type(attributes.get("__qualname__", kind.__name__), (*mixins, kind), names | own | attributes)


def softmax_class(made: type) -> type:
    """The library's own class that `made` stands for."""
    return getattr(made, "softmax_class", made)


def _reduced(each: Any, protocol: int) -> tuple[Any, ...]:
    made = type(each)
    return _unfilled, (made.made_by, made.softmax_class), *object.__reduce_ex__(each, max(protocol, 2))[2:]


def _unfilled(make: Callable[[type], type], kind: type) -> Any:
    """An object of the class made of `kind` before its state is restored."""
    return object.__new__(make(kind))
