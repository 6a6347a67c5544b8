"""Adapts each sample alone, with scope `batch`, in a process of its own: run by a test."""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.modules import takes_prior
from helpers.reference import softmax_label
from helpers.zoo import KINDS, RESNET, Kind, singles
from it3_lightning.engine import Settings, adapt
from it3_lightning.methods import Idempotence

DTYPES = {"float32": torch.float32, "float64": torch.float64}
STEPS = {"one step": 1, "three steps": 3}
COUNT = 4


def settings(steps: int) -> dict[str, Any]:
    return {"objective": Idempotence("l2", None), "steps": steps, "lr": 1e-3}


def alone(kind: Kind, dtype: torch.dtype, steps: int, count: int = COUNT) -> Tensor:
    """Return the outputs of every sample, each adapted to on a network built anew."""
    outputs = []
    for sample in singles(kind.batch(count, dtype)):
        net = kind.build(dtype)
        given = Settings(**settings(steps))
        adaptation = adapt(
            net, sample, forward=takes_prior(net), to_label=softmax_label, settings=given
        )
        assert adaptation.outputs is not None
        outputs.append(adaptation.outputs)
    return torch.cat(outputs)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    found = {
        f"{name}, {dtype}, {steps}": alone(kind, DTYPES[dtype], STEPS[steps])
        for name, kind in KINDS.items()
        for dtype in DTYPES
        for steps in STEPS
    }
    found["resnet"] = alone(RESNET, torch.float32, 1, count=2)
    torch.save(found, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
