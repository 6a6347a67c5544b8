r"""TTT++: test-time training on a contrastive task, with the features held to those of source data.

The task is SimCLR's: of two views of each image, :math:`z_i` and :math:`z_j` name each other among
all :math:`2B` views,
:math:`\ell_{ij} = -\log (\exp(z_i \cdot z_j / \tau) / \sum_{k \ne i} \exp(z_i \cdot z_k / \tau))`
(Chen et al., ICML 2020, eq. 1). At test time the alignment is added,
:math:`\lVert \mu_s - \mu_t \rVert^2 + \lVert \Sigma_s - \Sigma_t \rVert_F^2`, the target's moments
over the batch and a queue of recent features (Liu et al., TTT++, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.methods.auxiliary import HEAD, Auxiliary, Features, images_of, perceptron
from it3_lightning.methods.base import Objective, Passes
from it3_lightning.methods.rotation import TTT


class Contrastive(Auxiliary):
    r"""Finds the other view of the same image among those of a batch (SimCLR, Chen et al., 2020).

    Args:
        layer: name of the layer whose features the head sees, averaged over positions.
        channels: width of the layer's output.
        hidden: width of the head.
        projection: width of what is compared.
        temperature: :math:`\tau`.

    Shapes:
        images ``(B, C, H, W)``; features as in :meth:`~Auxiliary.pooled`.

    Raises:
        ValueError: the temperature is not positive, or the features are of another width.

    >>> head = Contrastive("layer", channels=16)
    >>> for parameter in head.parameters():
    ...     _ = torch.nn.init.zeros_(parameter)
    >>> head(torch.rand(2, 1, 4, 4), lambda views: views.flatten(1))  # ln 3: one of three others
    tensor([1.0986, 1.0986], grad_fn=<MeanBackward1>)
    """

    def __init__(
        self,
        layer: str,
        channels: int,
        hidden: int = 128,
        projection: int = 128,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(layer, channels)
        if temperature <= 0:
            raise ValueError(f"Expected temperature > 0, got {temperature}.")
        self.hidden, self.projection, self.temperature = hidden, projection, temperature
        self.head = perceptron(channels, hidden, projection)

    def forward(
        self, inputs: Any, features: Features, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the mean loss of both views of each image, ``(B,)``."""
        images = images_of(self, inputs)
        views = torch.cat([self.view(images, generator), self.view(images, generator)])
        z = F.normalize(self.head(self.pooled(features(views))), dim=1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        alike = (z @ z.T / self.temperature).masked_fill(itself, -torch.inf)
        other = torch.arange(len(z), device=z.device).roll(len(images))
        return F.cross_entropy(alike, other, reduction="none").view(2, -1).mean(0)

    def view(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return a view of each image, :func:`crop_flip_and_light`; override for others."""
        return crop_flip_and_light(images, generator)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        names = ("layer", "channels", "hidden", "projection", "temperature")
        return {name: getattr(self, name) for name in names}


def crop_flip_and_light(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return a random part of each image in its full size, mirrored or not, in another light.

    As SimCLR's views: 20 to 100 % of the area; brightness and contrast times 0.6 to 1.4. Its
    changes of hue, greys and blur are left out: images may have any channels.

    Args:
        images: ``(B, C, H, W)``.
        generator: to draw with; default: the global one.
    """
    drawn = torch.rand(6, len(images), generator=generator).to(images)
    size = (0.2 + 0.8 * drawn[0]).sqrt()
    across, down = (1 - size) * (2 * drawn[1:3] - 1)
    flip, none = (drawn[3] < 0.5).to(images) * 2 - 1, torch.zeros_like(size)
    rows = torch.stack([torch.stack([flip * size, none, across]), torch.stack([none, size, down])])
    grid = F.affine_grid(rows.permute(2, 0, 1), list(images.shape), align_corners=False)
    parts = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast = (0.6 + 0.8 * drawn[4:])[..., None, None, None]
    mean = parts.mean((1, 2, 3), keepdim=True)
    lit: Tensor = brightness * (mean + contrast * (parts - mean))
    return lit


@dataclass
class TTTPlusPlus(TTT):
    """Test-time training on :class:`Contrastive`, features aligned (Liu et al., NeurIPS 2021).

    The features that are aligned are those of the head's layer, averaged over positions. They must
    have been seen on source data: run ``Trainer(callbacks=[callback]).validate(...)`` once. Online
    by default, with the statistics of the batch, and the published temperature, queue, optimizer
    and learning rate; the public code goes over the test set many times, and can align what the
    head puts out besides.

    Args:
        alignment: weight of the alignment.
        queue: number of recent features that count beside those of the batch.
        seed: of the views.

    Raises:
        ValueError: the weight or the queue is negative, or the module has no such head.

    >>> TTTPlusPlus().defaults["reset"]
    'never'
    """

    alignment: float = 1.0
    queue: int = 256
    recent: Tensor | None = field(default=None, init=False)
    """Features ``(N, C)`` of the last batches."""
    moments: dict[str, Tensor] = field(default_factory=dict, init=False)
    """Number of source samples, and the sums of their features and of the products of these."""
    head: ClassVar[type[Auxiliary]] = Contrastive
    defaults: ClassVar[Mapping[str, Any]] = {
        "reset": "never",
        "norm_stats": "batch",
        "optimizer": "momentum",
        "lr": 1e-3,
    }

    def __post_init__(self) -> None:
        if self.alignment < 0 or self.queue < 0:
            raise ValueError(
                f"Expected alignment >= 0 and queue >= 0, got {self.alignment} and {self.queue}."
            )

    @property
    def needs_source(self) -> bool:
        """True: the moments of the source's features."""
        return True

    @property
    def needs_batch(self) -> bool:
        """True: the other images of a batch are what a view is told from."""
        return True

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the contrastive loss, and the alignment as a term of the batch."""
        objective = super().loss(passes)
        features = self._features(passes)
        if self.recent is not None:
            features = torch.cat([features, self.recent.to(features)])
        mean, covariance = (moment.to(features) for moment in self._source_moments())
        apart = (features.mean(0) - mean).square().sum()
        spread = (features.T.cov() - covariance).square().sum()
        return replace(objective, batch_term=self.alignment * (apart + spread))

    def _source_moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the source's features."""
        if not self.moments or self.moments["count"] < 2:
            raise ValueError(
                "TTTPlusPlus must have seen at least two samples of source data: show it some by "
                "BatchAdapter.fit_source, or run Trainer(callbacks=[callback]).validate(...)."
            )
        count, mean = self.moments["count"], self.moments["sum"] / self.moments["count"]
        return mean, (self.moments["products"] - count * mean.outer(mean)) / (count - 1)

    def predict(self, passes: Passes) -> None:
        """Keep the features of the batch; the prediction is the network's own."""
        found = self._features(passes).detach()
        every = found if self.recent is None else torch.cat([self.recent, found])
        self.recent = every[max(0, len(every) - self.queue) :]

    def _features(self, passes: Passes) -> Tensor:
        head = passes.submodule(HEAD)
        assert isinstance(head, Auxiliary)
        return head.pooled(passes.features_of(head.layer, passes.inputs))

    def fit_source(self, passes: Passes) -> None:
        """Add the features of a batch to the sums."""
        found = self._features(passes).detach().double()
        added = {
            "count": torch.tensor(float(len(found)), dtype=torch.float64, device=found.device),
            "sum": found.sum(0),
            "products": found.T @ found,
        }
        self.moments = {k: v + self.moments.get(k, 0) for k, v in added.items()}

    def source_dict(self) -> dict[str, Any]:
        """Return the sums."""
        return dict(self.moments)

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        """Take them."""
        self.moments = dict(source)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps and the queue."""
        return {**super().state_dict(), "recent": self.recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to them."""
        super().load_state_dict(state)
        self.recent = state["recent"]
