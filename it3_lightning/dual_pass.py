"""How the label pass of training is made: its weight, and which prior each sample sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from it3_lightning.perturbations import RandomNoise
from it3_lightning.priors import Prior
from it3_lightning.specs import Described, built, spec


@dataclass(frozen=True)
class DualPass:
    r"""Settings of :math:`L = \ell(f(x, 0), y) + w\,\ell(f(x, p), y)`, ``p`` the label's prior.

    Args:
        label_weight: weight ``w`` of the passes that see a prior.
        passes: ``"dual"``: every sample goes through both passes; ``"single"``: one pass, each
            sample sees its prior or the neutral one at random, at half the cost.
        neutral_share: share of samples that see the neutral prior in a single pass.
        own_share: share of samples whose prior is the network's own prediction, not the label.
        third_pass: add a pass in which every prior is the network's own prediction.
        perturb_prior: blur the label's prior by a random amount; with exact labels the network
            learns to copy its prior, which is worthless at test time.
        perturb_inputs: a transform of the inputs in the label pass.

    Raises:
        ValueError: a weight is negative or a share outside [0, 1].
    """

    label_weight: float = 1.0
    passes: Literal["dual", "single"] = "dual"
    neutral_share: float = 0.5
    own_share: float = 0.0
    third_pass: bool = False
    perturb_prior: bool = True
    perturb_inputs: Callable[[Any], Any] | None = None

    def __post_init__(self) -> None:
        if self.label_weight < 0:
            raise ValueError(f"Expected label_weight >= 0, got {self.label_weight}.")
        for name in ("neutral_share", "own_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} in [0, 1], got {getattr(self, name)}.")
        if self.passes not in ("dual", "single"):
            raise ValueError(f"Expected passes 'dual' or 'single', got {self.passes!r}.")

    def prior(self, prior: Prior, target: Any, own: Callable[[], Tensor]) -> Tensor:
        """Return the priors of the label pass, ``(B, C, ...)``.

        Args:
            prior: brings targets and outputs into label space.
            target: of the batch.
            own: runs the network on the inputs and returns its prediction in label space.
        """
        given = prior.from_target(target)
        if self.perturb_prior:
            given = prior.perturb(given)
        if self.own_share == 0:
            return given
        theirs = own()
        chosen = torch.rand(given.shape[0], device=given.device) < self.own_share
        return torch.where(chosen.reshape(-1, *[1] * (given.ndim - 1)), theirs.to(given), given)

    def present(self, batch_size: int, device: torch.device) -> Tensor:
        """Return which samples see their prior in a single pass, ``(B,)`` booleans."""
        return torch.rand(batch_size, device=device) >= self.neutral_share

    def init_args(self) -> dict[str, Any]:
        """Return the settings as plain data, less a perturbation that is not from this library.

        >>> DualPass(label_weight=0.5).init_args()["label_weight"]
        0.5
        """
        args = {field.name: getattr(self, field.name) for field in fields(self)}
        known = isinstance(self.perturb_inputs, Described)
        return {**args, "perturb_inputs": spec(self.perturb_inputs) if known else None}

    @classmethod
    def of(cls, given: DualPass | Mapping[str, Any] | None, *, post_hoc: bool) -> DualPass:
        """Return given settings, also where :meth:`init_args` describes them, or the default.

        Raises:
            ValueError: a single pass, post-hoc.
        """
        if given is None:
            return cls(own_share=0.5, perturb_inputs=RandomNoise()) if post_hoc else cls()
        settings = given if isinstance(given, DualPass) else cls(**_with_objects(given))
        if post_hoc and settings.passes == "single":
            raise ValueError(
                "Expected passes='dual' with train='conditioning', got 'single': a frozen network "
                "learns nothing on the neutral prior, so no sample need be spent on it."
            )
        return settings


def _with_objects(args: Mapping[str, Any]) -> dict[str, Any]:
    perturbation: Any = args.get("perturb_inputs")
    if isinstance(perturbation, Mapping):
        perturbation = built(perturbation, nn.Module)
    return {**args, "perturb_inputs": perturbation}
