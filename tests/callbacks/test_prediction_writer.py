"""A row for each predicted sample: what it holds, and runs that are cut short and gone on with."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning
import torch
from helpers.task_runs import regressor
from helpers.toy import (
    Batch,
    IT3Net,
    LitNet,
    adapting,
    differing,
    everything,
    loader,
    net,
    quiet,
    samples,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from PIL import Image
from pyarrow import parquet
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from it3_lightning import IT3PredictionWriter, LabelsPrior, Tent, TestTimeCallback
from it3_lightning.callbacks.prediction_writer import Outputs
from it3_lightning.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs"
RESULT = ["distance_source", "distance_adapted", "moved", "skipped", "gated"]


def rows(folder: Path) -> list[dict[str, str]]:
    """Read the table of a folder."""
    with (folder / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def column(found: list[dict[str, str]], name: str) -> Tensor:
    """Return the numbers of a column; nothing is NaN."""
    return torch.tensor([float(row[name] or "nan") for row in found])


def written(folder: Path, model: Any, data: Any, *callbacks: Any, **given: Any) -> Any:
    """Predict into a folder; return the table and what ``predict`` returned."""
    writer = IT3PredictionWriter(folder, **given)
    returned: Any = quiet(callbacks=[writer, *callbacks]).predict(model, data)
    return rows(folder), returned


def plain(model: Any, images: Tensor) -> Tensor:
    """Return the network's own logits."""
    with torch.no_grad():
        logits: Tensor = model.eval()(images)
    return logits


# What it holds


def test_a_row_says_what_became_of_a_sample(tmp_path: Path) -> None:
    model, callback = net(), adapting(lr=0.5)
    found, returned = written(tmp_path, model, loader(), callback, scores=True)
    assert [int(row["index"]) for row in found] == list(range(12))
    shares, source = torch.cat(returned).softmax(1), plain(model, samples()[0]).softmax(1)
    assert not torch.allclose(shares, source, atol=0.05)
    for whose, expected in (("predicted", shares), ("source", source)):
        largest, named = expected.max(1)
        torch.testing.assert_close(column(found, f"{whose}_class"), named.float())
        torch.testing.assert_close(column(found, f"{whose}_probability"), largest)
        scores = torch.stack([column(found, f"{whose}_score_{i}") for i in range(3)], 1)
        torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(column(found, "distance_source"), callback.summary.distances[0])
    mean = column(found, "distance_adapted").mean().item()
    assert mean == pytest.approx(callback.summary.distance_adapted)
    for name, value in (("moved", "True"), ("skipped", "False"), ("gated", "False")):
        assert {row[name] for row in found} == {value}
    names = ["class", "probability", "score_0", "score_1", "score_2"]
    columns = [f"{whose}_{name}" for whose in ("predicted", "source") for name in names]
    assert list(found[0]) == ["dataloader", "index", *columns, *RESULT]


def test_a_skipped_sample_is_told_and_what_is_not_known_is_empty(tmp_path: Path) -> None:
    images, labels = samples()
    images[5] = float("nan")
    data: Any = DataLoader(TensorDataset(images, labels), batch_size=4)
    with pytest.warns(UserWarning, match="non-finite output"):
        found, _ = written(tmp_path, net(), data, adapting(scope="sample", backend="loop"))
    assert [row["skipped"] for row in found] == ["True" if i == 5 else "False" for i in range(12)]
    assert (found[5]["moved"], found[5]["distance_source"]) == ("False", "")
    assert column(found, "distance_source").isnan().sum() == 1


def test_gated_samples_are_told_and_keep_the_source(tmp_path: Path) -> None:
    class Validates(IT3Net):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self(batch[0])

    model, callback = net(Validates), adapting(scope="sample", backend="loop", gate=0.5)
    quiet(callbacks=[callback]).validate(model, loader(20, seed=3), verbose=False)
    found, _ = written(tmp_path, model, loader(), callback)
    gated = [row for row in found if row["gated"] == "True"]
    assert 0 < len(gated) == callback.summary.gated < 12
    assert {row["moved"] for row in gated} == {"False"}
    for row in gated:
        assert row["predicted_probability"] == row["source_probability"]


