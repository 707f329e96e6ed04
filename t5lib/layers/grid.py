"""Where the tokens of an image lie: prefix tokens, then the patches of a rows × columns grid, then suffix tokens."""

from torch import Tensor, nn

from t5lib.utils.errors import T5Error


class TokenGrid:
    """The token layout that all converted layers of one model share.

    Registered as a pre-hook of a timm patch embedding, it reads the grid off every input image, so a model with
    `dynamic_img_size` or a changed input size needs nothing more.

    Args:
        rows, columns: of the grid.
        num_prefix_tokens: class and register tokens, before the grid's.
        num_suffix_tokens: text tokens, after the grid's. Like the prefix they have no place in the grid.
    """

    def __init__(self, rows: int, columns: int, num_prefix_tokens: int = 0, num_suffix_tokens: int = 0):
        self.rows, self.columns = rows, columns
        self.num_prefix_tokens, self.num_suffix_tokens = num_prefix_tokens, num_suffix_tokens

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows, self.columns = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])

    @property
    def patches(self) -> slice:
        """Which tokens lie on the grid."""
        return slice(self.num_prefix_tokens, self.num_prefix_tokens + self.rows * self.columns)

    def with_suffix(self, num_suffix_tokens: int) -> "TokenGrid":
        """This layout, as it is now, with so many tokens after it."""
        return TokenGrid(self.rows, self.columns, self.num_prefix_tokens, num_suffix_tokens)

    def check(self, num_tokens: int) -> None:
        """Raises T5Error when `num_tokens` tokens cannot be this grid with its prefix and suffix."""
        held = self.rows * self.columns
        if num_tokens != held + self.num_prefix_tokens + self.num_suffix_tokens:
            suffix = f", {self.num_suffix_tokens} text tokens come after them" if self.num_suffix_tokens else ""
            raise T5Error(
                f"grid {self.rows}×{self.columns} holds {held} tokens and num_prefix_tokens is "
                f"{self.num_prefix_tokens}{suffix}, got {num_tokens} tokens; pass num_prefix_tokens for class and "
                "register tokens, and turn token dropping and merging off"
            )
