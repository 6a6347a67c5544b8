"""What the distance tells: errors under shift, beside confidence; its calibration, and a gate."""

# %% [markdown]
# # What the distance tells
#
# The distance between a prediction and the second one, which was shown the first, needs no label.
# Is it large where the network errs? Here it is measured on the digits of scikit-learn, under noise
# and blur of growing size, beside the measure that every network has anyhow: how sure it is.
#
# This page is `examples/what_the_distance_tells.py`, and what it printed: `python
# docs/run_examples.py` writes both.

# %%
import logging
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from lightning.pytorch import Trainer, seed_everything
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from it3_lightning import ClassPrior, FeatureInjection, IT3Predictor, Settings
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import Classifier, IT3Classifier

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
warnings.filterwarnings("ignore", ".*number of training batches.*")
warnings.filterwarnings("ignore", ".*no `val_dataloader`.*")
SEEDS, EPOCHS = 4, 8
NOISE, BLUR = (0.1, 0.2, 0.3, 0.5), (1, 2, 3, 4)

# %% [markdown]
# ## A network, and a conditioning on it
#
# The network is trained as usual and then frozen; only the conditioning learns to use a prediction
# as prior.


# %%
def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return images `(1797, 1, 8, 8)` in [0, 1] and their labels, in random order."""
    found = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(seed))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(found.target)[order]


def trained(images: Tensor, labels: Tensor) -> IT3Classifier:
    """Return a frozen network with a conditioning, both trained on these."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    args: dict[str, Any] = {**dict.fromkeys(off, False), "accelerator": "cpu"}
    loader: Any = DataLoader(TensorDataset(images, labels), 50, shuffle=True)
    plain, fitting = Classifier(SmallCNN(1, 10, 8)), Trainer(max_epochs=EPOCHS, **args)
    fitting.fit(plain, loader)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(Path(folder) / "plain.ckpt")
        fitting.save_checkpoint(checkpoint)
        model = IT3Classifier(
            SmallCNN(1, 10, 8),
            prior=ClassPrior(10),
            conditioning=FeatureInjection("network.dense1"),
            source_checkpoint=checkpoint,
        )
        Trainer(max_epochs=EPOCHS, **args).fit(model, loader)
    return model


def noisy(images: Tensor, size: float) -> Tensor:
    """Add Gaussian noise."""
    return images + size * torch.randn_like(images)


def blurred(images: Tensor, times: float) -> Tensor:
    """Blur by a mean over 3 x 3 pixels, several times."""
    for _ in range(int(times)):
        images = F.avg_pool2d(images, 3, stride=1, padding=1)
    return images


# %% [markdown]
# ## Distance and error under shift
#
# Nothing adapts here, `steps=0`: the predictor measures. Every figure is of 497 test images that
# neither the training (1,000) nor the validation (300) has seen, with the mean over seeds and half
# an interval of 95 % (Student's t).


