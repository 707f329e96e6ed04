"""Which mixer a setting stands for."""

from t5kernels import INNER_WEIGHTS

from t5lib.layers.baselines import BASELINE_MIXERS
from t5lib.layers.config import TTTConfig
from t5lib.layers.mixers import Mixer
from t5lib.layers.ttt_mixer import TTTMixer


def make_mixer(num_heads: int, head_dim: int, config: TTTConfig, layers: int = 1) -> Mixer:
    """The mixer that `config.inner` names, with new weights, for `layers` layers of `num_heads` heads each."""
    kind = TTTMixer if config.inner in INNER_WEIGHTS else BASELINE_MIXERS[config.inner]
    return kind(num_heads, head_dim, config, layers)
