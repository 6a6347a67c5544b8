"""The choice of a policy for one model: what it scores, keeps, puts into a checkpoint, refuses."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.airfoil_files import write_self_noise
from helpers.benchmark_runs import benchmark, digits, make_model
from lightning.pytorch import Trainer
from torch import nn

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    IT3TestTimeCallback,
    TestTimeCallback,
    ValuePrior,
)
from it3_lightning.benchmark import Benchmark, Calibrated, PolicyChoice
from it3_lightning.benchmark.calibrate import arguments_of, policies_of, show_choice
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.peers import PEERS, Facts, peers
from it3_lightning.benchmark.policy_rule import Choice, Condition, Errors, HarmlessRule
from it3_lightning.benchmark.rows import Kind, Row
from it3_lightning.benchmark.scoring import scored, streaming
from it3_lightning.calibration import fingerprint
from it3_lightning.data import TUNING_SHIFTS, AirfoilSelfNoiseDataModule, DigitsDataModule
from it3_lightning.methods import TestTimeMethod
from it3_lightning.networks import MLP
from it3_lightning.tasks import IT3Classifier, IT3Regressor
from it3_lightning.utils.specs import built

POLICIES = ("batch statistics", "evidence", "mean prediction (evidence)")
SMALL: dict[str, Any] = {
    "policies": POLICIES,
    "streams": ("equal", "correlated"),
    "batch_sizes": (20,),
}


@dataclass(frozen=True, kw_only=True)
class Takes(HarmlessRule):
    """Judges as the rule does, and chooses what it is told to."""

    name: str = "mean prediction (evidence)"

    def choose(self, errors: Errors) -> Choice:
        return replace(super().choose(errors), chosen=self.name)


class Gains(Takes):
    """The same, and finds nothing to say against it."""

    def choose(self, errors: Errors) -> Choice:
        found = super().choose(errors)
        judged = {
            n: replace(j, harm=None, doubt=None, surely=1.0) for n, j in found.judgements.items()
        }
        return replace(found, judgements=judged)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibrated]:
    folder = tmp_path_factory.mktemp("calibration")
    choice = PolicyChoice(**SMALL, rule=Takes())
    return folder, choice.run(benchmark(folder), make_model, digits(val_size=100))


def loaded(path: Path) -> IT3Classifier:
    model = make_model()
    content = torch.load(path, weights_only=True)
    model.on_load_checkpoint(content)
    model.load_state_dict(content["state_dict"])
    return model


def predictions(model: Any, *callbacks: Any) -> list[torch.Tensor]:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    found: Any = trainer.predict(model, digits())
    return [torch.cat(own) for own in found]


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def test_errors_are_those_of_the_benchmark_on_validation_samples(
    run: tuple[Path, Calibrated],
) -> None:
    folder, found = run
    data, model = digits(val_size=100), loaded(folder / "calibrated.ckpt")
    data.evaluate_on, data.shifts = "validation", TUNING_SHIFTS
    rows = {row.name: row for row in policies_of(Recipe(), Kind.of(model))}
    for stream in SMALL["streams"]:
        for name in POLICIES:
            with streaming(data, 0, f"{stream}/20"):
                records, *_ = scored(benchmark(folder), rows[name], model, data, stream)
            assert [record.shift for record in records] == ["clean", *TUNING_SHIFTS]
            for record in records:
                errors = found.errors.policies[name][Condition(record.shift, stream, 20)]
                assert len(errors) == 100
                assert record.score == pytest.approx(100 - errors.mean(), abs=1e-4)


def test_samples_keep_their_numbers_in_every_stream(run: tuple[Path, Calibrated]) -> None:
    errors, names = run[1].errors, ("clean", *TUNING_SHIFTS)
    for name in names:
        equal, correlated = (Condition(name, stream, 20) for stream in SMALL["streams"])
        assert errors.samples[equal].tolist() == list(range(100))
        order = errors.samples[correlated]
        assert sorted(order.tolist()) == list(range(100)) != order.tolist()
        np.testing.assert_array_equal(errors.source[equal][order], errors.source[correlated])


def test_another_policy_costs_its_own_passes_only(
    run: tuple[Path, Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found = run
    passes, predict = [], Trainer.predict

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(self.callbacks)
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "predict", counted)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = PolicyChoice(**SMALL, rule=Takes()).run(
        benchmark(folder), make_model, digits(val_size=100)
    )
    assert passes == []
    assert again.choice.judgements == found.choice.judgements
    more = {**SMALL, "policies": (*POLICIES, "Tent"), "methods": ["Tent"]}
    larger = PolicyChoice(**more, rule=Takes()).run(
        benchmark(folder), make_model, digits(val_size=100)
    )
    assert len(passes) == 2  # streams
    assert [*larger.choice.judgements] == [*POLICIES, "Tent"]
    assert dict(found.choice.judgements).items() <= dict(larger.choice.judgements).items()


def test_the_checkpoint_predicts_by_its_policy(run: tuple[Path, Calibrated]) -> None:
    folder, found = run
    path = folder / "calibrated.ckpt"
    given = yaml.safe_load(found.yaml())["trainer"]["callbacks"][0]
    assert given["class_path"] == "it3_lightning.IT3TestTimeCallback"
    explicit = predictions(loaded(path), IT3TestTimeCallback(**given["init_args"]))
    calibrated = IT3TestTimeCallback(policy="calibrated")
    assert same(predictions(loaded(path), calibrated), explicit)
    assert (calibrated.settings.norm_stats, calibrated.prediction) == ("evidence", "mean")
    from_file = TestTimeCallback.from_checkpoint(path, stages=["predict"])
    assert (from_file.settings.norm_stats, from_file.prediction) == ("evidence", "mean")
    assert same(predictions(loaded(path), from_file), explicit)
    assert not same(predictions(loaded(path)), explicit)
    bare = make_model()  # which has not been told what calibration measured
    bare.load_state_dict(loaded(path).state_dict())
    assert same(predictions(bare, from_file), explicit)


def test_a_checkpoint_that_was_given_keeps_all_else(
    run: tuple[Path, Calibrated], tmp_path: Path
) -> None:
    before = torch.load(run[0] / "calibrated.ckpt", weights_only=True)
    before["it3"]["calibration"] |= {"policy": {}, "moments": {}}
    before["extra"] = {"kept": torch.arange(3)}
    path = tmp_path / "own.ckpt"
    torch.save(before, path)
    choice = PolicyChoice(**SMALL, ckpt_path=str(path), rule=Takes())
    found = choice.run(benchmark(tmp_path / "results"), make_model, digits(val_size=100))
    after = torch.load(path, weights_only=True)
    assert after.keys() == before.keys()
    assert after["extra"]["kept"].tolist() == [0, 1, 2]
    assert all(torch.equal(v, after["state_dict"][k]) for k, v in before["state_dict"].items())
    assert after["it3"]["calibration"]["policy"] == found.policy == run[1].policy
    assert found.choice.judgements == run[1].choice.judgements
    assert found.policy["weights"] == fingerprint(loaded(path))
    assert not (tmp_path / "results" / "models").exists()  # nothing was trained
    assert same(
        predictions(loaded(path), IT3TestTimeCallback(policy="calibrated")),
        predictions(loaded(path), IT3TestTimeCallback(**found.policy["arguments"])),
    )


def test_no_adaptation_is_the_source_bit_for_bit(
    run: tuple[Path, Calibrated], tmp_path: Path
) -> None:
    choice = PolicyChoice(**{**SMALL, "policies": ["batch statistics"]}, rule=HarmlessRule())
    strict = replace(choice, rule=HarmlessRule(tolerance=0.0))
    found = strict.run(benchmark(run[0]), make_model, digits(val_size=100))
    assert found.choice.chosen is None
    assert found.words().startswith("No adaptation: predictions are those of the source")
    model = loaded(run[0] / "calibrated.ckpt")
    assert model.it3_calibration.policy["name"] == "source"
    plain = predictions(model)
    assert same(predictions(model, IT3TestTimeCallback(policy="calibrated")), plain)


def test_reports_are_written_and_fit_a_hundred_columns(
    run: tuple[Path, Calibrated], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_choice(run[1], tmp_path)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    text = (tmp_path / "calibration.md").read_text()
    assert all(name in text for name in POLICIES)
    assert "Chosen: mean prediction (evidence)." in text
    assert (tmp_path / "policy.yaml").read_text() == run[1].yaml()
    assert run[1].yaml() in text


def rows_of(kind: Kind) -> list[Row]:
    return list(policies_of(Recipe(), kind))


def test_policies_are_those_that_make_sense() -> None:
    names = [row.name for row in rows_of(Kind(classes=True, batch_norm=True))]
    assert len(names) == len(set(names)) == 13
    assert names[:3] == ["source", "batch statistics", "evidence"]
    assert [row.name for row in rows_of(Kind(classes=False, batch_norm=False))] == [
        *("source", "second prediction", "mean prediction", "IT3, episodic", "IT3, online"),
    ]


def test_for_single_samples_policies_that_need_several_are_not_compared(tmp_path: Path) -> None:
    def names(context: Any = None, **given: Any) -> list[str]:
        model = IT3Classifier(
            make_model().network,
            prior=ClassPrior(10, context=context),
            conditioning=FeatureInjection("network.dense1"),
        )
        choice = PolicyChoice(**{"batch_sizes": [1, 16], **given})
        kind, inputs = Kind.of(model), torch.zeros(4, 1, 8, 8)
        return [row.name for row in choice._rows(Recipe(), kind, model, inputs)]

    single = names()
    assert [name for name in single if "batch" in name] == []
    assert len(single) == 13 - 5
    assert names(context="batch") == ["source", "evidence"]
    assert len(names(batch_sizes=[2])) == 13
    assert names(policies=["batch statistics"]) == ["source"]
    peers_of_one = names(methods=["Tent", "LAME", "MEMO"])
    assert {"Tent", "LAME", "MEMO"} & set(peers_of_one) == {"MEMO"}


def test_arguments_are_plain_and_make_the_settings_of_the_row() -> None:
    model = make_model()
    kind = Kind.of(model)
    found = peers([n for n, p in PEERS.items() if not p.head], Facts(kind, True, 10, "network.out"))
    rows = [*rows_of(kind), *(row for row in found if row.published)]
    assert len(rows) > 13 + 10
    for row in rows:
        arguments = yaml.safe_load(yaml.safe_dump(arguments_of(row)))
        method = built(arguments.pop("objective", None), TestTimeMethod)  # type: ignore[type-abstract]
        callback = IT3TestTimeCallback(objective=method, **arguments)
        wanted = row.callback() or IT3TestTimeCallback(steps=0, measure=False)
        ours, theirs = (vars(each.settings) for each in (callback, wanted))
        unlike = {k for k in theirs if ours[k] != theirs[k]} - {"objective", "method"}
        assert unlike == set()
        assert repr(ours["objective"]) == repr(theirs["objective"]) or not callback.settings.steps
        assert callback.prediction == wanted.prediction


class Unlabelled(DigitsDataModule):
    def val_dataloader(self) -> Any:
        return [(inputs,) for inputs, _ in super().val_dataloader()]


class Unvalidated(DigitsDataModule):
    def split(self) -> dict[str, Any]:
        return {name: own for name, own in super().split().items() if name != "validation"}


class Untuned(DigitsDataModule):
    TUNING_SHIFTS = ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Unlabelled, "validation batches with labels, got one in which IT3Classifier finds none"),
        (Unvalidated, "Unvalidated with validation samples, got none"),
        (Untuned, "shifts to tune on, got Untuned without"),
    ],
)
def test_data_that_tells_nothing_is_refused_before_any_work(
    data: type[DigitsDataModule], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        PolicyChoice().run(benchmark(tmp_path), make_model, data(severity=4))
    assert [*tmp_path.iterdir()] == []


def test_an_unknown_policy_and_a_wrong_checkpoint_are_refused(tmp_path: Path) -> None:
    def refuse(**given: Any) -> None:
        PolicyChoice(**given).run(benchmark(tmp_path), make_model, digits(val_size=20))

    with pytest.raises(ValueError, match=r"Unknown policy 'evidenz'.*Did you mean 'evidence'"):
        refuse(policies=["evidenz"])
    with pytest.raises(FileNotFoundError, match=r"that it3 fit wrote, got no such file"):
        refuse(ckpt_path=str(tmp_path / "nowhere.ckpt"))
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": nn.Linear(1, 1).state_dict()}, other)
    before = other.read_bytes()
    with pytest.raises(ValueError, match="checkpoint of IT3Classifier as it3 fit writes it"):
        refuse(ckpt_path=str(other))
    assert other.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"streams": ["continual"]}, "Unknown stream 'continual'"),
        ({"streams": []}, "at least one of streams and of batch_sizes"),
        ({"batch_sizes": []}, "at least one of streams and of batch_sizes"),
        ({"batch_sizes": [0]}, "batches >= 1 and batch_sizes >= 1"),
        ({"batches": 0}, "batches >= 1 and batch_sizes >= 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyChoice(**wrong)


# Values: what is tried within their range says nothing of what lies beyond it


def values(root: Path, **settings: Any) -> Any:
    """Sound levels of which the highest are held out, under perturbations that change no target."""
    return AirfoilSelfNoiseDataModule(
        root, column="level", train_size=200, val_size=60, test_size=60, **settings
    )


def make_regressor() -> IT3Regressor:
    return IT3Regressor(
        MLP(5, 1, hidden=(8,)), prior=ValuePrior(), conditioning=FeatureInjection("network.layer0")
    )


@pytest.mark.parametrize(
    ("beyond_size", "in_range", "chosen"),
    [(0, False, "source"), (0, True, "second prediction"), (50, False, "second prediction")],
    ids=["not tried beyond", "cannot leave the range", "tried beyond"],
)
def test_values_are_adapted_only_where_a_shift_beyond_their_range_was_tried(
    beyond_size: int, in_range: bool, chosen: str, tmp_path: Path
) -> None:
    policies = {"policies": ["second prediction"], "streams": ["equal"], "batch_sizes": [20]}
    choice = PolicyChoice(**policies, in_range=in_range, rule=Gains(name="second prediction"))  # type: ignore[arg-type]
    settings = benchmark(tmp_path / "run", recipe=Recipe(distance="l1"), metric="test_mae")
    data = values(write_self_noise(tmp_path).parent, beyond_size=beyond_size)
    found = choice.run(settings, make_regressor, data)
    assert found.policy["name"] == chosen
    shifts = {condition.shift for condition in found.errors.source}
    assert ("beyond" in shifts) == bool(beyond_size)
    if chosen == "source":
        assert "second prediction gains most" in found.words()
        assert "no tuning shift has values beyond it" in found.words()


CLEAN, FOG = (Condition(shift, "equal", 100) for shift in ("clean", "fog"))


def toy(fog: float, clean: float, tolerance: float = 0.05, count: int = 2000) -> Calibrated:
    """The choice among one policy, which takes so much off the errors of 40 percent."""
    source = np.repeat([100.0, 0.0], [2 * count // 5, 3 * count // 5])

    def less(gain: float) -> Any:
        errors = source.copy()
        number = round(abs(gain) / 100 * count)
        errors[slice(number) if gain > 0 else slice(count - number, count)] = (
            0.0 if gain > 0 else 100
        )
        return errors

    ids = {condition: np.arange(count) for condition in (CLEAN, FOG)}
    own = {CLEAN: less(clean), FOG: less(fog)}
    errors = Errors(ids, {CLEAN: source, FOG: source}, {"policy": own})
    rule = HarmlessRule(tolerance=tolerance)
    policy = {"name": "policy", "weights": "", "arguments": {"steps": 0}}
    return Calibrated(
        "error, percent", 1, errors, rule.choose(errors), policy, rule, Path("x.ckpt")
    )


@pytest.mark.parametrize(
    ("fog", "clean", "count", "said"),
    [
        (10.0, 0.0, 2000, "Chosen: policy. Under shift it takes 10.0 off the error of the source"),
        (10.0, -8.0, 2000, "harms: it loses 8.0 on clean, equal, batches of 100, with 2.0"),
        (10.0, 0.0, 50, "not shown to be harmless: of clean it may lose 5.2, with 2.0 tolerated"),
        (0.0, 0.0, 2000, "does not surely gain"),
    ],
)
def test_the_verdict_says_why(fog: float, clean: float, count: int, said: str) -> None:
    assert said in toy(fog, clean, count=count).words()


def test_without_policies_the_verdict_is_the_source() -> None:
    errors = toy(1.0, 0.0).errors
    none = replace(errors, policies={})
    found = replace(toy(1.0, 0.0), errors=none, choice=HarmlessRule().choose(none))
    assert found.words().endswith("There is no policy to choose.")
    assert found.lines() == []
