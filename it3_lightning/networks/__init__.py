"""Small networks with named layers, for the examples, the tests and the benchmark."""

from it3_lightning.networks.cnn import SmallCNN
from it3_lightning.networks.graph import GraphNet
from it3_lightning.networks.mlp import MLP
from it3_lightning.networks.rescaled import Rescaled

__all__ = ["MLP", "GraphNet", "Rescaled", "SmallCNN"]
