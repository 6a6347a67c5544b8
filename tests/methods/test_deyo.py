"""DeYO against its paper in plain torch: filters, weights, destroyed objects, orders by a seed.

The published code (github.com/Jhyun17/DeYO) agrees in filters, weights and patches. Three things
differ: it shows the network only those destroyed images whose entropy passed, so that statistics of
the batch are of these; its orders come from the process's generator, that of pixels once for all
images; its predictions are those before the step. torch-ttt 0.0.2 sends gradients through the
weights, which the published code does not.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.method_runs import NEVER, RESETS, batches, from_yaml
from helpers.online import (
    LR,
    adapter_of,
    assert_close,
    entropies,
    network,
    of_batches,
    outputs_of,
    plain_module,
    predicted,
    run,
)
from torch import Tensor, nn

from it3_lightning import DeYO, TestTimeCallback
from it3_lightning.methods.deyo import occluded, shuffled

Destroy = Callable[[Tensor, int], Tensor]
GIVEN: dict[str, Any] = {"tau_entropy": 0.9, "tau_plpd": 0.0}  # some of three classes pass


def patches(x: Tensor, seed: int, side: int = 2) -> Tensor:
    """Shuffle patches of this side, one after the other."""
    rows, columns = x.shape[2] // side, x.shape[3] // side
    generator = torch.Generator().manual_seed(seed)
    orders = torch.rand(len(x), rows * columns, generator=generator).argsort(1)
    found = torch.empty_like(x)
    for image, order in enumerate(orders.tolist()):
        for to, source in enumerate(order):
            i, j = divmod(to, columns)
            k, m = divmod(source, columns)
            into = found[image, :, i * side : (i + 1) * side, j * side : (j + 1) * side]
            into.copy_(x[image, :, k * side : (k + 1) * side, m * side : (m + 1) * side])
    return found


def pixels(x: Tensor, seed: int) -> Tensor:
    return patches(x, seed, 1)


def middle(x: Tensor, seed: int) -> Tensor:
    found = x.clone()
    for image in found:
        image[:, 1:3, 1:3] = image.mean((1, 2))[:, None, None]
    return found


def mirrored(x: Tensor, seed: int) -> Tensor:
    return x.flip(3)


KINDS: dict[str, tuple[Any, Destroy]] = {
    "patch": ("patch", patches),
    "pixel": ("pixel", pixels),
    "occlusion": ("occlusion", middle),
    "own": (lambda x: x.flip(3), mirrored),
}


def by_hand(
    source: nn.Module,
    stream: list[Tensor],
    destroy: Destroy = patches,
    every: int = NEVER,
    steps: int = 1,
    seed: int = 0,
) -> tuple[list[Tensor], list[int]]:
    """DeYO as its paper has it; return outputs, and how many samples each step was taken by."""
    outputs, counts = [], []
    for batch, x in enumerate(stream):
        if batch % every == 0:
            net, weights = of_batches(source)
            optimizer = torch.optim.SGD(weights, lr=LR, momentum=0.9)
            taken = 0
        for _ in range(steps):
            logits = net(x)
            e, p = entropies(logits), logits.softmax(1).detach()
            q = net(destroy(x, seed + taken)).softmax(1).detach()
            taken += 1
            terms = []
            for i, label in enumerate(p.argmax(1).tolist()):
                plpd, entropy = float(p[i, label] - q[i, label]), float(e[i].detach())
                if entropy < GIVEN["tau_entropy"] * math.log(3) and plpd > GIVEN["tau_plpd"]:
                    alpha = 1 / math.exp(entropy - 0.4 * math.log(3)) + 1 / math.exp(-plpd)
                    terms.append(alpha * e[i])
            counts.append(len(terms))
            if terms:
                optimizer.zero_grad()
                torch.autograd.backward(torch.stack(terms).mean())
                optimizer.step()
        outputs.append(net(x).detach())
    return outputs, counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reset", RESETS)
def test_a_stream_is_adapted_to_as_in_the_paper_whatever_bad_batches_are_in_it(
    kind: str, reset: Any
) -> None:
    transform, destroy = KINDS[kind]
    expected, counts = by_hand(network(), batches(), destroy, RESETS[reset], 2, seed=3)
    assert 0 <= min(counts) < max(counts) < 8
    method = DeYO(**GIVEN, transform=transform, patches=2, seed=3)
    assert_close(outputs_of(method, network(), batches(), reset=reset, steps=2), expected)


def test_measuring_changes_nothing() -> None:
    expected, _ = by_hand(network(), batches())
    found = outputs_of(DeYO(**GIVEN, patches=2), network(), batches(), measure=False)
    assert_close(found, expected)


def test_an_untouched_module_is_adapted_and_left_as_it_was() -> None:
    module = plain_module()
    expected, counts = by_hand(module.net, batches())
    callback = TestTimeCallback(DeYO(**GIVEN, patches=2), lr=LR)
    assert_close(predicted(callback, module, batches()), expected)
    assert 0 < callback.summary.moved == sum(counts) < 40
    assert_close(predicted(callback, module, batches()), expected)  # once more, from the start


def test_orders_are_by_the_seed_alone() -> None:
    found, net = [], network()
    for seed, global_seed in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        found.append(outputs_of(DeYO(**GIVEN, seed=seed), net, batches()))
        assert torch.equal(before, torch.get_rng_state())
    assert_close(found[0], found[1])
    assert not torch.equal(found[0][-1], found[2][-1])


def test_a_sample_by_itself_does_not_depend_on_its_batch() -> None:
    given: dict[str, Any] = {"norm_stats": "source", "reset": "batch"}
    x, net = batches(1)[0], network()
    method = DeYO(tau_entropy=1.0, tau_plpd=-1.0, patches=2)
    settings = {**method.defaults, **given, "scope": "sample", "lr": LR}
    module = plain_module()
    whole = predicted(TestTimeCallback(method, **settings), module, [x])[0]
    ones = run(adapter_of(method, net, **given), net, [x[i : i + 1] for i in range(len(x))])
    alone = [torch.as_tensor(each.outputs) for each in ones]
    assert_close([whole[i : i + 1] for i in range(len(x))], alone)


@pytest.mark.parametrize("size", [(4, 4), (7, 9), (224, 160)])
def test_patches_keep_the_size_and_are_as_many_as_named(size: tuple[int, int]) -> None:
    x = torch.rand(3, 2, *size)
    found = shuffled(x, (4, 4), torch.Generator().manual_seed(0))
    assert found.shape == x.shape
    assert not torch.equal(found, x)
    if size != (7, 9):  # where 4 divides the sides, pixels move and are not mixed
        for channel in (0, 1):
            ours, theirs = (each[:, channel].flatten(1).sort(1).values for each in (found, x))
            assert torch.equal(ours, theirs)


def test_nested_inputs_keep_what_are_no_images() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            logits: Tensor = self.net(x["image"]) * x["scale"]
            return logits

    net, stream = Scaled(), [{"image": x, "scale": torch.ones(8, 1)} for x in batches()]
    adapter = adapter_of(DeYO(**GIVEN, patches=2), net)
    found = []
    for x in stream:
        with adapter.adapted(x):
            found.append(net(x).detach())
    assert_close(found, by_hand(network(), batches())[0])


def test_its_papers_settings_are_its_defaults() -> None:
    method = DeYO()
    assert (method.tau_entropy, method.tau_plpd, method.margin) == (0.5, 0.3, 0.4)
    assert (method.transform, method.patches) == ("patch", 4)
    settings = TestTimeCallback(method).settings
    assert (settings.parameters, settings.norm_stats, settings.reset) == ("norm", "batch", "never")
    assert settings.moves == ("momentum", 2.5e-4)
    assert from_yaml("DeYO", tau_plpd=0.2, transform="pixel") == DeYO(0.5, 0.2, transform="pixel")
    own = from_yaml("DeYO", transform="it3_lightning.methods.deyo.occluded")
    assert own.transform is occluded


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau_entropy": 0.0}, "Expected tau_entropy > 0, a share of ln C, got 0.0"),
        ({"margin": -1.0}, "Expected margin > 0, a share of ln C, got -1.0"),
        ({"tau_plpd": 2.0}, r"Expected tau_plpd in \[-1, 1\], got 2.0"),
        ({"transform": "patches"}, "Unknown transform 'patches'. Did you mean 'patch'"),
        ({"patches": 1}, "Expected at least two patches a side, got 1"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeYO(**given)


def test_what_cannot_be_destroyed_is_refused() -> None:
    table = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)).double()
    x = batches(1)[0]
    with pytest.raises(ValueError, match=r"DeYO destroys objects in images .* found none among"):
        run(adapter_of(DeYO(), table), table, [x.flatten(1)])
    with pytest.raises(ValueError, match=r"at least 5 x 5 pixels .* got 4 x 4. Set fewer"):
        run(adapter_of(DeYO(patches=5), net := network()), net, [x])
    maps = nn.Conv2d(1, 3, 1).double()
    with pytest.raises(ValueError, match="DeYO needs one class vector"):
        run(adapter_of(DeYO(), maps, parameters="all"), maps, [x])