# %%
def measured(predict: IT3Predictor, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return for each image its distance, how unsure the network is, and whether it errs."""
    found = predict(images)
    classes = found.outputs.softmax(1)
    unsure, wrong = 1 - classes.amax(1), classes.argmax(1) != labels
    return {"distance": found.distance, "unsure": unsure, "wrong": wrong.float()}


def one_seed(seed: int) -> dict[str, dict[str, Tensor]]:
    """Return the measures of the validation images, and of the test images under every shift."""
    seed_everything(seed, verbose=False)
    images, labels = digits(seed)
    predict = IT3Predictor(trained(images[:1000], labels[:1000]), Settings(steps=0))
    test, known = images[1300:], labels[1300:]
    found = {"validation": measured(predict, images[1000:1300], labels[1000:1300])}
    found["clean"] = measured(predict, test, known)
    found |= {f"noise {size}": measured(predict, noisy(test, size), known) for size in NOISE}
    found |= {f"blur {times}": measured(predict, blurred(test, times), known) for times in BLUR}
    return found


def spread(values: list[float]) -> str:
    """Return mean and half an interval of 95 % over the seeds."""
    t95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
    found = torch.tensor(values)
    half = t95[len(values)] * found.std().item() / math.sqrt(len(values))
    return f"{found.mean().item():6.3f} +- {half:.3f}"


runs = [one_seed(seed) for seed in range(SEEDS)]
tests = [name for name in runs[0] if name != "validation"]
print(f"{'':12s}{'error':>16s}{'distance':>18s}")
for name in tests:
    row = [
        spread([run[name][what].mean().item() for run in runs]) for what in ("wrong", "distance")
    ]
    print(f"{name:12s}{row[0]:>16s}{row[1]:>18s}")

# %% [markdown]
# Both grow with the shift, up to a point: under the strongest noise and blur errors go on growing
# and the distance does not.
#
# ![Mean distance against error, a point for each seed and shift](what_the_distance_tells.svg)

# %%
plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "it3"})
figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
for kind, colour in (("clean", "#444444"), ("noise", "#2b62b8"), ("blur", "#c4532d")):
    shown = [run[name] for run in runs for name in tests if name.startswith(kind)]
    distances = [each["distance"].mean().item() for each in shown]
    axes.scatter(
        distances, [100 * each["wrong"].mean().item() for each in shown], 18, colour, label=kind
    )
axes.set_xlabel("mean idempotence distance (squared L2)")
axes.set_ylabel("error, %")
axes.legend(frameon=False)
figure.savefig("what_the_distance_tells.svg", metadata={"Date": None})

# %% [markdown]
# ## Which images are wrong?
#
# The area under the ROC curve: the chance that a wrong prediction has a larger value than a right
# one; 0.5 is guessing. The row to beat is 1 less the largest probability, which costs nothing.


# %%
def auroc(of: dict[str, Tensor], measure: str) -> float:
    """Return the area for telling wrong predictions from right ones."""
    return float(binary_auroc(of[measure], of["wrong"].long()))


def joined(run: dict[str, dict[str, Tensor]], kind: str) -> dict[str, Tensor]:
    """Return the measures of all sizes of a shift together."""
    parts = [run[name] for name in tests if name.startswith(kind)]
    return {what: torch.cat([part[what] for part in parts]) for what in parts[0]}


print(f"{'AUROC':12s}{'distance':>16s}{'1 - largest':>18s}{'gain':>18s}")
for kind in ("noise", "blur"):
    pairs = [[auroc(joined(run, kind), m) for m in ("distance", "unsure")] for run in runs]
    columns = [[p[0] for p in pairs], [p[1] for p in pairs], [p[0] - p[1] for p in pairs]]
    print(f"{kind:12s}" + "".join(f"{spread(column):>17s}" for column in columns))

# %% [markdown]
# Here the row to beat is not beaten: the largest probability tells errors apart better, under both
# shifts. The distance is for adaptation, and for what follows; to sort single predictions of
# classes, measure first whether it says more than confidence on your data. Where a network gives
# no probabilities, as in regression, there is no such row.
#
# ## Is a distance worth the same everywhere?
#
# Five bins with as many clean validation images each; in every bin the share of errors. If the
# distance alone said how likely an error is, a column would be the same in every row.

# %%
print(
    f"{'error, %, by distance':24s}" + "".join(f"{name:>9s}" for name in ("least", *"234", "most"))
)
for name in ("clean", "noise", "blur"):
    rates = []
    for run in runs:
        edges = run["validation"]["distance"].quantile(torch.tensor([0.2, 0.4, 0.6, 0.8]))
        part = joined(run, name)
        bins = torch.bucketize(part["distance"], edges)
        rates.append([100 * part["wrong"][bins == b].mean().item() for b in range(5)])
    print(f"{name:24s}" + "".join(f"{v:9.1f}" for v in torch.tensor(rates).nanmean(0)))

# %% [markdown]
# It is not: in the same bin, errors are more frequent under shift. The distance orders predictions,
# it is no probability of an error (`nan`: no image in this bin).
#
# ## A gate
#
# The distance that 95 % of the clean validation images lie within is a gate: what lies beyond may
# be adapted to, or handed to a person. `IT3TestTimeCallback(gate=0.95)` measures it with
# `Trainer.validate` and keeps it in the checkpoint; here it is a quantile. On clean data about 5 %
# should lie beyond.

# %%
print(f"{'':12s}{'beyond, %':>12s}{'error within, %':>18s}{'error beyond, %':>18s}")
for name in tests:
    columns = []
    for run in runs:
        beyond = run[name]["distance"] > run["validation"]["distance"].quantile(0.95)
        wrong = run[name]["wrong"]
        parts = beyond.float(), wrong[~beyond], wrong[beyond]
        columns.append([100 * part.mean().item() for part in parts])
    means = torch.tensor(columns).nanmean(0)
    print(f"{name:12s}{means[0]:12.1f}{means[1]:18.1f}{means[2]:18.1f}")

# %% [markdown]
# What lies beyond is wrong more often, everywhere. But under the strongest shifts most errors lie
# within: a gate on single images is no safeguard there. Along a stream, [a bet](gate.md) on the
# distances finds the shift itself.
