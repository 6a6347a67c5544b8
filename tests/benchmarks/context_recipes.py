"""Compares recipes of training a conditioning with the context of a batch, on the tuning shifts.

``python tests/benchmarks/context_recipes.py results/controls`` takes a network from the output of
``it3 benchmark --config configs/fashion_mnist.yaml``, keeps what its first dense layer puts out
under the statistics of each batch, and trains the conditioning of that configuration on it: what
comes before that layer is the same for all recipes, which so cost seconds. No test image is seen.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning import ClassPrior, RandomNoise
from it3_lightning.conditioning.feature_injection import Embedder
from it3_lightning.data import TUNING_SHIFTS, FashionMNISTDataModule
from it3_lightning.engine.restore import batch_norms
from it3_lightning.methods import LabelShiftEM
from it3_lightning.networks import SmallCNN

STREAMS = (
    *(("equal", 0.1), ("unequal", 0.1)),
    *(("correlated", 0.1), ("correlated", 0.02), ("correlated", 0.01)),
)
STEPS = 860  # two epochs of 55,000 images
Kept = list[tuple[Tensor, Tensor]]
"""What the first dense layer puts out, and labels, batch by batch."""
Show = Callable[[Tensor], Tensor]
_PRIOR = ClassPrior(10, context="batch")
_EM = ClassPrior(10, context="batch", frequencies="em")


@dataclass(frozen=True)
class Recipe:
    """One way to train.

    Args:
        name: in the table.
        equal: share of batches as they come.
        concentration: of the class weights of the others: bounds of a log-uniform draw.
        longer: how many times as many batches.
        iterated: share of batches that see their second prediction, not their first.
        show: what of the first predictions is seen as context.
    """

    name: str
    equal: float
    concentration: tuple[float, float]
    longer: int = 1
    iterated: float = 0.0
    show: Show = _PRIOR.context_of


ANY = (0.01, 10.0)
RECIPES = (
    Recipe("half equal, concentration 0.3", 0.5, (0.3, 0.3)),
    Recipe("half equal, 0.01 to 10", 0.5, ANY),
    Recipe("a quarter equal, 0.01 to 10", 0.25, ANY),
    Recipe("none equal, 0.01 to 10", 0.0, ANY),
    Recipe("a quarter equal, twice as long", 0.25, ANY, 2),
    Recipe("a quarter equal, half iterated", 0.25, ANY, iterated=0.5),
    Recipe("a quarter equal, context by EM", 0.25, ANY, show=_EM.context_of),
)


class Conditioning(nn.Module):
    """Added after the first dense layer, scale and shift after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (Embedder(20, 64, 128, None) for _ in range(2))

    def forward(self, network: SmallCNN, kept: Tensor, prior: Tensor, show: Show) -> Tensor:
        """Return probabilities, of a prior and its context."""
        seen = _PRIOR.joined(prior, show(prior))
        hidden = F.relu(kept + self.first(seen))
        scale, shift = self.second(seen).chunk(2, 1)
        logits: Tensor = network.head(F.relu(network.dense2(hidden) * (1 + scale) + shift))
        return logits.softmax(1)


def plain(network: SmallCNN, kept: Tensor) -> Tensor:
    """Return the first prediction."""
    logits: Tensor = network.head(F.relu(network.dense2(F.relu(kept))))
    return logits.softmax(1)


def load(folder: Path, seed: int, training: str) -> SmallCNN:
    """Return the network of a training, which normalises by the statistics of each batch."""
    name = f"seed_{seed}.ckpt" if training == "ordinary" else f"seed_{seed}_{training}.ckpt"
    states = torch.load(folder / "models" / name, weights_only=True)["states"]
    states = states["ordinary"] if training == "ordinary" else states
    network = SmallCNN(1, 10, 28).eval().requires_grad_(False)
    own = {k.removeprefix("network."): v for k, v in states.items() if k.startswith("network.")}
    network.load_state_dict(own)
    for layer in batch_norms(network):
        layer.train()
        layer.momentum = 0.0
    return network


@torch.no_grad()
def training_batches(
    network: SmallCNN, data: FashionMNISTDataModule, recipe: Recipe, steps: int
) -> Kept:
    """Return the batches of a recipe."""
    noise, found = RandomNoise(0.2, low=0.0, high=1.0), Kept()
    low, high = map(math.log, recipe.concentration)
    while len(found) < recipe.longer * steps:
        for x, y in data.train_dataloader():
            if torch.rand(()) >= recipe.equal:
                strength = torch.empty(()).uniform_(low, high).exp().item()
                weights = torch.distributions.Dirichlet(torch.full((10,), strength)).sample()
                rows = torch.multinomial(weights[y] + 1e-6, len(y), replacement=True)
                x, y = x[rows], y[rows]
            found.append((network.dense1(network.features(noise(x))), y))
    return found[: recipe.longer * steps]


