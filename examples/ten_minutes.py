"""Ten minutes on your own module: subclass it, fit the conditioning, compare, decide."""

# %% [markdown]
# # Ten minutes on your own module
#
# You have a LightningModule, trained, and test data that are not like the training data. Does a
# second prediction help? Here is the whole way, from the module to the verdict, on the digits of
# scikit-learn. Nothing is downloaded.
#
# This page is `examples/ten_minutes.py`, and what it printed: `python docs/run_examples.py` writes
# both.

# %%
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    IT3Mixin,
    IT3TestTimeCallback,
    RandomNoise,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*number of training batches.*")
SEEDS, EPOCHS = 4, 8

# %% [markdown]
# ## The module you have
#
# Nothing in it knows of this library.


# %%
class LitDigits(LightningModule):
    """Ten classes of images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the accuracy in percent."""
        hits = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("acc", 100 * hits, add_dataloader_idx=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> Any:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


# %% [markdown]
# ## The data you have, and those you meet
#
# Of 1,797 images a thousand are for training. The others are tested as they are, with noise,
# blurred, and with little contrast.


# %%
def loaders(seed: int) -> tuple[DataLoader[Any], dict[str, DataLoader[Any]]]:
    """Return a loader to train on, and those to test on by name."""
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(digits.target)[order]
    test = images[1000:]
    shifts = {
        "clean": test,
        "noise": test + 0.4 * torch.randn_like(test),
        "blur": F.avg_pool2d(test, 3, stride=1, padding=1),
        "contrast": 0.25 * test + 0.4,
    }
    train = DataLoader(TensorDataset(images[:1000], labels[:1000]), 50, shuffle=True)
    tests = {n: DataLoader(TensorDataset(x, labels[1000:]), 100) for n, x in shifts.items()}
    return train, tests


# %% [markdown]
# ## Two lines more
#
# The subclass predicts with a prior: its own first prediction. A prior of classes enters after the
# first dense layer. `suggest_layers(module, batch)` lists the layers; [your own
# module](own_module.md) says which to take. The conditioning is trained as it will be used: on
# noisy images, and with the statistics of the batch.


# %%
class IT3Digits(IT3Mixin, LitDigits):
    """The same module, which can take a prior."""


def with_prior(checkpoint: str) -> IT3Digits:
    """Return the module around a frozen network; only the conditioning will learn."""
    return IT3Digits(
        prior=ClassPrior(10),
        conditioning=FeatureInjection("net.7"),
        dual_pass=DualPass(own_share=0.5, perturb_inputs=RandomNoise(), norm_stats="batch"),
        source_checkpoint=checkpoint,
    )


# %% [markdown]
# ## What has to stand beside it
#
# The second prediction runs with the statistics of the test batch, and its conditioning saw noisy
# images. So two other rows could take its credit: the *batch statistics* alone, and a network that
# saw *the same noise*, trained for as many epochs as network and conditioning together. A table
# without them proves nothing.


# %%
class NoisyDigits(LitDigits):
    """The control: half of the images it learns from have the noise that the conditioning sees."""

    noise = RandomNoise()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        half = torch.rand(len(images)) < 0.5
        images = torch.where(half[:, None, None, None], self.noise(images), images)
        return super().training_step([images, labels], batch_idx)


def trainer(**args: Any) -> Trainer:
    """Return a Trainer that says nothing."""
    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    off: dict[str, Any] = dict.fromkeys(names, False)
    return Trainer(**off, accelerator="cpu", **args)


def tested(model: LightningModule, tests: dict[str, DataLoader[Any]], **settings: Any) -> Tensor:
    """Return the accuracy on each loader; settings: of the callback, none: no callback."""
    callbacks: Any = [IT3TestTimeCallback(steps=0, **settings)] if settings else []
    found = trainer(callbacks=callbacks).test(model, [*tests.values()], verbose=False)
    return torch.tensor([scores[f"acc/dataloader_idx_{i}"] for i, scores in enumerate(found)])


def one_seed(seed: int) -> dict[str, Tensor]:
    """Train all three, and return the accuracies of every row."""
    seed_everything(seed, verbose=False)
    train, tests = loaders(seed)
    plain, control = LitDigits(), NoisyDigits()
    fitting = trainer(max_epochs=EPOCHS)
    fitting.fit(plain, train)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "plain.ckpt")
        fitting.save_checkpoint(checkpoint)
        model = with_prior(checkpoint)
        trainer(max_epochs=EPOCHS // 2 or 1).fit(model, train)
    trainer(max_epochs=EPOCHS + (EPOCHS // 2 or 1)).fit(control, train)
    for name, weights in plain.state_dict().items():
        if not torch.equal(weights, model.state_dict()[name]):  # post-hoc moves none
            raise AssertionError(f"{name} has changed")
    same = {"norm_stats": "batch", "measure": False}
    mixed = type("Control", (IT3Mixin, NoisyDigits), {})(
        prior=ClassPrior(10), conditioning=FeatureInjection("net.7")
    )
    mixed.load_state_dict(control.state_dict())
    return {
        "source": tested(plain, tests),
        "batch statistics": tested(model, tests, **same),
        "second prediction": tested(model, tests, prediction="second", **same),
        "control: source": tested(control, tests),
        "control: batch statistics": tested(mixed, tests, **same),
    }


# %%
runs = [one_seed(seed) for seed in range(SEEDS)]
rows = {name: torch.stack([run[name] for run in runs]) for name in runs[0]}  # (seeds, tests)
print(f"{'accuracy, %':26s}" + "".join(f"{n:>10s}" for n in ("clean", "noise", "blur", "contrast")))
for name, scores in rows.items():
    print(f"{name:26s}" + "".join(f"{value:10.1f}" for value in scores.mean(0)))

# %% [markdown]
# ## The verdict
#
# Gains are paired, seed by seed, with an interval of 95 % over the seeds (Student's t). Only an
# interval that leaves out 0 says anything.

# %%
T95 = {1: math.inf, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # by the number of seeds


def gain(over: str) -> tuple[float, float]:
    """Return the mean gain of the second prediction over the shifts, and half its interval."""
    gains = (rows["second prediction"] - rows[over])[:, 1:].mean(1)
    spread = gains.std().item() if len(gains) > 1 else 0.0
    return gains.mean().item(), T95[len(gains)] * spread / math.sqrt(len(gains))


for other in ("source", "batch statistics", "control: batch statistics"):
    mean, half = gain(other)
    sure = "gains" if mean > half else "loses" if mean < -half else "is level"
    print(f"against {other:26s} {mean:+5.1f} +- {half:4.1f} points under shift: {sure}")

# %% [markdown]
# So on these data nearly all that is gained comes from the batch statistics, which need no
# conditioning and no second pass: take `norm_stats="batch"` and leave it at that. A gain over the
# source alone would have hidden it. On other data the verdict is another one:
# [results](results.md) has rows where the second prediction gains, and where it does not.
