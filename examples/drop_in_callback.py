"""Take an ordinary checkpoint, teach only a conditioning, drop the callback on the Trainer.

The network stays bit for bit what it was; its clean accuracy cannot suffer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    IT3Mixin,
    IT3TestTimeCallback,
)
from it3_lightning.data import DigitsDataModule
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import Classifier


class IT3Net(IT3Mixin, Classifier):
    """The existing module, which can take a prior now."""


def main(max_epochs: int = 10) -> dict[str, float]:
    """Return the accuracy under noise of the checkpoint, as it is and adapted."""
    seed_everything(0, verbose=False)
    data = DigitsDataModule(shifts=("gaussian_noise",), severity=4)
    options: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "limit_val_batches": 0,
    }

    with tempfile.TemporaryDirectory() as folder:
        # An ordinary training, somewhere, some time ago
        plain = Classifier(SmallCNN(1, 10, 8))
        trainer = Trainer(max_epochs=max_epochs, enable_checkpointing=False, **options)
        trainer.fit(plain, datamodule=data)
        checkpoint = str(Path(folder) / "plain.ckpt")
        trainer.save_checkpoint(checkpoint)

        # Today: the conditioning learns on the frozen network
        model = IT3Net(
            SmallCNN(1, 10, 8),
            prior=ClassPrior(10),
            conditioning=FeatureInjection("network.dense1"),
            source_checkpoint=checkpoint,
        )
        trainer = Trainer(max_epochs=max_epochs // 2 or 1, enable_checkpointing=False, **options)
        trainer.fit(model, datamodule=data)

    for name, weights in plain.state_dict().items():
        if not torch.equal(weights, model.state_dict()[name]):
            raise AssertionError(f"{name} has changed")

    adapt = IT3TestTimeCallback(norm_stats="batch", reset="never", anchor="ema")
    runs: dict[str, list[Callback]] = {"source": [], "adapted": [adapt]}
    scores: dict[str, float] = {}
    for name, callbacks in runs.items():
        trainer = Trainer(callbacks=callbacks, enable_checkpointing=False, **options)
        clean, noisy = trainer.test(model, datamodule=data, verbose=False)
        scores[f"{name} clean"] = clean["test_acc/dataloader_idx_0"]
        scores[f"{name} noise"] = noisy["test_acc/dataloader_idx_1"]
    print(adapt.summary)
    return scores


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16s} {accuracy:.3f}")