@torch.no_grad()
def tuning_batches(
    network: SmallCNN, data: FashionMNISTDataModule, batches: int
) -> dict[str, dict[str, Kept]]:
    """Return clean and shifted validation images of each stream, by names."""
    found: dict[str, dict[str, Kept]] = {}
    for stream, concentration in STREAMS:
        data.stream, data.concentration = stream, concentration  # type: ignore[assignment]
        name = f"{stream} {concentration}" if stream == "correlated" else stream
        loaders = zip(data.test_names, data.test_dataloader(), strict=True)
        found[name] = {
            shift: [
                (network.dense1(network.features(x)), y)
                for _, (x, y) in zip(range(batches), loader, strict=False)
            ]
            for shift, loader in loaders
        }
    data.stream = "equal"
    return found


def trained(network: SmallCNN, batches: Kept, recipe: Recipe, seed: int) -> Conditioning:
    """Return a conditioning trained on batches, on the network's own predictions as priors."""
    torch.manual_seed(seed)
    conditioning = Conditioning()
    optimizer = torch.optim.Adam(conditioning.parameters(), lr=1e-3)
    for kept, labels in batches:
        with torch.no_grad():
            prior = plain(network, kept)
            if torch.rand(()) < recipe.iterated:
                prior = conditioning(network, kept, prior, recipe.show)
        loss = F.nll_loss(conditioning(network, kept, prior, recipe.show).log(), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return conditioning


@torch.no_grad()
def accuracies(
    judged: dict[str, dict[str, Kept]], predict: Callable[[Tensor], Tensor]
) -> list[float]:
    """Return, for each stream, accuracy on clean images, and the mean over the shifts."""
    found = []
    for shifts in judged.values():
        right = {
            shift: [(predict(kept).argmax(1) == labels).float().mean() for kept, labels in batches]
            for shift, batches in shifts.items()
        }
        means = {shift: 100 * torch.stack(each).mean().item() for shift, each in right.items()}
        clean = means.pop("clean")
        found += [clean, sum(means.values()) / len(means)]
    return found


def line(name: str, cells: Sequence[str]) -> None:
    """Print a line of the table."""
    text = f"| {name} | {' | '.join(cells)} |"
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table: accuracies under batch statistics, and the gains of each recipe on them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="output of the benchmark")
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--training", default="perturbed", choices=["perturbed", "ordinary"])
    parser.add_argument("--batches", type=int, default=20, help="of 100 images, of each shift")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training, of 128 images")
    parser.add_argument("--validation", type=int, default=5000, help="images to judge on")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    network = load(given.folder, given.seed, given.training)
    data = FashionMNISTDataModule(
        root=given.root,
        seed=given.seed,
        shifts=TUNING_SHIFTS,
        evaluate_on="validation",
        val_size=given.validation,
    )
    judged = tuning_batches(network, data, given.batches)
    line("gain over batch statistics", [f"{name}: clean | shifts" for name in judged])
    line("---", ["---:"] * 2 * len(judged))
    base = accuracies(judged, lambda kept: plain(network, kept))
    line("*batch statistics*", [f"{each:.1f}" for each in base])

    def row(name: str, predict: Callable[[Tensor], Tensor]) -> None:
        gains = [f - b for f, b in zip(accuracies(judged, predict), base, strict=True)]
        line(name, [f"{gain:+.1f}" for gain in gains])

    row("EM of class frequencies", lambda kept: LabelShiftEM().adjusted(plain(network, kept)))
    for recipe in RECIPES:
        torch.manual_seed(given.seed)
        batches = training_batches(network, data, recipe, given.steps)
        learnt, show = trained(network, batches, recipe, given.seed), recipe.show

        def second(kept: Tensor, learnt: Conditioning = learnt, show: Show = show) -> Tensor:
            predicted: Tensor = learnt(network, kept, plain(network, kept), show)
            return predicted

        row(recipe.name, second)
        if recipe.iterated:

            def third(kept: Tensor, learnt: Conditioning = learnt, show: Show = show) -> Tensor:
                predicted: Tensor = learnt(network, kept, second(kept), show)
                return predicted

            row(f"{recipe.name}, third prediction", third)


if __name__ == "__main__":
    main()
