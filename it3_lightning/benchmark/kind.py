"""What kind of model is compared: what it predicts, and whether it has batch statistics."""

from __future__ import annotations

from dataclasses import dataclass

from it3_lightning.engine.restore import batch_norms
from it3_lightning.methods.terms import Distance, DistanceName
from it3_lightning.priors import ClassPrior, MaskPrior, ValuePrior
from it3_lightning.training.mixin import IT3Mixin


@dataclass(frozen=True)
class Kind:
    """What the rows of a model depend on.

    Args:
        classes: whether it predicts distributions over classes; entropy and balance need them.
        batch_norm: whether it has BatchNorm layers; else there are no batch statistics.
        balanced: whether the classes may be about equally frequent, as balance needs them; those of
            pixels are not.
        values: whether it predicts values or binary masks of one channel, which distances of
            probabilities cannot compare.
    """

    classes: bool
    batch_norm: bool
    balanced: bool = True
    values: bool = False

    @classmethod
    def of(cls, model: IT3Mixin) -> Kind:
        """Return the kind of a model."""
        prior = model.it3_prior
        maps = isinstance(prior, MaskPrior) and prior.channels > 1
        return cls(
            classes=isinstance(prior, ClassPrior) or maps,
            batch_norm=bool(batch_norms(model)),
            balanced=not maps,
            values=isinstance(prior, ValuePrior) or (isinstance(prior, MaskPrior) and not maps),
        )

    def check(self, distance: DistanceName | Distance) -> None:
        """Refuse a distance that this kind of prediction has not.

        Raises:
            ValueError: it compares probabilities, and the model predicts values.
        """
        if self.values and distance not in ("l1", "l2"):
            raise ValueError(
                f"Expected recipe.distance l1 or l2 for a model of values, got {distance!r}, which "
                "compares probabilities. Set benchmark.recipe.distance to one of the two; for "
                "binary masks, num_classes of MaskPrior to 2 does as well."
            )
