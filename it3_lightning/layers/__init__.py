"""Networks that train while they run: sequence layers whose state is a small network."""

from it3_lightning.layers.inner_loop import TTTState
from it3_lightning.layers.ttt import TTTMLP, TTTLinear

__all__ = ["TTTMLP", "TTTLinear", "TTTState"]
