"""Networks with named layers: small ones, and those of torchvision and timm by name."""

from it3_lightning.networks.cnn import SmallCNN
from it3_lightning.networks.graph import GraphNet
from it3_lightning.networks.mlp import MLP, Rescaled
from it3_lightning.networks.vision import TimmNetwork, TorchvisionNetwork

__all__ = ["MLP", "GraphNet", "Rescaled", "SmallCNN", "TimmNetwork", "TorchvisionNetwork"]
