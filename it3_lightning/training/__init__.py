"""Learning to use a prior: jointly with the network, or post-hoc on a frozen one.

``mixin`` is what users mix into their module, ``dual_pass`` the loss and its settings, ``noise``
what perturbs inputs, ``post_hoc`` the frozen network, its source checkpoint and what prepares
fitting. ``auxiliary`` is a mixin of its own: a head that test-time training steps on.
"""

from it3_lightning.training.auxiliary import AuxiliaryMixin
from it3_lightning.training.dual_pass import DualPass
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.training.noise import RandomNoise

__all__ = ["AuxiliaryMixin", "DualPass", "IT3Mixin", "RandomNoise"]
