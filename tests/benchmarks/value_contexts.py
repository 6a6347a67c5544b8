"""Asks what a context of the batch says beside a prior of values, or of maps of classes.

``python tests/benchmarks/value_contexts.py configs/boston.yaml`` trains the network of a
configuration on batches of which half the samples are perturbed, and on it, post-hoc, conditionings
that differ in what stands beside the prior of a sample. Of values: mean and spread of the first
predictions of its batch. Of maps: the shares of the classes on the map itself, or on those of its
batch. All see their own predictions and batches drawn unequally, under the statistics of test time.
Scored is the second prediction, without any gradient, on test samples, clean and under the shifts
of the data module; classes of the streams are tenths of the values, or of the share of foreground.

Lines are rows of a table in Markdown: the error of the first prediction, what the second one takes
away from it, and what a context takes away from that, with 95 % intervals over seeds *and* samples,
the wider of both. Further arguments are those of ``it3 benchmark``.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from harm import over_seeds
from lightning.pytorch import seed_everything
from torch import Tensor

from it3_lightning import MaskPrior, RandomNoise, ValuePrior
from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.models import with_priors
from it3_lightning.benchmark.sample_scores import errors_of
from it3_lightning.benchmark.scoring import quiet, threads
from it3_lightning.cli import asked_for
from it3_lightning.data import ShiftedData
from it3_lightning.data.sampling import correlated_stream, unequal_stream
from it3_lightning.data.tables import tenths
from it3_lightning.engine.restore import NormStatistics, Undo, batch_norms
from it3_lightning.priors import Prior
from it3_lightning.training.dual_pass import DualPass, partly
from it3_lightning.training.mixin import IT3Mixin

STREAMS = "equal", "unequal", "correlated"
NONE = "no context"


class ValuesInBatch(ValuePrior):
    """Values, beside mean and spread of those of the batch, in standard deviations of the target.

    >>> prior = ValuesInBatch(mean=0.0, std=1.0)
    >>> prior.context_of(torch.tensor([[1.0], [3.0]]))
    tensor([[2., 1.]])
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.context, self.context_channels, self.joins = "batch", 2 * self.channels, True

    def context_of(self, prior: Tensor) -> Tensor:
        """Return mean and spread of each channel, ``(1, 2C)``."""
        return torch.cat([prior.mean(0), prior.std(0, correction=0)])[None]

    def as_context(self, context: Tensor) -> Tensor:
        """Return it with the logarithm of the spread."""
        mean, spread = context.chunk(2, 1)
        return torch.cat([mean, (spread + 0.02).log()], 1)


