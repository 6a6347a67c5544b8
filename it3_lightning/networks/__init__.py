"""Networks with named layers: small ones, and those of torchvision and timm by name."""

from it3_lightning.networks.cnn import SmallCNN
from it3_lightning.networks.graph import GraphNet
from it3_lightning.networks.mlp import MLP
from it3_lightning.networks.rescaled import Rescaled
from it3_lightning.networks.timm_network import TimmNetwork
from it3_lightning.networks.torchvision_network import TorchvisionNetwork

__all__ = ["MLP", "GraphNet", "Rescaled", "SmallCNN", "TimmNetwork", "TorchvisionNetwork"]
