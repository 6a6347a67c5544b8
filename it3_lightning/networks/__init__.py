"""Networks with named layers: small ones, and those of torchvision and timm by name."""

from it3_lightning.networks.cnn import SmallCNN
from it3_lightning.networks.mlp import MLP
from it3_lightning.networks.timm_network import TimmNetwork
from it3_lightning.networks.torchvision_network import TorchvisionNetwork

__all__ = ["MLP", "SmallCNN", "TimmNetwork", "TorchvisionNetwork"]