class SharesOfMap(MaskPrior):
    """Maps, beside the shares of the classes on each, at every position."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.context, self.context_channels, self.joins = "batch", self.channels, True

    def context_of(self, prior: Tensor) -> Tensor:
        """Return shares, ``(B, C)``."""
        return prior.flatten(2).mean(2)

    def joined(self, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """Return maps beside the logarithms of shares."""
        found = (self.context_of(prior) if context is None else context).add(0.02).log()
        found = found[:, :, None, None].expand(len(prior), -1, *prior.shape[2:])
        return torch.cat([prior, found], dim=1)


class SharesInBatch(SharesOfMap):
    """Maps, beside the shares of the classes in the batch."""

    def context_of(self, prior: Tensor) -> Tensor:
        """Return shares, ``(1, C)``."""
        return super().context_of(prior).mean(0, keepdim=True)


def kinds_of(prior: Prior) -> Mapping[str, type[Prior]]:
    """Return what may stand beside a prior, by name."""
    if isinstance(prior, MaskPrior):
        return {
            NONE: MaskPrior,
            "shares of the map": SharesOfMap,
            "shares in the batch": SharesInBatch,
        }
    if not isinstance(prior, ValuePrior):
        raise TypeError(f"Expected a ValuePrior or a MaskPrior, got {type(prior).__name__}.")
    return {NONE: ValuePrior, "mean and spread": ValuesInBatch}


@dataclass(frozen=True)
class Trained:
    """A network, and what trains conditionings on it.

    Args:
        settings: of the Trainers.
        make_model: returns a fresh model with priors.
        data: to train and to test on.
        seed: of weights and order.
        folder: keeps what is trained.
    """

    settings: BenchmarkSettings
    make_model: Callable[[], Any]
    data: ShiftedData
    seed: int
    folder: Path

    def fresh(self) -> IT3Mixin:
        """Return a model with the first weights of the seed, whose prior knows the targets."""
        seed_everything(self.seed, verbose=False)
        model = with_priors(self.make_model())
        self.data.seed, self.data.stream = self.seed, "equal"
        if not model.it3_parts()[0].fitted:
            loader = self.data.plain_train_dataloader()
            model.it3_parts()[0].fit([model.it3_target(batch) for batch in loader])
        return model

    def fitted(self, model: IT3Mixin, name: str, epochs: int) -> IT3Mixin:
        """Return a model after its training, from its file where there is one."""
        file = self.folder / f"seed_{self.seed}_{name.replace(' ', '_')}.pt"
        if file.is_file():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model.eval()
        self.settings.trainer(max_epochs=epochs).fit(model, datamodule=self.data)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        return model.eval()

    def network(self) -> IT3Mixin:
        """Return the network, trained on batches of which half the samples are perturbed."""
        model, perturbation = self.fresh(), self.label_pass.perturb_inputs
        model.it3_train = "off"
        assert perturbation is not None
        own = type(model).training_step

        def training_step(self: Any, batch: Any, *args: Any) -> Any:
            return own(self, partly(self, perturbation, batch), *args)

        model.__class__ = type("Perturbed", (type(model),), {"training_step": training_step})
        return self.fitted(model, "network", 2 * self.settings.epochs)

    @property
    def label_pass(self) -> DualPass:
        """The passes with priors; inputs are perturbed in them."""
        given = self.settings.label_pass
        noise = given.perturb_inputs or RandomNoise(0.2)
        return replace(given, own_share=1.0, unequal_share=0.75, perturb_inputs=noise)

    def conditioned(self, network: IT3Mixin, name: str, kind: type[Prior]) -> IT3Mixin:
        """Return the network with a conditioning trained on it."""
        model = self.fresh()
        prior, conditioning = model.it3_parts()
        state = prior.state_dict()
        conditioning.detach(model)
        model.it3_prior = kind(**prior.init_args())
        model.it3_prior.load_state_dict(state)
        model.it3_conditioning = type(conditioning)(**conditioning.init_args())
        model.it3_conditioning.attach(model, model.it3_prior)
        used = self.label_pass
        model.it3_dual_pass = replace(used, norm_stats="batch") if batch_norms(model) else used
        model.it3_train = "conditioning"
        own = {k: v for k, v in network.state_dict().items() if not k.startswith("it3_")}
        model.load_state_dict({**model.state_dict(), **own})
        return self.fitted(model, name, self.settings.posthoc_epochs)


@torch.no_grad()
def second(model: IT3Mixin, inputs: Any) -> tuple[Tensor, Tensor]:
    """Return first and second outputs, under the statistics of the batch."""
    with Undo() as undo:
        NormStatistics(model, "batch", undo)
        first = model.predict_with(inputs, None)
        outputs = model.predict_with(inputs, model.it3_parts()[0].from_output(first))
        undo.run()
    return first, outputs


def streams(data: ShiftedData, seed: int, size: int) -> Iterator[tuple[str, str, list[Any]]]:
    """Yield the name of a stream and of a shift, and its batches."""
    for shift, loader in zip(data.test_names, data.test_dataloader(), strict=True):
        inputs, targets = (torch.cat(parts) for parts in zip(*loader, strict=True))
        groups = tenths(targets.flatten(1).float().mean(1, keepdim=True))
        orders = {
            "equal": torch.arange(len(groups)),
            "unequal": unequal_stream(groups, seed),
            "correlated": correlated_stream(groups, seed, slot=size),
        }
        for stream, order in orders.items():
            places = range(0, len(order) - 1, size)  # a last batch of one sample is left out
            parts = [order[start : start + size] for start in places]
            yield stream, shift, [(inputs[part], targets[part]) for part in parts]


Errors = dict[str, dict[tuple[str, str], Tensor]]
"""Of each sample, by kind, stream and shift."""


def errors(trained: Trained, size: int) -> Errors:
    """Return the errors of first and second predictions."""
    network = trained.network()
    kinds = kinds_of(network.it3_parts()[0])
    models = {name: trained.conditioned(network, name, kind) for name, kind in kinds.items()}
    found: Errors = {name: {} for name in ("first prediction", *models)}
    trained.data.seed, trained.data.stream = trained.seed, "equal"
    for stream, shift, batches in streams(trained.data, trained.seed, size):
        for name, model in models.items():
            prior = model.it3_parts()[0]
            both = [(*second(model, x), y) for x, y in batches]
            found[name][stream, shift] = torch.cat([errors_of(prior, s, y) for _, s, y in both])
            if name == NONE:
                own = torch.cat([errors_of(prior, f, y) for f, _, y in both])
                found["first prediction"][stream, shift] = own
    return found


def gain(found: Errors, over: str, name: str, cells: Sequence[Any]) -> tuple[float, float]:
    """Return the mean of the errors taken away, and half of its 95 % interval over samples.

    A sample is one under all shifts: their order is the same.
    """
    taken = [found[over][cell] - found[name][cell] for cell in cells]
    if len({len(each) for each in taken}) == 1:
        taken = [torch.stack(taken).mean(0)]
    mean = statistics.fmean(each.mean().item() for each in taken)
    parts = [each.var().item() / len(each) for each in taken]
    return mean, 1.96 * math.sqrt(sum(parts)) / len(parts)


def lines(title: str, found: Sequence[Errors], decimals: int) -> list[str]:
    """Return the rows of the table: errors of second predictions, and what contexts take away."""
    cells = [*found[0][NONE]]
    columns = [
        [cell for cell in cells if cell[0] == stream and (cell[1] == "clean") == clean]
        for stream in STREAMS
        for clean in (True, False)
    ]

    def shown(over: str, name: str) -> str:
        pairs = [over_seeds([gain(own, over, name, some) for own in found]) for some in columns]
        return " | ".join(f"{mean:+.{decimals}f} ± {half:.{decimals}f}" for mean, half in pairs)

    first = [
        statistics.fmean(own["first prediction"][cell].mean().item() for own in found for cell in c)
        for c in columns
    ]
    made = [f"| {title} | first | {' | '.join(f'{each:.{decimals}f}' for each in first)} |"]
    made.append(f"| {title} | second, {NONE} | {shown('first prediction', NONE)} |")
    others = [name for name in found[0] if name not in ("first prediction", NONE)]
    return made + [f"| {title} | … {name} | {shown(NONE, name)} |" for name in others]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the rows of one configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=32, help="of test batches")
    parser.add_argument("--output", type=Path, help="folder of networks; its name is the title")
    given, others = parser.parse_known_args(arguments)
    folder = given.output or Path("results/value_contexts") / Path(given.config).stem
    found = []
    asked = asked_for(["--config", given.config, *others], "benchmark")
    with quiet(), threads(1):
        for seed in given.seeds:
            made = asked.settings, asked.make_model, copy.copy(asked.data), seed
            found.append(errors(Trained(*made, folder), given.size))
    for line in lines(folder.name, found, asked.settings.decimals):
        print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