def test_without_a_callback_there_is_the_prediction_alone(tmp_path: Path) -> None:
    model = seeded(LitNet())
    found, _ = written(tmp_path, model, loader(), outputs="logits")
    named = plain(model, samples()[0]).argmax(1)
    assert column(found, "predicted_class").tolist() == named.tolist()
    assert list(found[0]) == ["dataloader", "index", "predicted_class", "predicted_probability"]


def test_any_module_and_method_have_their_classes(tmp_path: Path) -> None:
    callback = TestTimeCallback(Tent(), parameters="all", lr=0.1)
    found, returned = written(tmp_path, seeded(LitNet()), loader(), callback)
    assert column(found, "predicted_class").tolist() == torch.cat(returned).argmax(1).tolist()
    assert {"source_class", "distance_source"} <= found[0].keys()


class Returns(LitNet):
    """Predicts what it is told to."""

    what = ""

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        logits = self(batch[0])
        return {
            "probabilities": logits.softmax(1),
            "mapping": {"logits": logits, "loss": logits.sum()},
            "classes": logits.argmax(1),
            "halves": logits[:2],
        }[self.what]


@pytest.mark.parametrize("what", ["probabilities", "mapping", "classes"])
def test_steps_may_return_what_they_like(what: str, tmp_path: Path) -> None:
    model = seeded(Returns())
    model.what = what
    found, _ = written(tmp_path, model, loader(), outputs="logits")
    shares, named = plain(model, samples()[0]).softmax(1).max(1)
    assert column(found, "predicted_class").tolist() == named.tolist()
    probability = column(found, "predicted_probability")
    assert probability.isnan().all() if what == "classes" else torch.allclose(probability, shares)


def test_a_row_too_few_is_told(tmp_path: Path) -> None:
    model = seeded(Returns())
    model.what = "halves"
    with pytest.raises(ValueError, match=r"a row for each of 4 samples, got one of shape \(2, 3\)"):
        written(tmp_path, model, loader())


def test_values_have_a_column_for_each_channel(tmp_path: Path) -> None:
    images = samples()[0]
    model = seeded(regressor())
    data: Any = DataLoader(TensorDataset(images.flatten(1)[:, :3], images[:, 0, 0, :1]), 5)
    found, returned = written(tmp_path, model, data, adapting(lr=0.1))
    torch.testing.assert_close(column(found, "predicted_value_0"), torch.cat(returned)[:, 0])
    torch.testing.assert_close(
        column(found, "source_value_0"), plain(model, images.flatten(1)[:, :3])[:, 0]
    )


def test_independent_labels_have_a_probability_each(tmp_path: Path) -> None:
    model = net(prior=LabelsPrior(3))
    found, returned = written(tmp_path, model, loader(), adapting())
    for label, shares in enumerate(torch.cat(returned).sigmoid().T):
        torch.testing.assert_close(column(found, f"predicted_probability_{label}"), shares)
    source = plain(model, samples()[0]).sigmoid()[:, 2]
    torch.testing.assert_close(column(found, "source_probability_2"), source)


