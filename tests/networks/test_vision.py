"""Networks by name: the library's own inside, normalisation, stems, weights, errors."""

import sys
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import models

from it3_lightning import ClassPrior, FeatureInjection, InputConcat, ValuePrior
from it3_lightning.networks import TimmNetwork, TorchvisionNetwork
from it3_lightning.tasks import IT3Classifier, IT3Regressor

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def images(size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def normalised(values: Tensor) -> Tensor:
    channels = [(values[:, c] - MEAN[c]) / STD[c] for c in range(3)]
    return torch.stack(channels, dim=1)


def test_torchvision_network_is_the_librarys_on_normalised_images() -> None:
    network = TorchvisionNetwork("resnet18", num_classes=7).eval()
    reference = models.resnet18(num_classes=7).eval()
    reference.load_state_dict(network.model.state_dict())
    assert torch.allclose(network(images()), reference(normalised(images())), atol=1e-5)


def test_timm_network_is_the_librarys_on_normalised_images() -> None:
    network = TimmNetwork("resnet10t", num_classes=7).eval()
    reference = timm.create_model("resnet10t", num_classes=7).eval()
    reference.load_state_dict(network.model.state_dict())
    assert torch.allclose(network(images()), reference(normalised(images())), atol=1e-5)


def test_timm_tells_the_mean_of_its_networks_unless_one_is_given() -> None:
    assert TimmNetwork("test_vit", image_size=32).normalize.mean.flatten().tolist() == [0.5] * 3
    given = TimmNetwork("test_vit", image_size=32, mean=[0.0, 0.25, 0.5], std=[1.0, 2.0, 4.0])
    x = torch.ones(1, 3, 1, 1)
    assert given.normalize(x).flatten().tolist() == [1.0, 0.375, 0.125]


def test_normalisation_is_no_part_of_the_weights() -> None:
    network = TorchvisionNetwork("resnet18", num_classes=7)
    assert {name.split(".")[0] for name in network.state_dict()} == {"model"}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        # (features after the stem, and at the end) of an image of 32 pixels
        ("resnet18", [(64, 32), (512, 4)]),
        ("resnet50", [(64, 32), (2048, 4)]),
        ("test_resnet", [(32, 32), (96, 4)]),
        ("dla34", [(16, 32), (512, 4)]),
        ("dla46_c", [(16, 32), (256, 4)]),
    ],
)
def test_the_stem_for_small_images_keeps_their_size(
    name: str, shapes: list[tuple[int, int]]
) -> None:
    network: Any = TimmNetwork(name, num_classes=10, stem="cifar").eval()
    first = network.model.conv1 if hasattr(network.model, "conv1") else network.model.base_layer[0]
    seen = [first(images()), network.model.forward_features(images())]
    assert [(f.shape[1], f.shape[2]) for f in seen] == shapes
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    assert network(images()).shape == (2, 10)


def test_resnet18_for_cifar_has_as_many_weights_as_the_one_in_use() -> None:
    network = TimmNetwork("resnet18", num_classes=10, stem="cifar")
    assert sum(p.numel() for p in network.parameters()) == 11_173_962


def test_transformers_take_images_of_the_size_given() -> None:
    network = TimmNetwork("test_vit", num_classes=5, image_size=48).eval()
    assert network(images(48)).shape == (2, 5)


# --- pretrained weights, without a download


def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Have torchvision find these weights where it would download its own."""
    state: dict[str, Tensor] = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda *_, **__: state)
    return state


def test_pretrained_weights_are_taken_whole_for_their_classes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = pretended(monkeypatch)
    network = TorchvisionNetwork("resnet18", weights="DEFAULT")
    own = network.model.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], state[name]) for name in state)


def test_another_number_of_outputs_keeps_all_weights_but_the_last_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = pretended(monkeypatch)
    network = TorchvisionNetwork("resnet18", num_classes=1, weights="IMAGENET1K_V1")
    own = network.model.state_dict()
    other = [name for name in state if not torch.equal(own[name], state[name])]
    assert other == ["fc.weight", "fc.bias"]
    assert own["fc.weight"].shape == (1, 512)


def test_no_weights_can_be_said_on_a_command_line() -> None:
    torch.manual_seed(0)
    named = TorchvisionNetwork("resnet18", num_classes=2, weights="none")
    torch.manual_seed(0)
    plain = TorchvisionNetwork("resnet18", num_classes=2)
    assert torch.equal(named(images()), plain(images()))


# --- as networks of a task


@pytest.mark.parametrize(
    ("name", "stem", "layer"),
    [
        ("resnet10t", "cifar", "network.model.layer2"),
        ("dla46_c", "cifar", "network.model.level4"),
        ("test_vit", "default", "network.model.blocks.1"),
    ],
)
def test_a_prior_changes_what_a_network_predicts_and_no_prior_does_not(
    name: str, stem: Any, layer: str
) -> None:
    size = 32 if "vit" in name else None
    network = TimmNetwork(name, num_classes=10, stem=stem, image_size=size)
    model = IT3Classifier(network, prior=ClassPrior(10), conditioning=FeatureInjection(layer))
    model.eval()
    plain = network(images())
    for parameter in model.it3_parts()[1].parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.predict_with(images(), None), plain)
    shown = model.predict_with(images(), torch.eye(10)[:2])
    assert (shown - plain).abs().max() > 1e-3


def test_the_prior_of_ages_is_a_further_input_channel() -> None:
    network = TorchvisionNetwork("resnet18", num_classes=1)
    conditioning = InputConcat("network.model.conv1")
    prior = ValuePrior(mean=30.0, std=10.0)
    model = IT3Regressor(network, prior=prior, conditioning=conditioning).eval()
    extra: Any = conditioning.extra["network-model-conv1"]
    nn.init.normal_(extra.weight, generator=torch.Generator().manual_seed(1))
    first: Any = network.model.get_submodule("conv1")
    wide = nn.Conv2d(5, 64, 7, stride=2, padding=3, bias=False)
    wide.weight.data = torch.cat([first.weight.data, extra.weight.data], dim=1)
    values = torch.tensor([1.5, 1.0]).view(1, 2, 1, 1).expand(2, 2, 32, 32)  # 45 years, present
    seen: list[Tensor] = []
    first.register_forward_hook(lambda _, __, output: seen.append(output))
    model.predict_with(images(), prior.from_target(torch.tensor([[45.0], [45.0]])))
    expected = wide(torch.cat([normalised(images()), values], dim=1))
    assert torch.allclose(seen[0], expected, atol=1e-4)


# --- errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TorchvisionNetwork("resnet19"), "Unknown torchvision network 'resnet19'"),
        (lambda: TorchvisionNetwork("resnet18", weights="V1"), "Unknown weights of resnet18 'V1'"),
        (lambda: TorchvisionNetwork("resnet18", std=[1.0, 0.0, 1.0]), "positive standard dev"),
        (lambda: TorchvisionNetwork("resnet18", mean=[0.5]), "for each channel"),
        (lambda: TimmNetwork("resnet19"), "Unknown timm network 'resnet19'"),
        (lambda: TimmNetwork("test_vit", stem="cifar"), "a ResNet or DLA .*, got test_vit"),
        (lambda: TimmNetwork("resnet18", stem="cifa"), "Unknown stem 'cifa'"),  # type: ignore[arg-type]
        (lambda: TimmNetwork("resnet18", stem="cifar", pretrained=True), "for another stem"),
        (lambda: TimmNetwork("resnet18", image_size=32), "no image_size for resnet18, got 32"),
    ],
)
def test_what_does_not_exist_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_without_timm_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[vision\]'"):
        TimmNetwork("resnet18")
