"""TTT-MAE: agreement with a plain implementation of its paper, for maps and for tokens.

The paper's public code leaves masked tokens out of a vision transformer; here they are zeros.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.auxiliary import TTTNet, adapter_of, descend, headed, run, with_refused
from helpers.modules import bits, changed, drawn
from helpers.toy import differing, doubles, everything, loader, quiet, samples, seeded
from torch import Tensor, nn

from it3_lightning import TTTMAE, MaskedPatches, TestTimeCallback

LR, PATCH = 0.02, 2


class Tokens(nn.Module):
    """A small transformer over patches of 2 x 2, with a class token in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.first = nn.Parameter(torch.zeros(1, 1, 6))
        self.mix = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(patches_of(x))
        tokens = torch.cat([self.first.expand(len(x), 1, 6), patches], 1)
        logits: Tensor = self.head(self.mix(tokens)[:, 0])
        return logits


def patches_of(x: Tensor) -> Tensor:
    """Cut images (B, 1, 4, 4) into the pixels of four patches, (B, 4, 4), row by row."""
    rows = [x[:, 0, i : i + 2, j : j + 2].flatten(1) for i in (0, 2) for j in (0, 2)]
    return torch.stack(rows, 1)


def mae_loss(
    features: Callable[[Tensor], Tensor], head: nn.Module, x: Tensor, generator: Any, share: float
) -> Tensor:
    """The squared error over masked patches, of one image after the other."""
    drawn = torch.rand(len(x), 4, generator=generator)
    losses = []
    for image, numbers in zip(x, drawn, strict=True):
        hidden = sorted(range(4), key=lambda n: float(numbers[n]))[: round(4 * share)]
        masked = image.clone()
        for n in hidden:
            masked[:, 2 * (n // 2) : 2 * (n // 2) + 2, 2 * (n % 2) : 2 * (n % 2) + 2] = 0
        decoded, whole = head(features(masked[None])), patches_of(image[None])
        errors = torch.stack([((decoded[0, n] - whole[0, n]) ** 2).mean() for n in hidden])
        losses.append(errors.mean())
    return torch.stack(losses).mean()


def of_maps(own: Any) -> Callable[[Tensor], Tensor]:
    """ToyNet's convolution: maps of 2 x 2, as many positions as patches."""
    return lambda x: own.conv(x).flatten(2).transpose(1, 2)


def of_tokens(own: Any) -> Callable[[Tensor], Tensor]:
    def features(x: Tensor) -> Tensor:
        tokens = torch.cat([own.first.expand(len(x), 1, 6), own.embed(patches_of(x))], 1)
        patches: Tensor = own.mix(tokens)[:, 1:]
        return patches

    return features


def head(layer: str, channels: int, share: float = 0.75) -> MaskedPatches:
    return MaskedPatches(layer, channels, image_channels=1, patch=PATCH, share=share, hidden=5)


def convolutional(share: float) -> nn.Module:
    return headed(head("conv", 2, share))


def transformer(share: float) -> nn.Module:
    net = drawn(Tokens())
    net.it3_auxiliary = seeded(head("mix", 6, share).double(), 1)
    return net.eval()


KINDS = [(convolutional, of_maps), (transformer, of_tokens)]


@pytest.mark.parametrize(("make", "features_of"), KINDS, ids=["maps", "tokens"])
@pytest.mark.parametrize("reset", ["batch", "never", 2])
@pytest.mark.parametrize(("share", "masks", "steps"), [(0.75, 1, 2), (0.5, 3, 1)])
def test_every_batch_adapts_as_in_the_paper_and_after_one_that_was_refused(
    make: Any, features_of: Any, reset: Any, share: float, masks: int, steps: int
) -> None:
    net = make(share)
    adapter = adapter_of(net, TTTMAE(masks=masks, seed=3), lr=LR, reset=reset, steps=steps)
    before = bits(net)
    batches, bad = with_refused(3)
    own, taken, seen = copy.deepcopy(net), 0, 0
    for x in batches:
        state = torch.get_rng_state()
        found = run(adapter, x, net)
        assert torch.equal(state, torch.get_rng_state())
        if bad(x):
            assert found.reason == "non-finite output"
            continue
        if reset == "batch" or (reset == 2 and seen % 2 == 0):
            own, taken = copy.deepcopy(net), 0
        seen += 1
        weights = [p for name, p in own.named_parameters() if not name.startswith("it3_")]
        for _ in range(steps):
            views = torch.stack([image for image in x for _ in range(masks)])
            generator = torch.Generator().manual_seed(3 + taken)
            task = own.it3_auxiliary.head
            descend(mae_loss(features_of(own), task, views, generator, share), weights, LR)
            taken += 1
        torch.testing.assert_close(found.outputs, own(x).detach(), rtol=0, atol=1e-9)
    assert changed(before, net) == []


def test_fitting_minimises_the_error_of_masked_patches_too() -> None:
    with doubles():
        module = seeded(TTTNet(auxiliary=head("net.conv", 2)))
        x = samples(6)[0]
        torch.manual_seed(0)
        found = module.it3_auxiliary_loss((x, None))
        torch.manual_seed(0)
        expected = mae_loss(of_maps(module.net), module.it3_auxiliary.head, x, None, 0.75)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_trained_module_adapts_to_each_sample_whatever_its_batch_and_stays() -> None:
    module = seeded(TTTNet(auxiliary=head("net.conv", 2)))
    quiet().predict(module, loader(6))  # a Trainer leaves something of its own
    before = everything(module)

    def predicted(batch: int) -> Tensor:
        callback = TestTimeCallback(TTTMAE(masks=2), lr=LR, steps=2)
        found: Any = quiet(callbacks=[callback]).predict(module, loader(6, batch=batch))
        return torch.cat(found)

    torch.testing.assert_close(predicted(6), predicted(1), rtol=0, atol=1e-6)
    assert not torch.equal(predicted(6), torch.cat(quiet().predict(module, loader(6))))  # type: ignore[arg-type]
    assert differing(before, everything(module)) == []


def test_maps_of_another_size_are_brought_to_the_grid_of_patches() -> None:
    task = head("layer", 3)
    maps = torch.rand(2, 3, 8, 8)
    found = task._at_patches(maps, 2, 2)
    quarters = [maps[:, :, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
    expected = torch.stack([quarter.mean((2, 3)) for quarter in quarters])
    torch.testing.assert_close(found, expected.transpose(0, 1))
    torch.testing.assert_close(task._at_patches(maps.movedim(1, -1), 2, 2), found)


def reconstructed(images: tuple[int, ...], features: tuple[int, ...]) -> Tensor:
    loss: Tensor = head("layer", 8)(torch.ones(images), lambda _: torch.ones(features))
    return loss


def test_its_papers_settings_are_its_defaults() -> None:
    settings = TestTimeCallback(TTTMAE()).settings
    assert (settings.scope, settings.reset, settings.steps) == ("sample", "batch", 20)
    assert settings.moves == ("momentum", 5e-3)
    assert (TTTMAE().masks, MaskedPatches("layer", 8).share) == (128, 0.75)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TTTMAE(masks=0), "at least one mask, got 0"),
        (lambda: MaskedPatches("layer", 8, patch=0), "Expected patch >= 1"),
        (lambda: MaskedPatches("layer", 8, share=1.0), r"share in \(0, 1\)"),
        (lambda: reconstructed((2, 3, 4, 4), (2, 4, 8)), "image_channels and patch"),
        (lambda: reconstructed((2, 1, 5, 4), (2, 4, 8)), "multiples of 2"),
        (lambda: reconstructed((2, 1, 2, 2), (2, 4, 8)), "Give a smaller patch"),
        (lambda: reconstructed((2, 1, 4, 4), (2, 8)), "before positions are lost"),
        (lambda: reconstructed((2, 1, 4, 4), (2, 3, 8)), "tokens of 4 patches"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
