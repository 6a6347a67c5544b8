"""Models of a benchmark: trained once, kept as states, and what they and their scores depend on."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model
from lightning.pytorch import Trainer, seed_everything

from it3_lightning import ClassPrior, DualPass, FeatureInjection, RandomNoise
from it3_lightning.benchmark import Results, Row, Tuning, models
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.models import about, models_of, posthoc_model
from it3_lightning.data import DigitsDataModule
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.tasks import Classifier, IT3Classifier


def test_kept_scores_hold_only_for_the_same_model(tmp_path: Path) -> None:
    def settings(**args: Any) -> str:
        given = {
            "prior": ClassPrior(10),
            "conditioning": FeatureInjection("network.dense1"),
            **args,
        }
        model = IT3Classifier(SmallCNN(1, 10, 8, width=4, hidden=16), **given)
        return json.dumps(about(benchmark(tmp_path), model, digits())["settings"], sort_keys=True)

    assert settings() == settings()
    changes: list[dict[str, Any]] = [
        {"prior": ClassPrior(10, neutral="uniform")},
        {"conditioning": FeatureInjection("network.dense1", mode="film")},
        {"dual_pass": DualPass(own_share=0.5)},
        {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
    ]
    assert len({settings(), *(settings(**change) for change in changes)}) == 5


def test_a_model_without_the_mixin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"class IT3Net\(IT3Mixin, Classifier\): pass"):
        benchmark(tmp_path).run(lambda: Classifier(MLP(64, 10)), digits())


def test_post_hoc_source_row_equals_the_ordinary_one_exactly(
    finished: tuple[Path, Results],
) -> None:
    _, results = finished
    for name in ("source", "batch statistics"):
        for stream in ("equal", "unequal"):
            for shift in ("clean", "contrast"):
                ordinary, posthoc = (
                    results.scores(Row(training, name), stream, [shift])
                    for training in ("ordinary", "post-hoc")
                )
                assert ordinary == posthoc


def test_a_pretrained_model_is_not_trained_ordinarily(tmp_path: Path) -> None:
    results = benchmark(tmp_path, pretrained=True).run(make_model, digits())
    seed_everything(0, verbose=False)  # the weights it came with
    model = make_model().eval()
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in digits().test_dataloader()[0]]
    score = results.scores(Row("ordinary", "source"), "equal", ["clean"])[0]
    assert score == pytest.approx(100 * torch.cat(right).float().mean().item())


def test_another_recipe_trains_nothing_and_leaves_the_other_rows_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = functools.partial(
        benchmark, tmp_path, rows="all", metric="test_loss", percent=False, higher_is_better=False
    )
    first = losses().run(make_model, digits())
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    with pytest.warns(UserWarning, match="adam_episodic_lr 0.05 instead of 0.001"):
        second = losses(recipe=Recipe(adam_episodic_lr=0.05)).run(make_model, digits())
    assert len(first.records) == len(second.records)
    changed = set()
    for before, after in zip(first.records, second.records, strict=True):
        assert (before.row, before.shift) == (after.row, after.shift)
        if before.score != after.score:
            changed.add(before.row)
    assert "published objective, episodic" in changed
    assert all("episodic" in row or "each sample" in row for row in changed)


def test_other_samples_to_evaluate_on_train_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark(tmp_path).run(make_model, digits())
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    data = digits()
    data.evaluate_on, data.shifts, data.severity = "validation", ("shear",), 2
    with pytest.warns(UserWarning, match="of other settings: data.evaluate_on 'validation'"):
        results = benchmark(tmp_path).run(make_model, data)
    assert results.shifts == ["clean", "shear"]


def other_model() -> IT3Classifier:
    return IT3Classifier(
        SmallCNN(1, 10, 8, width=8, hidden=16),
        prior=ClassPrior(10),
        conditioning=FeatureInjection("network.dense1"),
    )


@pytest.mark.parametrize("command", ["benchmark", "tune"])
def test_a_folder_with_another_run_is_refused_before_anything_is_trained(
    command: str, finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished

    def refused(difference: str, make: Any, data: DigitsDataModule, **settings: Any) -> None:
        given = benchmark(folder, **settings)
        with pytest.raises(FileExistsError, match=rf"{folder.name} holds a run .*{difference}"):
            given.run(make, data) if command == "benchmark" else Tuning().run(given, make, data)

    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused("benchmark.epochs 2 instead of 1", make_model, digits(), epochs=2)
    refused("data.train_size 150 instead of 200", make_model, digits(train_size=150))
    refused("model.layers", other_model, digits())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_another_version_trains_again_in_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark(tmp_path).run(make_model, digits())
    (tmp_path / "seed_0.json").unlink()
    fits, fit = [], Trainer.fit

    def counted(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        fits.append(trainer.max_epochs)
        fit(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", counted)
    monkeypatch.setattr(models, "version", lambda _: "9.9")
    with pytest.warns(
        UserWarning, match=r"seed_0\.ckpt is of other .*versions.it3_lightning '9.9'"
    ):
        benchmark(tmp_path).run(make_model, digits())
    assert fits == [2, 1, 1]


def test_kept_models_are_states_alone_and_a_damaged_file_trains_again(tmp_path: Path) -> None:
    first = benchmark(tmp_path).run(make_model, digits())
    file = tmp_path / "models" / "seed_0.ckpt"
    states = torch.load(file, weights_only=True)["states"]
    assert set(states) == {"ordinary", "joint", "post-hoc"}
    assert all(name.startswith("it3_") for name in states["post-hoc"])
    assert states["joint"].keys() == make_model().state_dict().keys()
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "seed_0.json").unlink()
    with pytest.warns(UserWarning, match=r"seed_0\.ckpt is damaged .* It is made again"):
        again = benchmark(tmp_path).run(make_model, digits())
    assert [r.score for r in again.records] == [r.score for r in first.records]


def test_the_post_hoc_model_alone_is_that_of_all_trainings_bit_for_bit(tmp_path: Path) -> None:
    said: list[str] = []

    def model(folder: str) -> IT3Classifier:
        settings = benchmark(tmp_path / folder)
        return posthoc_model(settings, 0, make_model, digits(), said.append, {"a": 1})  # type: ignore[return-value]

    alone, again = model("alone"), model("alone")
    assert said == ["seed 0: training, ordinary", "seed 0: training, post-hoc"]
    settings, given = benchmark(tmp_path / "all"), (make_model, digits(), said.append, {"a": 1})
    every = models_of(settings, 0, *given)["post-hoc"]
    for other in (again, every, model("all")):
        for name, value in alone.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    assert not (tmp_path / "alone" / "models" / "seed_0.ckpt").exists()
    assert said.count("seed 0: training, joint") == 1


def by_hand(epochs: int) -> IT3Classifier:
    """Train as an ordinary module does, seed 0, half of each batch with noise."""
    seed_everything(0, verbose=False)
    model, loader, noise = make_model(), digits().train_dataloader(), RandomNoise()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for images, labels in loader:
            present = torch.rand(len(images)) < 0.5
            x = torch.where(present[:, None, None, None], noise(images), images)
            optimizer.zero_grad()
            torch.autograd.backward(torch.nn.functional.cross_entropy(model(x), labels))
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("controls")
    settings = benchmark(folder, controls=True, distance_samples=0)
    return folder, settings.run(make_model, digits())


def states(folder: Path, training: str) -> dict[str, torch.Tensor]:
    content = torch.load(folder / "models" / f"seed_0_{training.replace(' ', '_')}.ckpt")
    return dict(content["states"])


def test_the_control_of_perturbed_inputs_is_ordinary_training_on_them(
    controlled: tuple[Path, Results],
) -> None:
    folder, _ = controlled
    reference = by_hand(epochs=2)
    found = states(folder, "perturbed")
    for name, weight in reference.network.named_parameters():
        torch.testing.assert_close(found[f"network.{name}"], weight.data)


def test_conditionings_of_controls_leave_their_network_alone(
    controlled: tuple[Path, Results],
) -> None:
    folder, results = controlled
    network = {k: v for k, v in states(folder, "perturbed").items() if k.startswith("network.")}
    widths = {}
    for training in ("perturbed post-hoc", "perturbed unequal", "perturbed context"):
        found = states(folder, training)
        assert all(torch.equal(found[name], weight) for name, weight in network.items())
        (first,) = (v for k, v in found.items() if k.endswith("first.weight"))
        widths[training] = first.shape[1]
        assert any(v.any() for k, v in found.items() if k.endswith("last.weight"))  # it has learnt
    assert list(widths.values()) == [10, 10, 20]  # the context is as wide as the prior
    for name in ("source", "batch statistics"):
        scores = {
            tuple(results.scores(row, "equal", ["contrast"]))
            for row in results.rows
            if row.training.startswith("perturbed") and row.name == name
        }
        assert len(scores) == 1


def test_controls_are_trained_once_and_only_for_their_rows(
    controlled: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = controlled
    fitted = []
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: fitted.append(1))
    again = benchmark(folder, controls=True, distance_samples=0).run(make_model, digits())
    assert again.records == results.records
    (folder / "models" / "seed_0_perturbed_context.ckpt").unlink()
    given: dict[str, Any] = {
        "controls": True,
        "distance_samples": 0,
        "streams": ("equal", "correlated"),
    }
    benchmark(folder, rows=["perturbed unequal: *"], **given).run(make_model, digits())
    assert not fitted
    some = benchmark(folder, rows=["perturbed context: second prediction"], **given)
    with pytest.warns(UserWarning, match="the conditioning has not been trained"):  # nothing fits
        results = some.run(make_model, digits())
    named = [(r.training, r.name) for r in results.rows]
    assert named == [
        ("perturbed context", name) for name in ("source", "batch statistics", "second prediction")
    ]
    assert len(fitted) == 1


def test_on_a_network_that_is_given_controls_are_conditionings_alone(tmp_path: Path) -> None:
    settings = benchmark(tmp_path, controls=True, pretrained=True, distance_samples=0)
    trainings = {row.training for row in settings.run(make_model, digits()).rows}
    assert trainings == {"ordinary", "joint", "post-hoc", "post-hoc unequal", "post-hoc context"}


def test_a_row_that_is_not_there_is_named_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=r"Unknown row 'joint: tent'.*ordinary: Tent"):
        benchmark(tmp_path, rows=["joint: tent"]).run(make_model, digits())
