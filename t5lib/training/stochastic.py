"""What a model drops at random in training, drawn for the whole batch where several processes share it."""

from collections.abc import Callable, Iterator

from torch import Tensor, nn

from t5lib.utils.processes import Part


def share_draws(model: nn.Module, part: Part) -> list[nn.Module]:
    """Let stochastic depth and dropout drop of a part of a batch what they would drop of it within the whole batch.

    The random states of all processes must be the same. Returns the modules that were changed, for `undo`.
    """
    changed = list(_dropping(model)) if part.rows > 1 else []
    for module in changed:
        module.forward = _of_whole(module.forward, part, isinstance(module, nn.Dropout))
    return changed


def undo(changed: list[nn.Module]) -> None:
    for module in changed:
        del module.forward


def _dropping(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        rate = getattr(module, "drop_prob", 0) if type(module).__name__.endswith("DropPath") else 0
        if rate or (type(module) is nn.Dropout and module.p):
            yield module


def _of_whole(draw: Callable[[Tensor], Tensor], part: Part, elements: bool) -> Callable[[Tensor], Tensor]:
    """`elements`: single ones are dropped, not whole samples."""

    def forward(x: Tensor) -> Tensor:
        shape = x.shape[1:] if elements else [1] * (x.ndim - 1)
        return x * draw(x.new_ones(len(x) * part.rows, *shape))[part.row :: part.rows]

    return forward