class Maps(LightningModule):
    """Puts out maps `(B, C, 4, 4)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(1, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self(batch[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("channels", "outputs"), [(3, "logits"), (1, "logits"), (2, "values")])
def test_maps_are_files_named_by_their_samples(
    channels: int, outputs: Outputs, tmp_path: Path
) -> None:
    model = seeded(Maps(channels))
    found, _ = written(tmp_path, model, loader(), outputs=outputs)
    own = plain(model, samples()[0])
    for index, row in enumerate(found):
        path = tmp_path / row["predicted_map"]
        assert path.stem == f"{index:08}"
        if outputs == "values":
            assert np.array_equal(np.load(path), own[index].numpy())
        elif channels == 3:
            assert np.array_equal(np.asarray(Image.open(path)), own[index].argmax(0).numpy())
        else:
            share = (255 * own[index, 0].sigmoid()).round().numpy()
            assert np.array_equal(np.asarray(Image.open(path)), share)


@pytest.mark.filterwarnings("ignore:Your `predict_dataloader`'s sampler has shuffling:UserWarning")
def test_rows_are_in_the_order_of_the_data_set_not_of_the_batches(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, both = seeded(LitNet()), [loader(shuffle=True), loader(5, seed=1, shuffle=True)]
    found, _ = written(tmp_path, model, both, outputs="logits")
    keys = [(int(row["dataloader"]), int(row["index"])) for row in found]
    assert keys == [(0, i) for i in range(12)] + [(1, i) for i in range(5)]
    images = torch.cat([samples()[0], samples(5, seed=1)[0]])
    assert column(found, "predicted_class").tolist() == plain(model, images).argmax(1).tolist()


class Endless(IterableDataset[Batch]):
    """Serves samples without telling how many there are."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(list(zip(*samples(), strict=True)))


@pytest.mark.filterwarnings("ignore:Couldn't infer the batch indices:UserWarning")
def test_samples_that_tell_no_index_are_numbered(tmp_path: Path) -> None:
    model = seeded(LitNet())
    found, _ = written(tmp_path, model, DataLoader(Endless(), batch_size=5), outputs="logits")
    assert [int(row["index"]) for row in found] == list(range(12))
    named = plain(model, samples()[0]).argmax(1)
    assert column(found, "predicted_class").tolist() == named.tolist()


def test_parquet_holds_the_same(tmp_path: Path) -> None:
    given, _ = written(tmp_path / "csv", net(), loader(), adapting())
    writer = IT3PredictionWriter(tmp_path, format="parquet")
    quiet(callbacks=[adapting(), writer]).predict(net(), loader())
    found = parquet.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert [{name: str(value) for name, value in row.items()} for row in found] == given


def test_a_missing_package_and_unknown_names_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="Expected format 'csv' or 'parquet', got 'xls'"):
        IT3PredictionWriter("folder", format="xls")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Unknown outputs 'labels'"):
        IT3PredictionWriter("folder", outputs="labels")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[parquet\]'"):
        IT3PredictionWriter("folder", format="parquet")


def test_the_other_namespace_has_it_too(tmp_path: Path) -> None:
    class Old(pytorch_lightning.LightningModule):
        def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return batch[0].mean((1, 2, 3))

    writer: Any = IT3PredictionWriter(tmp_path)
    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(Old(), loader())
    means = samples()[0].mean((1, 2, 3))
    torch.testing.assert_close(column(rows(tmp_path), "predicted_value_0"), means)


def test_a_configuration_names_it(tmp_path: Path) -> None:
    file = tmp_path / "writes.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n"
        "    - class_path: it3_lightning.IT3TestTimeCallback\n"
        "      init_args: {steps: 1}\n"
        "    - class_path: it3_lightning.IT3PredictionWriter\n"
        f"      init_args: {{output_dir: {tmp_path / 'out'}, scores: true}}\n"
    )
    arguments = [f"--config={CONFIGS / 'digits.yaml'}", f"--config={file}"]
    small = ["--data.test_size=20", "--data.shifts=[contrast]", "--trainer.accelerator=cpu"]
    quick = ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    with pytest.warns(UserWarning, match="the conditioning has not been trained"):
        main(["predict", *arguments, *small, *quick, "--return_predictions=false"])
    found = rows(tmp_path / "out")
    assert [(row["dataloader"], row["index"]) for row in found] == [
        (str(shift), str(index)) for shift in range(2) for index in range(20)
    ]
    assert "source_score_9" in found[0]


# Runs that are cut short


