r"""TTT: test-time training on an auxiliary task, as published the rotation of the image.

Training minimises :math:`\ell_m(x, y; \theta_m, \theta_e) + \ell_s(x; \theta_s, \theta_e)`; at test
time :math:`\min_{\theta_e} \ell_s(x; \theta_s, \theta_e)`, then the main head predicts (Sun et al.,
Test-Time Training with Self-Supervision for Generalization under Distribution Shifts, ICML 2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.methods.auxiliary import (
    HEAD,
    Auxiliary,
    Features,
    head_of,
    images_of,
    perceptron,
)
from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod


class Rotation(Auxiliary):
    """Tells by how much an image is turned: 0, 90, 180 or 270 degrees (Gidaris et al., ICLR 2018).

    The loss of a sample is the mean cross-entropy over its four turned copies, so nothing is drawn.

    Args:
        layer: name of the layer whose features the head sees, averaged over positions.
        channels: width of the layer's output.
        hidden: width of the head.

    Shapes:
        square images ``(B, C, H, H)``; features as in :meth:`~Auxiliary.pooled`.

    Raises:
        ValueError: the images are not square, or the features of another width.

    >>> head = Rotation("layer", channels=16)
    >>> for parameter in head.parameters():
    ...     _ = nn.init.zeros_(parameter)
    >>> head(torch.rand(2, 1, 4, 4), lambda views: views.flatten(1))  # ln 4: it knows nothing
    tensor([1.3863, 1.3863], grad_fn=<MeanBackward1>)
    """

    def __init__(self, layer: str, channels: int, hidden: int = 64) -> None:
        super().__init__(layer, channels)
        self.hidden = hidden
        self.head = perceptron(channels, hidden, 4)

    def forward(
        self, inputs: Any, features: Features, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean cross-entropy over the four copies, ``(B,)``."""
        images = images_of(self, inputs)
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"Rotation needs square images, got {tuple(images.shape)}. Crop them.")
        views = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
        logits = self.head(self.pooled(features(views)))
        turned = torch.arange(4, device=logits.device).repeat_interleave(len(images))
        return F.cross_entropy(logits, turned, reduction="none").view(4, -1).mean(0)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"layer": self.layer, "channels": self.channels, "hidden": self.hidden}


@dataclass
class TTT(TestTimeMethod):
    """Test-time training (Sun et al., ICML 2020): steps on the loss of the module's auxiliary head.

    The head itself stays as it was trained, which the paper finds to make no difference. Defaults
    are the paper's standard version: every sample by itself, ten steps from the source, SGD without
    momentum; it crops and mirrors the image at random besides. Its online version, for samples that
    come one at a time: ``scope="batch", reset="never", steps=1``.

    Args:
        seed: of the views that a task draws at test time; :class:`Rotation` draws none.

    Raises:
        ValueError: the module has no auxiliary head; see :class:`~it3_lightning.AuxiliaryMixin`.

    >>> TTT().defaults["steps"]
    10
    """

    seed: int = field(default=0, kw_only=True)
    taken: int = field(default=0, init=False)
    """Steps so far: each draws other views."""
    head: ClassVar[type[Auxiliary]] = Auxiliary  # type: ignore[type-abstract]
    """Kind of head that it steps on."""
    defaults: ClassVar[Mapping[str, Any]] = {
        "scope": "sample",
        "backend": "loop",
        "steps": 10,
        "optimizer": "sgd",
        "lr": 1e-3,
    }

    def check(self, module: nn.Module) -> None:
        """Refuse a module without such a head."""
        head_of(module, self.head, type(self).__name__)

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the auxiliary loss."""
        measure = self.auxiliary_loss(passes, passes.inputs)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))

    def auxiliary_loss(self, passes: Passes, inputs: Any) -> Tensor:
        """Return the loss of the auxiliary head on inputs, ``(B,)``."""
        head = passes.submodule(HEAD)
        assert isinstance(head, Auxiliary)
        generator = torch.Generator().manual_seed(self.seed + self.taken)
        loss: Tensor = head(inputs, partial(passes.features_of, head.layer), generator)
        return loss

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take one step; the next sees other views."""
        objective = super().step(passes, state)
        self.taken += 1
        return objective

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to it."""
        self.taken = state["taken"]
