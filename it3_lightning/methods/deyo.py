"""DeYO: entropy of samples that are predicted by the shape of an object, not by its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms.v2.functional import resize

from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy
from it3_lightning.methods.views import is_images
from it3_lightning.utils.messages import unknown

Destruction = Literal["patch", "pixel", "occlusion"]


@dataclass
class DeYO(TestTimeMethod):
    r"""Destroy your object (Lee et al., ICLR 2024): entropy where the object's shape matters.

    .. math::

        \min_\theta \; \alpha_\theta(x) \, [x \in S_\theta] \, \mathrm{Ent}_\theta(x), \qquad
        S_\theta = \{x : \mathrm{Ent}_\theta(x) < \tau_\mathrm{Ent}, \;
        \mathrm{PLPD}_\theta(x, x') > \tau_\mathrm{PLPD}\},

        \mathrm{PLPD}_\theta(x, x') = (p_\theta(x) - p_\theta(x'))_{\hat y}, \qquad
        \alpha_\theta(x) = e^{\mathrm{Ent}_0 - \mathrm{Ent}_\theta(x)}
        + e^{\mathrm{PLPD}_\theta(x, x')}

    (``S`` is eq. 8, :math:`\alpha` eq. 10): :math:`\hat y` is the class predicted for ``x``, and
    ``x'`` is ``x`` with its object destroyed. The mean is over the samples that count, without a
    gradient through :math:`\alpha`. It needs no prior: any LightningModule will do. The published
    code holds the norm layers of the top still, as :class:`~it3_lightning.methods.SAR` tells how
    to, and shows the network only those ``x'`` whose ``x`` has a low entropy, so that statistics
    of the batch are of these; here it sees all.

    Every step has an order of patches of its own, by a generator of its own: the same seed gives
    the same result, and the process's generators are not disturbed.

    Args:
        tau_entropy: largest entropy, as a share of ``ln C``, that of ``C`` equal probabilities.
        tau_plpd: smallest PLPD; 0.3 in the paper, 0.2 on its wild streams, 0.5 on biased data.
        margin: :math:`\mathrm{Ent}_0`, as a share of ``ln C``.
        transform: destroys objects in images ``(B, C, H, W)``: ``"patch"`` shuffles their patches,
            ``"pixel"`` their pixels, ``"occlusion"`` fills the middle, half as high and wide, with
            their mean; or a callable that takes inputs ``(B, ...)`` and returns the like.
        patches: along each side of an image.
        seed: of the first step; each further one has the next.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no class vectors,
            or inputs without images.

    >>> DeYO().tau_plpd
    0.3
    """

    tau_entropy: float = 0.5
    tau_plpd: float = 0.3
    margin: float = 0.4
    transform: Destruction | Callable[[Any], Any] = "patch"
    patches: int = 4
    seed: int = 0
    _steps: int = field(default=0, init=False, repr=False, compare=False)
    defaults: ClassVar[Mapping[str, Any]] = {
        "parameters": "norm",
        "norm_stats": "batch",
        "reset": "never",
        "optimizer": "momentum",
        "lr": 2.5e-4,
    }

    def __post_init__(self) -> None:
        for name in ("tau_entropy", "margin"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"Expected {name} > 0, a share of ln C, got {value}.")
        if not -1 <= self.tau_plpd <= 1:
            raise ValueError(f"Expected tau_plpd in [-1, 1], got {self.tau_plpd}.")
        if not callable(self.transform) and self.transform not in get_args(Destruction):
            raise ValueError(unknown("transform", self.transform, get_args(Destruction)))
        if self.patches < 2:
            raise ValueError(f"Expected at least two patches a side, got {self.patches}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the weighted entropy, and which samples count."""
        check_classes("DeYO", passes.y0, maps=False)
        entropy = cross_entropy(passes.y0, passes.y0)
        most = math.log(passes.y0.shape[1])
        plpd = self._plpd(passes)
        reliable = (entropy < self.tau_entropy * most) & (plpd > self.tau_plpd)
        weights = (self.margin * most - entropy.detach()).exp() + plpd.exp()
        return Objective(entropy, reliable, sample_term=(weights - 1) * entropy)

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take a step; the next one has another order of patches."""
        objective = super().step(passes, state)
        self._steps += 1
        return objective

    @torch.no_grad()
    def _plpd(self, passes: Passes) -> Tensor:
        """Return by how much the predicted class is less likely without the object, ``(B,)``."""
        fallen = passes.y0 - passes.other(self._destroyed(passes.inputs))
        return fallen.gather(1, passes.y0.argmax(1, keepdim=True))[:, 0]

    def _destroyed(self, inputs: Any) -> Any:
        if callable(self.transform):
            return self.transform(inputs)
        if not any(map(is_images, tree_leaves(inputs))):
            raise ValueError(
                f"DeYO destroys objects in images (B, C, H, W) by transform={self.transform!r}, "
                "and found none among the inputs. Give transform a callable that takes them."
            )
        return tree_map(self._destroyed_leaf, inputs)

    def _destroyed_leaf(self, leaf: Any) -> Any:
        if not is_images(leaf):
            return leaf
        if self.transform == "occlusion":
            return occluded(leaf)
        height, width = leaf.shape[-2:]
        counts = (height, width) if self.transform == "pixel" else (self.patches, self.patches)
        generator = torch.Generator().manual_seed(self.seed + self._steps)
        return shuffled(leaf, counts, generator)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, by which patches are shuffled."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._steps = state["steps"]


def shuffled(images: Tensor, counts: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return images with their patches in another order, each image by its own.

    Sides that the counts do not divide are scaled to the next smaller multiple, and back.

    Args:
        images: ``(B, C, H, W)``.
        counts: patches along height and width.
        generator: draws the orders.

    Raises:
        ValueError: an image has fewer pixels along a side than patches.
    """
    sides = images.shape[-2:]
    patch = sides[0] // counts[0], sides[1] // counts[1]
    if 0 in patch:
        raise ValueError(
            f"Expected images of at least {counts[0]} x {counts[1]} pixels to cut into as many "
            f"patches, got {sides[0]} x {sides[1]}. Set fewer patches."
        )
    whole = patch[0] * counts[0], patch[1] * counts[1]
    patches = F.unfold(resize(images, list(whole)), patch, stride=patch)  # (B, C h w, patches)
    order = torch.rand(len(images), patches.shape[2], generator=generator).argsort(1)
    moved = patches.gather(2, order.to(images.device)[:, None].expand_as(patches))
    found: Tensor = resize(F.fold(moved, whole, patch, stride=patch), list(sides))
    return found


def occluded(images: Tensor) -> Tensor:
    """Return images ``(B, C, H, W)`` whose middle is filled with their mean.

    >>> occluded(torch.arange(16.0).view(1, 1, 4, 4))[0, 0, 1]
    tensor([4.0000, 7.5000, 7.5000, 7.0000])
    """
    height, width = images.shape[-2:]
    rows = slice(height // 4, height // 4 + height // 2)
    columns = slice(width // 4, width // 4 + width // 2)
    found = images.clone()
    found[..., rows, columns] = images.mean((2, 3), keepdim=True)
    return found
