r"""Test-time augmentation: the mean of the predictions over views of the input; no weight moves.

:math:`p(y \mid x) = \frac{1}{V + 1} \sum_{i=0}^{V} p_\theta(y \mid a_i(x))`, with :math:`a_0` the
identity and the other :math:`a_i` views, as the crops and reflections of Krizhevsky, Sutskever and
Hinton, NeurIPS 2012, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.tent import Entropy
from it3_lightning.methods.terms import check_classes
from it3_lightning.methods.views import View, crop_and_flip, drawn_by, is_images


def mirrored(inputs: Any) -> Any:
    """Return images ``(B, C, H, W)`` mirrored, left and right; other leaves are handed on.

    >>> mirrored(torch.tensor([[[[1.0, 2.0]]]]))
    tensor([[[[2., 1.]]]])
    """
    return tree_map(lambda leaf: leaf.flip(-1) if is_images(leaf) else leaf, inputs)


_OF_IMAGES: tuple[View, ...] = (mirrored, *[crop_and_flip] * 8)


@dataclass(frozen=True)
class TestTimeAugmentation(TestTimeMethod):
    """Predicts the mean over the input and views of it.

    What is logged is the entropy of the network's own prediction. It needs no prior: any
    LightningModule will do.

    Args:
        views: each makes one view of inputs ``(B, ...)``, as transforms of torchvision do; the
            input itself counts as well. Of maps ``(B, C, H, W)``, views must leave every position
            where it is. Default, for images with one class each: :func:`mirrored`, and eight times
            :func:`~it3_lightning.methods.views.crop_and_flip`.
        seed: of what views draw, the same for each batch; other draws are not disturbed.

    Raises:
        ValueError: no views; when evaluated, predictions without classes, or the default views with
            maps or without images.

    >>> TestTimeAugmentation().defaults["steps"]
    0
    """

    views: Sequence[View] | None = None
    seed: int = 0
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __post_init__(self) -> None:
        if self.views is not None and not self.views:
            raise ValueError("Expected at least one view, got none. Leave out views for images.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the network's prediction."""
        check_classes("TestTimeAugmentation", passes.y0)
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        """Return the mean of the predictions over the input and its views."""
        views = self._views(passes)
        with drawn_by(self.seed, 0, passes.inputs):
            others = [passes.other(view(passes.inputs)) for view in views]
        return torch.stack([passes.y0, *others]).mean(0)

    def _views(self, passes: Passes) -> Sequence[View]:
        if self.views is not None:
            return self.views
        check_classes("TestTimeAugmentation() with its default views", passes.y0, maps=False)
        if not any(map(is_images, tree_leaves(passes.inputs))):
            raise ValueError(
                "The default views of TestTimeAugmentation are of images (B, C, H, W), and there "
                "are none among the inputs. Give it views=[...]."
            )
        return _OF_IMAGES
