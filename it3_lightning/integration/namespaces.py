"""Both namespaces of Lightning: `lightning.pytorch` and `pytorch_lightning` share no class.

A Trainer takes modules and callbacks of its own namespace alone, so the mixins derive from neither
``LightningModule``, and the callbacks from both ``Callback``.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import lightning.pytorch
import pytorch_lightning


def both(name: str) -> tuple[type, ...]:
    """Return a class of Lightning, as each of its namespaces has it.

    >>> [kind.__module__ for kind in both("callbacks.ModelPruning")]
    ['lightning.pytorch.callbacks.pruning', 'pytorch_lightning.callbacks.pruning']
    """
    find = attrgetter(name)
    return find(lightning.pytorch), find(pytorch_lightning)


MODULES = both("LightningModule")
NO_FORWARDS = tuple(module.forward for module in MODULES)  # type: ignore[attr-defined]
NO_TRAINING_STEPS = tuple(module.training_step for module in MODULES)  # type: ignore[attr-defined]
ONE_LINE = (
    "write `from lightning import pytorch as pl` in place of `import pytorch_lightning as pl`."
)
HOOKS = (
    "it3_inputs",
    "it3_target",
    "it3_with_inputs",
    "it3_sample_dims",
    "it3_valid",
    "it3_forward",
    "it3_outputs",
)  # what a module may say of its batches and outputs


if TYPE_CHECKING:
    AnyCallback = lightning.pytorch.Callback
    AnyPredictionWriter = lightning.pytorch.callbacks.BasePredictionWriter
    _Mixed = lightning.pytorch.LightningModule
else:
    _Mixed = object

    class AnyCallback(*both("Callback")):
        """A callback for the Trainer of either namespace."""

    class AnyPredictionWriter(*both("callbacks.BasePredictionWriter")):
        """A prediction writer for the Trainer of either namespace."""


class ModuleMixin(_Mixed):
    """Base of what is mixed into a LightningModule, of either namespace.

    A subclass of a mixin alone is a LightningModule of ``lightning.pytorch``. What a base says of
    its batches and outputs, by :data:`HOOKS`, goes before the defaults of a mixin, in any order.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make a LightningModule of it; refuse two namespaces in one class.

        Raises:
            TypeError: it derives from both.
        """
        super().__init_subclass__(**kwargs)
        kinds = [kind for kind in MODULES if issubclass(cls, kind)]
        if len(kinds) > 1:
            raise TypeError(
                f"Expected {cls.__name__} to derive from one LightningModule, got that of "
                f"lightning.pytorch and that of pytorch_lightning: {ONE_LINE}"
            )
        if not kinds and not cls.__module__.startswith("it3_lightning."):
            bases = list(cls.__bases__)
            last = max(i for i, base in enumerate(bases) if issubclass(base, ModuleMixin))
            cls.__bases__ = (*bases[: last + 1], MODULES[0], *bases[last + 1 :])
        for name in HOOKS:
            owners = [base for base in cls.__mro__ if name in vars(base)]
            if len(owners) > 1 and owners[0].__module__.startswith("it3_lightning.integration"):
                setattr(cls, name, vars(owners[1])[name])
