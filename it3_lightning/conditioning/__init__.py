"""How a prior enters a network, by hooks on its named layers: the network itself is not changed.

`FeatureInjection` adds an embedded prior to the output of a layer, `InputConcat` widens the input
of a layer, `ForwardArgument` hands the prior to a forward that takes one.
"""

from it3_lightning.conditioning.conditioning import Conditioning, Shown
from it3_lightning.conditioning.feature_injection import FeatureInjection, Mode
from it3_lightning.conditioning.forward_argument import ForwardArgument
from it3_lightning.conditioning.input_concat import InputConcat

__all__ = ["Conditioning", "FeatureInjection", "ForwardArgument", "InputConcat", "Mode", "Shown"]
