"""`linear_attention`: attention by feature maps in place of the softmax. Arguments are checked first.

"reference" is the only implementation: the sums over tokens are large matrix products, which PyTorch does well.
"""

from torch import Tensor

from t5kernels.choice import choose
from t5kernels.linear_attention import reference


def linear_attention(q_features: Tensor, k_features: Tensor, v: Tensor, *, impl: str | None = None) -> Tensor:
    """The mean of the values, weighted by the products of query and key features.

    Args:
        q_features: (B, H, M, F) features of the queries, not negative; M may differ from N.
        k_features: (B, H, N, F) features of the keys, not negative.
        v: (B, H, N, D) values.
        impl: "reference", or None for the same.

    Returns:
        (B, H, M, D) in v's dtype; sums are taken in at least float32, under autocast too.

    Raises:
        ValueError: shapes that do not fit, or another `impl`.

    Source: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention" (arXiv 2006.16236),
    section 3.2, without the causal mask.
    """
    shapes = q_features.shape, k_features.shape, v.shape
    fits = all(len(shape) == 4 for shape in shapes)
    fits = fits and shapes[0][:2] == shapes[1][:2] == shapes[2][:2]
    if not fits or shapes[0][3] != shapes[1][3] or shapes[1][2] != shapes[2][2]:
        raise ValueError(
            f"linear_attention: q_features {tuple(shapes[0])}, k_features {tuple(shapes[1])}, v {tuple(shapes[2])} "
            "disagree; expected (B, H, M, F), (B, H, N, F) and (B, H, N, D)"
        )
    choose("linear_attention", impl)
    return reference.linear_attention(q_features, k_features, v)