class Fails(IT3Net):
    """Counts its predictions, and fails at one of them."""

    def __init__(self, **args: Any) -> None:
        super().__init__(**args)
        self.at: int | None = None
        self.batches: list[int] = []

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        if batch_idx == self.at:
            raise RuntimeError("cut short")
        self.batches.append(batch_idx)
        logits: Tensor = self(batch[0])
        return logits


def cut_short(folder: Path, *callbacks: Any, seed: int = 0) -> Any:
    """Predict two batches of three; return the model, ready to go on."""
    model = seeded(net(Fails), seed)
    model.at = 2
    with pytest.raises(RuntimeError, match="cut short"):
        written(folder, model, loader(), *callbacks)
    assert model.batches == [0, 1]
    assert not (folder / "predictions.csv").exists()
    model.at, model.batches = None, []
    return model


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("settings", [{}, {"scope": "sample", "backend": "loop"}], ids=str)
def test_a_run_goes_on_where_another_was_cut_short(
    settings: dict[str, Any], first: bool, tmp_path: Path
) -> None:
    whole, _ = written(tmp_path / "whole", net(Fails), loader(), adapting(**settings))
    folder = tmp_path / "parts"
    model, callback = cut_short(folder, adapting(**settings)), adapting(**settings)
    writer = IT3PredictionWriter(folder)
    trainer = quiet(callbacks=[writer, callback] if first else [callback, writer])
    before = everything(model)
    returned: Any = trainer.predict(model, loader())
    assert model.batches == [2]
    model.batches.clear()
    assert [name for name in differing(before, everything(model)) if "batches" not in name] == []
    assert returned[:2] == [(), ()]
    assert returned[2].shape == (4, 3)
    assert callback.summary.samples == 4
    assert rows(folder) == whole
    assert "predict_step" not in vars(trainer.strategy)
    assert sorted(path.name for path in folder.iterdir()) == ["predictions.csv", "run.json"]


def test_where_a_state_is_carried_it_begins_anew(tmp_path: Path) -> None:
    carried = {"reset": "never", "lr": 0.2}
    whole, _ = written(tmp_path / "whole", net(Fails), loader(), adapting(**carried))
    model = cut_short(tmp_path / "parts", adapting(**carried))
    found, _ = written(tmp_path / "parts", model, loader(), adapting(**carried))
    assert model.batches == [0, 1, 2]
    assert found == whole


def test_batches_of_other_samples_are_predicted_again(tmp_path: Path) -> None:
    whole, _ = written(tmp_path / "whole", net(Fails), loader())
    model = cut_short(tmp_path / "parts")
    found, _ = written(tmp_path / "parts", model, loader(batch=3))
    assert model.batches == [0, 1, 2, 3]
    assert [row["predicted_class"] for row in found] == [row["predicted_class"] for row in whole]


@pytest.mark.parametrize(
    ("seed", "settings", "names"),
    [(1, {}, "weights"), (0, {"lr": 0.3}, "adaptation"), (1, {"steps": 3}, "weights, adaptation")],
)
def test_batches_of_another_model_or_other_settings_are_refused_before_any(
    seed: int, settings: dict[str, Any], names: str, tmp_path: Path
) -> None:
    cut_short(tmp_path, adapting())
    model = seeded(net(Fails), seed)
    with pytest.raises(MisconfigurationException, match=f"a run with other {names} than this one"):
        written(tmp_path, model, loader(), adapting(**settings))
    assert model.batches == []


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    before, _ = written(tmp_path, net(Fails), loader())
    model = net(Fails)
    with pytest.raises(FileExistsError, match="holds the predictions of a run that has finished"):
        written(tmp_path, model, loader())
    assert model.batches == []
    assert rows(tmp_path) == before


def test_batches_whose_run_is_not_known_are_refused(tmp_path: Path) -> None:
    cut_short(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(MisconfigurationException, match="batches of a run that cannot be told"):
        written(tmp_path, net(Fails), loader())
