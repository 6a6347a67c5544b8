"""A test-time method of one's own, beside batch statistics, on a module that knows of neither."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning.pytorch import Trainer, seed_everything

from it3_lightning import TestTimeCallback, TestTimeMethod
from it3_lightning.data import DigitsDataModule
from it3_lightning.methods import Objective, Passes
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import Classifier


@dataclass(frozen=True)
class PseudoLabels(TestTimeMethod):
    """Minimises -log p of the likeliest class (Lee, 2013), where that is likelier than a limit."""

    limit: float = 0.8
    defaults: ClassVar[Mapping[str, Any]] = {
        **{"parameters": "norm", "norm_stats": "batch", "reset": "never"},
        **{"optimizer": "adam", "lr": 1e-3},
    }

    def loss(self, passes: Passes) -> Objective:
        """Evaluate it on one batch."""
        largest = passes.y0.amax(1)
        return Objective(measure=-largest.log(), reliable=largest > self.limit)


def main(max_epochs: int = 10) -> dict[str, float]:
    """Return the accuracy under noise of the source, with batch statistics, and adapted."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(shifts=("gaussian_noise",), severity=4)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    model = Classifier(SmallCNN(1, 10, 8))
    Trainer(max_epochs=max_epochs, limit_val_batches=0, **quiet).fit(model, datamodule=data)
    still, adapted = TestTimeCallback(PseudoLabels(), steps=0), TestTimeCallback(PseudoLabels())
    scores: dict[str, float] = {}
    for name, callbacks in {"source": [], "source, batch": [still], "adapted": [adapted]}.items():
        _, noisy = Trainer(callbacks=[*callbacks], **quiet).test(model, datamodule=data)
        scores[name] = noisy["test_acc/dataloader_idx_1"]
    return scores


if __name__ == "__main__":
    print(main())
