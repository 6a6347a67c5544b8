"""Small networks with named layers, for the examples, the tests and the benchmark."""

from it3_lightning.networks.cnn import SmallCNN
from it3_lightning.networks.mlp import MLP

__all__ = ["MLP", "SmallCNN"]
