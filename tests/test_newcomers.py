"""A newcomer: modules of other people, in a file outside of the package, all the way through.

Each is mixed, fitted, tested in both scopes, predicted with, read back, and fitted post-hoc, with
no other methods overridden than those that the table in ``docs/own_module.md`` names.
"""

import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning
import torch
from helpers.toy import quiet
from torch import Tensor

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3Mixin,
    IT3Predictor,
    IT3TestTimeCallback,
    LabelsPrior,
    MaskPrior,
    Prior,
    Settings,
    ValuePrior,
    suggest_layers,
)

HERE = Path(__file__).parent
TABLE = (HERE.parent / "docs" / "own_module.md").read_text()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The newcomer's file, in a folder outside of the package."""
    path = tmp_path_factory.mktemp("elsewhere") / "newcomers_file.py"
    shutil.copy(HERE / "helpers" / "newcomers.py", path)
    described = importlib.util.spec_from_file_location(path.stem, path)
    assert described is not None
    assert described.loader is not None
    module = importlib.util.module_from_spec(described)
    sys.modules[path.stem] = module
    described.loader.exec_module(module)
    yield module
    del sys.modules[path.stem]


@dataclass(frozen=True)
class Case:
    """What a newcomer writes for a module.

    Args:
        kind: class of the module.
        data: function that serves its batches.
        prior: makes the prior.
        layer: where it enters.
        overrides: what the subclass overrides.
        prediction: what of a prediction are the outputs.
    """

    kind: str
    data: str
    prior: Callable[[], Prior]
    layer: str
    overrides: dict[str, Callable[..., Any]] = field(default_factory=dict)
    prediction: Callable[[Any], Tensor] = lambda predicted: predicted


def first(self: Any, returned: Any) -> Tensor:
    prediction: Tensor = returned[0]
    return prediction


def first_target(self: Any, batch: Any) -> Tensor:
    target: Tensor = batch[1][0]
    return target


CASES = {
    "classification": Case("ClassificationTask", "scenes", lambda: ClassPrior(4), "model.4"),
    "pytorch_lightning": Case("NamespaceTask", "pairs", lambda: ClassPrior(4), "body"),
    "transformers": Case("TextModule", "texts", lambda: ClassPrior(3), "model.pooler"),
    "multilabel": Case("MultiLabelTask", "tagged", lambda: LabelsPrior(5), "model.4"),
    "ignored pixels": Case(
        "SegmentationTask", "masks", lambda: MaskPrior(3, ignore_index=255), "model.0"
    ),
    "pixelwise regression": Case(
        "PixelwiseRegressionTask", "heights", lambda: ValuePrior(1, layout="BCHW"), "model.0"
    ),
    "forecaster": Case("Forecaster", "series", lambda: ValuePrior(6), "hidden"),
    "two heads": Case(
        *("TwoHeads", "two_targets", lambda: ClassPrior(4), "trunk"),
        {"it3_outputs": first, "it3_target": first_target},
        lambda predicted: predicted[0],
    ),
}
OLD = {"pytorch_lightning"}  # needs the Trainer of that namespace


def trainer(name: str, **args: Any) -> Any:
    if name not in OLD:
        return quiet(**args)
    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    args = {"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, **off, **args}
    return pytorch_lightning.Trainer(**args)


def callback(**settings: Any) -> IT3TestTimeCallback:
    given: dict[str, Any] = {
        "objective": Idempotence(reliability=None),
        "optimizer": "sgd",
        "lr": 1e-2,
    }
    return IT3TestTimeCallback(**given, **settings)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def classes(name: str, library: ModuleType) -> tuple[Any, Any, Any]:
    """Return the newcomer's module, the same with priors, and its data."""
    case = CASES[name]
    base = getattr(library, case.kind)
    mixed = type(f"IT3{case.kind}", (IT3Mixin, base), dict(case.overrides))
    return base, mixed, getattr(library, case.data)()


def parts(name: str) -> dict[str, Any]:
    case = CASES[name]
    return {"prior": case.prior(), "conditioning": FeatureInjection(case.layer, hidden=8)}


def test_overrides_are_those_that_the_table_names(name: str) -> None:
    rows = re.findall(r"^\| [^|]+ \| (`it3_[^|]+) \|$", TABLE, re.MULTILINE)
    named = set(re.findall(r"it3_\w+", " ".join(rows)))
    assert set(CASES[name].overrides) <= named


def adapted(name: str, model: Any, data: Any) -> None:
    """Test and predict in both scopes; the model stays what it is."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (plain,) = trainer(name).test(model, data, verbose=False)
    source = torch.cat(list(map(CASES[name].prediction, trainer(name).predict(model, data))))
    for scope in ("batch", "sample"):
        adapting = callback(scope=scope)
        run = trainer(name, callbacks=[adapting])
        (logged,) = run.test(model, data, verbose=False)
        assert plain.keys() <= logged.keys()
        assert logged["it3/distance_adapted"] < logged["it3/distance_source"]
        assert adapting.summary.moved == 12
        outputs = torch.cat(list(map(CASES[name].prediction, run.predict(model, data))))
        assert outputs.shape == source.shape
        assert not torch.equal(outputs, source)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    off = trainer(name, callbacks=[callback(steps=0)]).test(model, data, verbose=False)[0]
    assert {key: off[key] for key in plain} == plain


def test_a_newcomers_module_goes_all_the_way(
    name: str, library: ModuleType, tmp_path: Path
) -> None:
    base, mixed, data = classes(name, library)
    torch.manual_seed(0)
    model, run = mixed(**parts(name)), trainer(name, max_epochs=4)
    found = suggest_layers(model, first_of(data))
    assert CASES[name].layer in [row.name for row in found.rows]
    run.fit(model, data)
    adapted(name, model, data)
    run.save_checkpoint(tmp_path / "it3.ckpt")
    again = mixed.load_from_checkpoint(tmp_path / "it3.ckpt")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    predictor = IT3Predictor.from_checkpoint(
        tmp_path / "it3.ckpt", mixed, settings=Settings(steps=0)
    )
    prediction = predictor(model.it3_inputs(first_of(data)))
    assert prediction.distance.shape == (4,)
    assert prediction.distance.min() > 0
    model.it3_export(tmp_path / "exported.ckpt")
    base.load_from_checkpoint(tmp_path / "exported.ckpt")


def test_a_newcomers_module_is_fitted_post_hoc(
    name: str, library: ModuleType, tmp_path: Path
) -> None:
    base, mixed, data = classes(name, library)
    torch.manual_seed(0)
    plain, run = base(), trainer(name, max_epochs=4)
    run.fit(plain, data)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    model = mixed(**parts(name), source_checkpoint=str(tmp_path / "plain.ckpt"))
    trainer(name, max_epochs=4).fit(model, data)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    adapted(name, model, data)


def first_of(data: Any) -> Any:
    return next(iter(data))
