"""Where the tokens of an image lie: prefix tokens first, then the patches of a rows × columns grid."""

from torch import Tensor, nn

from t5lib.errors import T5Error


class TokenGrid:
    """The token layout that all converted layers of one model share.

    Registered as a pre-hook of a timm patch embedding, it reads the grid off every input image, so a model with
    `dynamic_img_size` or a changed input size needs nothing more.
    """

    def __init__(self, rows: int, columns: int, num_prefix_tokens: int = 0):
        self.rows, self.columns, self.num_prefix_tokens = rows, columns, num_prefix_tokens

    def __call__(self, patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows, self.columns = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])

    def check(self, num_tokens: int) -> None:
        """Raises T5Error when `num_tokens` tokens cannot be this grid with its prefix."""
        held = self.rows * self.columns
        if num_tokens != held + self.num_prefix_tokens:
            raise T5Error(
                f"grid {self.rows}×{self.columns} holds {held} tokens and num_prefix_tokens is "
                f"{self.num_prefix_tokens}, got {num_tokens} tokens; pass num_prefix_tokens for class and register "
                "tokens, and turn token dropping and merging off"
            )
