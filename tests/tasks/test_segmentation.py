"""Segmentation with masks: losses and scores against plain torch, and IT3 on maps end to end."""

from functools import partial
from typing import Any

import pytest
import torch
from helpers.task_runs import seeded
from helpers.toy import differing, everything, quiet
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    Conditioning,
    DualPass,
    Entropy,
    FeatureInjection,
    Idempotence,
    InputConcat,
    IT3TestTimeCallback,
    MaskPrior,
)
from it3_lightning.tasks import Completeness, IT3Segmenter, Quality, Segmenter
from it3_lightning.tasks.segmentation import dice_loss, mask_loss

SGD = partial(torch.optim.SGD, lr=0.1)
STILL = partial(torch.optim.SGD, lr=0.0)


class SegNet(nn.Module):
    """Two convolutions with BatchNorm and a stride between them, and a head; full size again."""

    def __init__(self, classes: int = 1) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(B, 3, H, W)` to logits `(B, classes, H, W)`."""
        hidden = self.middle(self.norm(self.down(images)).relu()).relu()
        logits: Tensor = F.interpolate(self.head(hidden), scale_factor=2.0)
        return logits


def samples(count: int = 10, classes: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, 8, 8, generator=generator)
    if classes > 1:
        return images, torch.randint(classes, (count, 8, 8), generator=generator)
    return images, (images.mean(1, keepdim=True) > 0.5).float()


def loader(count: int = 10, classes: int = 1, seed: int = 0, batch: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(count, classes, seed)), batch_size=batch)


def with_priors(
    classes: int = 1,
    prior: MaskPrior | None = None,
    conditioning: Conditioning | None = None,
    **args: Any,
) -> Any:
    given = {"num_classes": classes, "optimizer": SGD, **args}
    return seeded(
        IT3Segmenter(
            SegNet(classes),
            prior=prior or MaskPrior(classes),
            conditioning=conditioning or FeatureInjection("network.middle", hidden=4),
            **given,
        )
    )


def adapting(**settings: Any) -> IT3TestTimeCallback:
    given = {"objective": Idempotence(reliability=None), "optimizer": "sgd", "lr": 0.5}
    return IT3TestTimeCallback(**{**given, **settings})


def scored(model: LightningModule, loaders: Any, *callbacks: Any) -> list[dict[str, float]]:
    logged = quiet(callbacks=list(callbacks)).test(model, loaders, verbose=False)
    return [{key.partition("/dataloader")[0]: v for key, v in scores.items()} for scores in logged]


def iou(found: Tensor, true: Tensor) -> float:
    return ((found & true).sum() / (found | true).sum()).item()


# Losses


def test_binary_loss_is_cross_entropy_and_dice_written_out() -> None:
    logits, target = torch.randn(3, 1, 5, 5), (torch.rand(3, 1, 5, 5) < 0.2).float()
    p = 1 / (1 + (-logits).exp())
    entropy = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    torch.testing.assert_close(mask_loss(logits, target, "ce"), entropy)
    torch.testing.assert_close(mask_loss(logits, target, "dice"), dice)
    torch.testing.assert_close(mask_loss(logits, target.bool()), entropy + dice)


def test_loss_of_classes_is_cross_entropy_and_the_mean_dice_of_the_classes() -> None:
    logits, target = torch.randn(3, 4, 5, 5), torch.randint(4, (3, 5, 5))
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    entropy = -p.gather(1, target[:, None]).log().mean()
    overlaps = []
    for c in range(4):
        true = (target == c).float()
        overlaps.append((2 * (p[:, c] * true).sum() + 1) / (p[:, c].sum() + true.sum() + 1))
    torch.testing.assert_close(mask_loss(logits, target, "ce"), entropy)
    torch.testing.assert_close(dice_loss(logits, target), 1 - torch.stack(overlaps).mean())


def test_losses_of_half_precision_are_taken_in_full() -> None:
    logits = torch.randn(2, 1, 64, 64).bfloat16()
    loss = mask_loss(logits, torch.zeros(2, 1, 64, 64))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mask_loss(logits.float(), torch.zeros(2, 1, 64, 64)))


@pytest.mark.parametrize("kind", ["ce", "dice", "ce+dice"])
@pytest.mark.parametrize("classes", [1, 4])
def test_ignored_pixels_count_in_no_loss(classes: int, kind: Any) -> None:
    logits, target = torch.randn(3, classes, 5, 5), torch.randint(max(2, classes), (3, 5, 5))
    kept = torch.rand(3, 5, 5) < 0.6
    ignored = target.masked_fill(~kept, 255)
    rows = logits.movedim(1, -1)[kept].T[None, :, :, None]  # the pixels that count, as one image
    expected = mask_loss(rows, _like_logits(target[kept][None, :, None], classes), kind)
    given = _like_logits(ignored, classes)
    torch.testing.assert_close(mask_loss(logits, given, kind, ignore_index=255), expected)
    nothing = torch.full_like(given, 255)
    assert mask_loss(logits, nothing, kind, ignore_index=255).item() == 0.0


def _like_logits(masks: Tensor, classes: int) -> Tensor:
    return masks if classes > 1 else masks.unsqueeze(1)


# Scores


class InEval(Callback):
    """Keeps a network in evaluation mode, as a frozen one is."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        pl_module.eval()


@pytest.mark.parametrize("callback", [False, True])
def test_scores_are_of_the_whole_set_and_of_each_dataloader_apart(callback: bool) -> None:
    model = with_priors(tolerance=1.0)
    loaders = [loader(10, seed=0), loader(7, seed=1)]
    callbacks = [adapting(steps=0)] if callback else []
    for index, scores in enumerate(scored(model, loaders, *callbacks)):
        images, masks = samples((10, 7)[index], seed=index)
        with torch.no_grad():
            found = model.eval()(images) > 0
        assert scores["test_iou"] == pytest.approx(iou(found, masks.bool()))
        assert scores["test_quality"] == pytest.approx(Quality(1.0)(found, masks).item())
        complete = Completeness(1.0)(found, masks).item()
        assert scores["test_completeness"] == pytest.approx(complete)


def test_iou_of_classes_is_the_mean_over_classes() -> None:
    model = with_priors(3)
    (scores,) = scored(model, loader(classes=3))
    images, masks = samples(classes=3)
    with torch.no_grad():
        found = model.eval()(images).argmax(1)
    expected = sum(iou(found == c, masks == c) for c in range(3)) / 3
    assert scores["test_iou"] == pytest.approx(expected)
    assert set(scores) == {"test_loss", "test_iou"}


@pytest.mark.parametrize("classes", [1, 3])
def test_iou_is_that_of_the_pixels_that_count(classes: int) -> None:
    model = with_priors(classes, ignore_index=255)
    images, masks = samples(classes=classes)
    kept = torch.rand(masks.shape) < 0.7
    data = TensorDataset(images, masks.long().masked_fill(~kept, 255))
    (scores,) = scored(model, DataLoader(data, batch_size=4))
    with torch.no_grad():
        outputs = model.eval()(images)
    found, true = (outputs.argmax(1) if classes > 1 else outputs > 0)[kept], masks[kept]
    indices = [1] if classes == 1 else range(3)
    expected = sum(iou(found == c, true == c) for c in indices) / len(indices)
    assert scores["test_iou"] == pytest.approx(expected)
    assert 0 < expected < 1


def test_scores_of_roads_know_of_no_pixels_to_ignore() -> None:
    with pytest.raises(ValueError, match="tolerance=None with ignore_index=255"):
        Segmenter(SegNet(), tolerance=1.0, ignore_index=255)


def test_a_run_counts_nothing_of_an_earlier_one_even_if_that_broke_off() -> None:
    model = with_priors()
    (expected,) = scored(with_priors(), loader())
    spoilt = [*loader(seed=3), (torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 4, 4))]
    with pytest.raises(ValueError, match="masks of the outputs' size"):
        scored(model, DataLoader(spoilt, batch_size=None))  # type: ignore[arg-type]
    for _ in range(2):
        assert scored(model, loader()) == [expected]


def test_validation_after_validation_inside_fit_counts_each_epoch_alone() -> None:
    model = with_priors(optimizer=STILL, train="off")
    trainer = quiet(max_epochs=2)
    trainer.validate(model, loader(seed=1), verbose=False)  # in inference mode
    alone = trainer.callback_metrics["val_iou"]
    trainer = quiet(max_epochs=2)
    model.network.norm.momentum = 0.0
    trainer.fit(model, loader(), loader(seed=1))
    torch.testing.assert_close(trainer.callback_metrics["val_iou"], alone)


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_the_label_pass_is_neither_logged_nor_counted(train: Any) -> None:
    both = with_priors(train=train, optimizer=STILL, conditioning_optimizer=STILL, tolerance=1.0)
    both.network.norm.momentum = 0.0
    plain: Any = Segmenter(SegNet(), tolerance=1.0, optimizer=STILL)
    plain.network.load_state_dict(both.network.state_dict())
    plain.network.norm.momentum = 0.0
    logged = []
    for model in (plain, both):
        callbacks: list[Callback] = [InEval()] if train == "conditioning" else []
        trainer = quiet(callbacks=callbacks)
        trainer.fit(model, loader(), loader(seed=1))
        metrics = trainer.callback_metrics.items()
        logged.append({name: value for name, value in metrics if not name.startswith("it3/")})
    assert logged[0].keys() == {"train_loss", "val_loss"} | {
        f"val_{name}" for name in ("iou", "correctness", "completeness", "quality")
    }
    torch.testing.assert_close(logged[1], logged[0])


@pytest.mark.parametrize("shape", [(4, 1, 8, 8), (4, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_binary_masks_come_in_any_type_with_and_without_a_channel(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    model = Segmenter(SegNet())
    outputs, mask = torch.randn(4, 1, 8, 8), torch.rand(4, 1, 8, 8) < 0.3
    expected = mask_loss(outputs, mask)
    found = model.scores(outputs, mask.to(dtype).reshape(shape))["loss"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("outputs", "target"),
    [((2, 1, 8, 8), (2, 1, 4, 4)), ((2, 3, 8, 8), (2, 8, 8)), ((2, 1, 8, 8), (3, 1, 8, 8))],
)
def test_masks_that_do_not_fit_are_refused(
    outputs: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"Expected outputs \(B, 1, H, W\)"):
        Segmenter(SegNet()).scores(torch.zeros(outputs), torch.zeros(target))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dise"}, "Unknown loss 'dise'. Did you mean 'dice'"),
        ({"num_classes": 0}, "num_classes >= 1, got 0"),
        ({"num_classes": 3, "tolerance": 2.0}, "tolerance=None with 3 classes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segmenter(SegNet(), **settings)


# IT3 on maps


KINDS: dict[str, tuple[int, MaskPrior]] = {
    "binary": (1, MaskPrior()),
    "two classes": (1, MaskPrior(2)),
    "classes": (3, MaskPrior(3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["features", "input"])
def test_training_moves_network_and_conditioning_jointly_and_post_hoc_the_conditioning_alone(
    kind: str, where: str
) -> None:
    classes, prior = KINDS[kind]
    parts = {"features": FeatureInjection, "input": InputConcat}
    layer = {"features": "network.middle", "input": "network.down"}[where]
    for train in ("joint", "conditioning"):
        model = with_priors(
            classes,
            prior,
            parts[where](layer),
            train=train,
            conditioning_optimizer=SGD,
            dual_pass=DualPass(own_share=0.5, third_pass=True),
        )
        before = {name: value.clone() for name, value in model.state_dict().items()}
        quiet().fit(model, loader(classes=classes), loader(classes=classes))
        moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
        own = {name for name in before if name.startswith("it3_conditioning")}
        assert own <= moved
        assert (moved == own) == (train == "conditioning")


@pytest.mark.parametrize("kind", KINDS)
def test_adaptation_moves_the_prediction_and_leaves_the_module_as_it_was(kind: str) -> None:
    classes, prior = KINDS[kind]
    model, data = with_priors(classes, prior), loader(8, classes)
    plain: Any = quiet().predict(model, data)
    before = everything(model)
    callback = adapting(steps=2)
    adapted: Any = quiet(callbacks=[callback]).predict(model, data)
    assert differing(before, everything(model)) == []
    assert callback.summary.distance_adapted < callback.summary.distance_source
    assert all(not torch.equal(a, p) for a, p in zip(adapted, plain, strict=True))
    still: Any = quiet(callbacks=[adapting(steps=0)]).predict(model, data)
    assert all(torch.equal(a, p) for a, p in zip(still, plain, strict=True))


def test_one_step_equals_the_gradient_of_the_distance_written_out() -> None:
    model = with_priors()
    images, _ = samples(4)
    net = seeded(with_priors()).eval()
    y0 = net(images).sigmoid()
    frozen = with_priors().eval()
    y1 = frozen.predict_with(images, y0).sigmoid()
    loss = (y0 - y1).square().mean()
    parameters = [p for n, p in net.named_parameters() if not n.startswith("it3_")]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 0.5 * gradient
    predicted: Any = quiet(callbacks=[adapting(steps=1)]).predict(model, loader(4))
    torch.testing.assert_close(predicted[0], net(images).detach())


def test_the_second_prediction_sees_the_first_as_a_map() -> None:
    model = with_priors()
    callback = adapting(steps=0, prediction="second")
    predicted: Any = quiet(callbacks=[callback]).predict(model, loader(4))
    images, _ = samples(4)
    with torch.no_grad():
        first = model.eval()(images)
        expected = model.predict_with(images, first.sigmoid())
    torch.testing.assert_close(predicted[0], expected)
    assert not torch.equal(expected, first)


def test_two_channels_of_a_binary_mask_are_a_distribution() -> None:
    prior, logits = MaskPrior(2), torch.randn(2, 1, 3, 3)
    road = logits.sigmoid()
    torch.testing.assert_close(prior.from_output(logits), torch.cat([1 - road, road], dim=1))
    torch.testing.assert_close(prior.from_output(logits[:, 0]), prior.from_output(logits))
    mask = torch.rand(2, 1, 3, 3) < 0.5
    assert torch.equal(prior.from_target(mask), torch.cat([~mask, mask], dim=1).float())
    both = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(prior.from_output(both), both.softmax(1))


def test_filter_and_entropy_work_on_two_channels_of_a_binary_mask() -> None:
    model = with_priors(prior=MaskPrior(2))
    scored(model, loader(8), callback := IT3TestTimeCallback(objective=Idempotence("js")))
    assert callback.summary.samples == 8
    scored(model, loader(8), entropy := IT3TestTimeCallback(objective=Entropy()))
    assert entropy.summary.distance_adapted < entropy.summary.distance_source
