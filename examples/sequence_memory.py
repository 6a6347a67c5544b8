"""Associative recall: what attention, TTT-Linear and TTT-MLP remember of contexts of each length.

A sequence shows pairs of a key and a value, each key once, and then asks for the value of each key,
in another order. Attention can look back at every pair; the TTT layers have learned them into the
weights of a small network, whose size does not grow with the context.

``python examples/sequence_memory.py`` takes a minute and a half on one core, and writes a figure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.layers import TTTMLP, TTTLinear

KEYS, VALUES = 128, 16
TRAINED = (8, 16, 32, 64)  # pairs in a context
LENGTHS = (*TRAINED, 128)  # the last one is longer than any trained on
DIM, HEADS = 32, 2

Losses = dict[str, dict[int, list[float]]]  # by layer and number of pairs, one of each seed


def recall(batch: int, pairs: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values shown ``(B, 2 pairs)``, and the values asked for ``(B, pairs)``.

    >>> keys, shown, asked = recall(1, 3, torch.Generator().manual_seed(0))
    >>> sorted(keys[0, :3].tolist()) == sorted(keys[0, 3:].tolist()), shown[0, 3:].tolist()
    (True, [16, 16, 16])
    """
    keys = torch.rand(batch, KEYS, generator=draw).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (batch, pairs), generator=draw)
    order = torch.rand(batch, pairs, generator=draw).argsort(1)
    nothing = torch.full_like(values, VALUES)
    asked = torch.cat([keys, keys.gather(1, order)], 1)
    return asked, torch.cat([values, nothing], 1), values.gather(1, order)


class Attention(nn.Module):
    """Causal softmax attention ``(B, T, D) -> (B, T, D)``, without positions: order is nothing."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.views, self.output = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, sequence: Tensor) -> Tensor:
        """Return for each token the mean of the values before it, weighted by its query."""
        views = self.views(sequence).view(*sequence.shape[:2], 3, self.heads, -1)
        query, key, value = views.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        outputs: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return outputs


LAYERS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "attention": Attention,
    "TTT-Linear": TTTLinear,
    "TTT-MLP": TTTMLP,
}


class Recall(nn.Module):
    """Embeddings, one layer over the sequence, one over each token, logits of the values."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(KEYS, DIM), nn.Embedding(VALUES + 1, DIM)
        self.norm, self.layer = nn.LayerNorm(DIM), layer
        self.each = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 4 * DIM), nn.GELU())
        self.head = nn.Linear(4 * DIM, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return logits ``(B, T, VALUES)``."""
        tokens = self.keys(keys) + self.values(values)
        logits: Tensor = self.head(self.each(tokens + self.layer(self.norm(tokens))))
        return logits


def loss(model: nn.Module, batch: int, pairs: int, draw: torch.Generator) -> Tensor:
    """Return the mean cross-entropy of the values asked for, in nats."""
    keys, shown, asked = recall(batch, pairs, draw)
    return F.cross_entropy(model(keys, shown)[:, pairs:].flatten(0, 1), asked.flatten())


def trained(layer: str, seed: int, steps: int) -> Recall:
    """Return a network that was trained on contexts of all lengths in ``TRAINED``."""
    torch.manual_seed(seed)
    draw, model = torch.Generator().manual_seed(seed), Recall(LAYERS[layer](DIM, HEADS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps + 1)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, 32, TRAINED[step % len(TRAINED)], draw).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def measured(model: Recall, batch: int) -> dict[int, float]:
    """Return the loss at each length, on sequences that no training has seen."""
    draw = torch.Generator().manual_seed(10_000)
    return {pairs: loss(model, batch, pairs, draw).item() for pairs in LENGTHS}


def compare(*, seeds: int = 1, steps: int = 1000, batch: int = 256) -> Losses:
    """Return the losses of all layers; print those of each as it is trained.

    Args:
        seeds: networks trained with each layer.
        steps: of training, on 32 sequences each.
        batch: sequences that are measured on, at each length.
    """
    losses: Losses = {layer: {pairs: [] for pairs in LENGTHS} for layer in LAYERS}
    for seed in range(seeds):
        for layer, of_layer in losses.items():
            found = measured(trained(layer, seed, steps), batch)
            print(f"seed {seed}, {layer:10s}", *(f"{loss:.3f}" for loss in found.values()))
            for pairs, value in found.items():
                of_layer[pairs].append(value)
    return losses


def table(losses: Losses) -> str:
    """Return the means over seeds, with the smallest and the largest, as Markdown.

    >>> print(table({"attention": {8: [0.1, 0.3], 16: [0.4, 0.4]}}))
    | layer | 8 | 16 |
    |---|---:|---:|
    | attention | 0.200 (0.100 to 0.300) | 0.400 (0.400 to 0.400) |
    """
    lengths = next(iter(losses.values()))
    lines = ["| layer | " + " | ".join(map(str, lengths)) + " |", "|---|" + "---:|" * len(lengths)]
    for layer, by_length in losses.items():
        cells = (f"{mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in by_length.values())
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(losses: Losses, path: Path) -> None:
    """Write the figure: loss against the number of pairs, each seed thin, the mean thick."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = ("#5c6773", "#1f6fb4", "#d1495b")
    for colour, (layer, by_length) in zip(colours, losses.items(), strict=True):
        means = [mean(values) for values in by_length.values()]
        axes.plot(LENGTHS, means, "o-", color=colour, ms=4, lw=2, label=layer)
        for of_seed in zip(*by_length.values(), strict=True):
            axes.plot(LENGTHS, of_seed, color=colour, lw=0.6, alpha=0.6)
    axes.axhline(math.log(VALUES), color="black", lw=0.8, ls=":", label="chance: ln 16")
    axes.axvline(TRAINED[-1], color="black", lw=0.8, ls="--", label="longest trained on")
    axes.set_xscale("log", base=2)
    axes.set_xticks(LENGTHS, [str(pairs) for pairs in LENGTHS])
    axes.set_xlabel("pairs in the context")
    axes.set_ylabel("cross-entropy of the recalled value, nats")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> Losses:
    """Train, measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default=1, type=int, help="networks trained with each layer")
    parser.add_argument("--steps", default=1000, type=int, help="of training")
    parser.add_argument("--batch", default=256, type=int, help="sequences measured on")
    parser.add_argument("--figure", default=Path("sequence_memory.png"), type=Path, help="file")
    given = parser.parse_args(arguments)
    losses = compare(seeds=given.seeds, steps=given.steps, batch=given.batch)
    print(table(losses))
    draw(losses, given.figure)
    return losses


if __name__ == "__main__":
    main()
