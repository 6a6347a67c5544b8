r"""EM of class frequencies: predictions adjusted to how often each class is there; no weight moves.

:math:`\pi \leftarrow \frac1B \sum_b z_b`, :math:`z_b \propto p_b \circ \pi / \pi^{(0)}`, again and
again from the frequencies :math:`\pi^{(0)}` of training (Saerens, Latinne and Decaestecker,
Adjusting the Outputs of a Classifier to New a Priori Probabilities, Neural Computation 2002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.tent import Entropy
from it3_lightning.methods.terms import check_classes
from it3_lightning.priors.classes import adjusted, unrounded


@dataclass(frozen=True)
class LabelShiftEM(TestTimeMethod):
    r"""Maximum-likelihood class frequencies of a batch, by EM (Saerens et al., 2002).

    For batches in which some classes are more frequent than in training. Where all are as frequent,
    it takes the errors of the network for frequencies, and harms: shrink it. What is logged is the
    entropy of the network's own prediction. It needs no prior: any LightningModule will do.

    Args:
        source: frequencies :math:`\pi^{(0)}` of the classes in training, of any scale; default: all
            the same.
        shrinkage: share :math:`\lambda` in [0, 1] by which the frequencies found are drawn to those
            of training, at the end: :math:`(1 - \lambda) \pi + \lambda \pi^{(0)}`.
        iterations: the most of them; it ends where no frequency changes by more than 1e-6.

    Raises:
        ValueError: a frequency or the number of iterations is not positive, or the shrinkage
            outside [0, 1]; when evaluated, predictions without classes, maps, or of another number
            of classes.

    >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    >>> LabelShiftEM(iterations=1).adjusted(p)[3]  # frequencies 0.7 and 0.3
    tensor([0.6087, 0.3913])
    """

    source: Sequence[float] | None = None
    shrinkage: float = 0.0
    iterations: int = 100
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __post_init__(self) -> None:
        if self.source is not None and not (self.source and min(self.source) > 0):
            raise ValueError(f"Expected positive frequencies as source, got {self.source}.")
        if not 0 <= self.shrinkage <= 1:
            raise ValueError(f"Expected shrinkage in [0, 1], got {self.shrinkage}.")
        if self.iterations < 1:
            raise ValueError(f"Expected iterations >= 1, got {self.iterations}.")

    @property
    def needs_batch(self) -> bool:
        """A sample alone has no frequencies."""
        return True

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the network's prediction."""
        check_classes("LabelShiftEM", passes.y0, maps=False)
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        """Return the adjusted predictions of the whole batch."""
        return self.adjusted(unrounded(passes.y0))

    def adjusted(self, p: Tensor) -> Tensor:
        """Return predictions ``(B, C)`` adjusted to the frequencies that EM finds in them."""
        equal = p.new_full((p.shape[1],), 1 / p.shape[1])
        source = equal if self.source is None else p.new_tensor(self.source)
        if len(source) != p.shape[1]:
            raise ValueError(
                f"Expected frequencies of {p.shape[1]} classes as source, got {len(source)}."
            )
        source = source / source.sum()
        found, before = source, torch.zeros_like(source)
        for _ in range(self.iterations):
            if (found - before).abs().max() <= 1e-6:
                break
            found, before = adjusted(p, found / source).mean(0), found
        found = torch.lerp(found, source, self.shrinkage)
        return adjusted(p, found / source)
