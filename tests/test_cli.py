"""The command line: every command on every configuration, and checkpoints through it."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.road_files import ROADS, road_arguments
from helpers.vision import SMALL_NETWORKS, vision_arguments
from lightning.fabric.utilities.exceptions import MisconfigurationException

from it3_lightning.cli import main
from it3_lightning.engine.selection import OWN

# A checkpoint read into another folder: Lightning says what it leaves behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.usefixtures("airfoil_data"),
]

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL = [
    "--data.train_size=100",
    "--data.test_size=60",
    "--data.val_size=40",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]
WITHOUT_FILES = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]


def data_arguments(config: str, images: Path) -> list[str]:
    if config in ROADS:
        return ["--data.shifts=[contrast]", *road_arguments(config, images)]
    if config == "image_folders":
        return ["--data.shifts=[night]", *vision_arguments(config, images)]
    if config in SMALL_NETWORKS:
        return ["--data.shifts=[contrast]", *vision_arguments(config, images)]
    tables, root = images / "tables", f"--data.root={images}"
    return {
        "adult": [f"--data.root={tables / 'adult'}", "--data.shifts=[missing]"],
        "airfoil_self_noise": [root, "--data.shifts=[high_1,noise]"],
        "airfoils_graph": [
            root,
            "--data.profiles=400",
            "--data.nodes=16",
            "--data.shifts=[shape_1,noise]",
        ],
        "airfoils_mlp": [root, "--data.profiles=400", "--data.shifts=[ratio_5,noise]"],
        "boston": [f"--data.path={tables / 'boston.csv'}", "--data.shifts=[zeroed]"],
        "breast_cancer": ["--data.shifts=[zeroed]"],
        "covertype": [f"--data.root={tables / 'covertype'}", "--data.shifts=[zeroed]"],
        "csv": [f"--data.path={tables / 'houses.csv'}", "--data.shifts=[gaussian_noise]"],
        "digits": ["--data.shifts=[contrast]"],
        "fashion_mnist": [root, "--data.shifts=[contrast]"],
        "first": ["--data.shifts=[contrast]"],
        "mnist": [root, "--data.shifts=[contrast]"],
    }[config]


@pytest.fixture(params=sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def config(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(command: str, config: str, folder: Path, images: Path, *more: str) -> None:
    main(
        [
            command,
            f"--config={CONFIGS / config}.yaml",
            *SMALL,
            f"--trainer.default_root_dir={folder}",
            *data_arguments(config, images),
            *more,
        ]
    )


def checkpoint(folder: Path) -> Path:
    return next(folder.rglob("*.ckpt"))


def test_fit_test_and_predict_run(config: str, tmp_path: Path, idx_images: Path) -> None:
    run("fit", config, tmp_path, idx_images)
    path = f"--ckpt_path={checkpoint(tmp_path)}"
    run("validate", config, tmp_path, idx_images, path)
    run("test", config, tmp_path, idx_images, path)
    run("predict", config, tmp_path, idx_images, path)


def test_a_bet_is_a_line(tmp_path: Path, idx_images: Path) -> None:
    file = tmp_path / "bet.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n    class_path: it3_lightning.IT3TestTimeCallback\n"
        "    init_args:\n      gate: bet\n      delta: 0.05\n"
    )
    more = f"--config={file}"
    run("fit", "digits", tmp_path, idx_images, more)
    kept = torch.load(checkpoint(tmp_path), weights_only=True)["it3"]["calibration"]
    assert kept["reference"]["distances"].diff().min() >= 0
    run("test", "digits", tmp_path, idx_images, more, f"--ckpt_path={checkpoint(tmp_path)}")
    logged = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "it3/gated/dataloader_idx_0" in logged


def test_scope_sample_and_gate_are_a_line_each(tmp_path: Path, idx_images: Path) -> None:
    file = tmp_path / "gated.yaml"
    file.write_text(
        "trainer:\n  callbacks:\n    class_path: it3_lightning.IT3TestTimeCallback\n"
        "    init_args:\n      scope: sample\n      gate: 0.5\n"
    )
    more = f"--config={file}"
    run("fit", "digits", tmp_path, idx_images, more)
    kept = torch.load(checkpoint(tmp_path), weights_only=True)["it3"]["calibration"]
    assert kept["quantiles"].diff().min() >= 0
    assert kept["quantiles"][-1] > 0
    for command in ("validate", "test", "predict"):
        run(command, "digits", tmp_path, idx_images, more, f"--ckpt_path={checkpoint(tmp_path)}")
    logged = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "it3/gated/dataloader_idx_0" in logged


AUXILIARY = """
model:
  class_path: it3_lightning.tasks.TTTClassifier
  init_args:
    network:
      class_path: it3_lightning.networks.SmallCNN
      init_args: {in_channels: 1, num_classes: 10, image_size: 8}
    auxiliary:
      class_path: it3_lightning.Contrastive
      init_args: {layer: network.dense1, channels: 128}
data:
  class_path: it3_lightning.data.DigitsDataModule
  init_args: {shifts: [contrast]}
trainer:
  callbacks:
    class_path: it3_lightning.TestTimeCallback
    init_args:
      method: {class_path: it3_lightning.TTTPlusPlus, init_args: {queue: 64}}
"""


def test_an_auxiliary_task_is_learnt_and_stepped_on(tmp_path: Path) -> None:
    file = tmp_path / "auxiliary.yaml"
    file.write_text(AUXILIARY)
    given = [f"--config={file}", *SMALL, f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *given])  # its validation shows the method source data
    main(["test", *given, f"--ckpt_path={checkpoint(tmp_path)}"])
    logged = "".join(path.read_text() for path in tmp_path.rglob("metrics.csv"))
    assert "it3/auxiliary_loss_epoch" in logged
    assert "it3/distance_adapted/dataloader_idx_0" in logged


def test_fit_resumes(tmp_path: Path, idx_images: Path) -> None:
    run("fit", "digits", tmp_path, idx_images)
    path = checkpoint(tmp_path)
    run("fit", "digits", tmp_path, idx_images, f"--ckpt_path={path}", "--trainer.max_epochs=2")
    epochs = {torch.load(p, weights_only=True)["epoch"] for p in tmp_path.rglob("*.ckpt")}
    assert epochs == {0, 1}


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def of_trainer(**state: torch.Tensor) -> dict[str, Any]:
    kept = {"epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}}
    return {"pytorch-lightning_version": "2.5.0", "state_dict": state, **kept}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "another or a truncated file"),
        (b"hello", "another or a truncated file"),
        (saved(of_trainer())[:-30], "another or a truncated file"),
        (saved(of_trainer()).replace(b"global_step", b"global-step"), "got a damaged one"),
        (saved([1]), "that a Trainer wrote, got another"),
        (saved({"weight": torch.ones(1)}), "without pytorch-lightning_version, state_dict"),
        (saved(of_trainer(it3_a=torch.ones(1))), "does not fit IT3Classifier: Error"),
        (None, "got a folder"),
    ],
    ids=["empty", "text", "cut off", "changed", "list", "weights", "another's", "folder"],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_that_cannot_be_read_is_named(
    command: str, content: bytes | None, message: str, tmp_path: Path, idx_images: Path
) -> None:
    path = tmp_path / "model.ckpt"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        run(command, "digits", tmp_path, idx_images, f"--ckpt_path={path}", *WITHOUT_FILES)
    assert str(path) in str(raised.value)


def test_a_benchmark_names_a_checkpoint_that_cannot_be_read(
    tmp_path: Path, idx_images: Path
) -> None:
    (tmp_path / "plain.ckpt").write_bytes(b"")
    more = f"--benchmark.output={tmp_path / 'out'}", f"--ckpt_path={tmp_path / 'plain.ckpt'}"
    with pytest.raises(ValueError, match=r"another or a damaged file: .*plain\.ckpt"):
        run("benchmark", "digits", tmp_path, idx_images, *more)


UNTRAINED = "ignore:Every second prediction equals the first:UserWarning"


@pytest.mark.filterwarnings(UNTRAINED)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_without_a_logger_no_configuration_is_written_over(
    command: str,
    tmp_path: Path,
    idx_images: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    own = f"# my own\n{(CONFIGS / 'digits.yaml').read_text()}"
    Path("config.yaml").write_text(own)
    with caplog.at_level("INFO"):
        main([command, "--config=config.yaml", *SMALL, "--data.shifts=[contrast]", *WITHOUT_FILES])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == own
    assert caplog.text.count("config.yaml is not saved: without a logger") == 1


@pytest.mark.filterwarnings(UNTRAINED)
@pytest.mark.filterwarnings("ignore:Experiment logs directory .* is not empty:UserWarning")
def test_a_configuration_beside_logs_takes_a_name_that_is_free(
    tmp_path: Path, idx_images: Path
) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    there = f"{{save_dir: {tmp_path}, name: '', version: ''}}"
    logger = f"--trainer.logger={{class_path: CSVLogger, init_args: {there}}}"
    for _ in range(2):
        run("test", "digits", tmp_path, idx_images, logger, "--trainer.enable_checkpointing=false")
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"
    for name in ("config_1.yaml", "config_2.yaml"):
        assert "class_path: it3_lightning" in (tmp_path / name).read_text()


def test_post_hoc_training_from_a_plain_checkpoint_takes_one_switch(
    tmp_path: Path, idx_images: Path
) -> None:
    run("fit", "digits", tmp_path / "plain", idx_images, "--model.train=off")
    plain = checkpoint(tmp_path / "plain")
    switch = f"--model.source_checkpoint={plain}"
    run("fit", "digits", tmp_path / "posthoc", idx_images, switch)
    before = torch.load(plain, weights_only=True)["state_dict"]
    after = torch.load(checkpoint(tmp_path / "posthoc"), weights_only=True)["state_dict"]
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith(OWN))
    own = [k for k in before if k.startswith("it3_conditioning.")]
    assert own
    assert not any(torch.equal(before[k], after[k]) for k in own)


def test_benchmark_writes_its_page(config: str, tmp_path: Path, idx_images: Path) -> None:
    run(
        "benchmark",
        config,
        tmp_path,
        idx_images,
        f"--benchmark.output={tmp_path}",
        "--benchmark.seeds=[0]",
        "--benchmark.epochs=1",
        "--benchmark.posthoc_epochs=1",
        "--benchmark.rows=main",
        "--benchmark.accelerator=cpu",
        "--benchmark.distance_samples=4",
    )
    names = {path.name for path in tmp_path.iterdir()}
    written = {"distances.svg", "page.html", "results.csv", "results.json", "table.md"}
    assert written <= names


@pytest.mark.parametrize("config", ["digits", "fashion_mnist"])
def test_benchmark_compares_methods(config: str, tmp_path: Path, idx_images: Path) -> None:
    run(
        "benchmark",
        config,
        tmp_path,
        idx_images,
        f"--benchmark.output={tmp_path}",
        "--benchmark.methods=[Tent, TTT]",
        "--benchmark.streams=[equal, continual, equal/2]",
        "--benchmark.seeds=[0]",
        "--benchmark.epochs=1",
        "--benchmark.posthoc_epochs=1",
        "--benchmark.rows=main",
        "--benchmark.accelerator=cpu",
        "--benchmark.distance_samples=0",
        "--benchmark.rates=[1]",
        "--benchmark.rate_batches=1",
        "--benchmark.batches=1",
        "--benchmark.alone=2",
        "--data.eval_batch_size=4",
        "--data.test_size=8",
    )
    report = (tmp_path / "table.md").read_text()
    assert all(name in report for name in ("Tent, tuned: ", "with Rotation", "equal/2"))


@pytest.mark.filterwarnings("ignore:The network cannot be vectorised.*graphs:UserWarning")
@pytest.mark.parametrize(
    "config", ["airfoils_graph", "boston", "digits", "fashion_mnist", "roads_procedural"]
)
def test_tune_writes_its_report(config: str, tmp_path: Path, idx_images: Path) -> None:
    run(
        "tune",
        config,
        tmp_path,
        idx_images,
        f"--benchmark.output={tmp_path}",
        "--benchmark.seeds=[0]",
        "--benchmark.epochs=1",
        "--benchmark.posthoc_epochs=1",
        "--benchmark.accelerator=cpu",
        "--tune.grid.shares=[0.5]",
        "--tune.grid.lrs=[0.001]",
        "--tune.grid.modes=[episodic, sample]",
        "--tune.grid.forms=[published]",
        "--tune.batches=1",
    )
    report = (tmp_path / "tuning.md").read_text()
    assert "1 step of adam 0.001, episodic" in report
    assert "```yaml\ntrainer:" in report


@pytest.mark.parametrize(
    ("config", "policies"),
    [
        ("boston", "[mean prediction, 'IT3, online']"),
        ("digits", "[evidence, 'IT3, online (evidence)']"),
        ("roads_procedural", "[batch statistics, second prediction (evidence)]"),
    ],
)
def test_calibrate_puts_a_policy_into_the_checkpoint_that_test_follows(
    config: str, policies: str, tmp_path: Path, idx_images: Path
) -> None:
    run("fit", config, tmp_path, idx_images)
    path = checkpoint(tmp_path)
    run(
        "calibrate",
        config,
        tmp_path,
        idx_images,
        f"--ckpt_path={path}",
        f"--benchmark.output={tmp_path / 'results'}",
        f"--calibrate.policies={policies}",
        "--calibrate.batch_sizes=[20]",
        "--calibrate.batches=1",
        "--calibrate.streams=[equal]",
    )
    policy = torch.load(path, weights_only=True)["it3"]["calibration"]["policy"]
    report = (tmp_path / "results" / "calibration.md").read_text()
    assert len([line for line in report.splitlines() if line.startswith("| ")]) == 2 + 2
    assert ("No adaptation" in report) == (policy["name"] == "source")
    follows = tmp_path / "follows.yaml"
    follows.write_text(
        "trainer:\n  callbacks:\n    class_path: it3_lightning.IT3TestTimeCallback\n"
        "    init_args:\n      policy: calibrated\n"
    )
    run("test", config, tmp_path, idx_images, f"--config={follows}", f"--ckpt_path={path}")


@pytest.mark.parametrize("config", ["adult", "covertype"])
def test_fit_without_its_tables_names_the_files(
    config: str, tmp_path: Path, idx_images: Path
) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected .*nowhere/(adult|covtype)\.data"):
        run("fit", config, tmp_path, idx_images, f"--data.root={tmp_path / 'nowhere'}")


def test_fit_with_a_network_of_other_sizes_than_the_table_names_both(
    tmp_path: Path, idx_images: Path
) -> None:
    wrong = "--model.network.init_args.in_features=6"
    with pytest.raises(MisconfigurationException, match=r"in_features to be 5, .* got 6"):
        run("fit", "csv", tmp_path, idx_images, wrong)


def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, idx_images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(SystemExit):
        run("fit", "roads_procedural", tmp_path, idx_images)
    assert "pip install 'it3_lightning[vision]'" in capsys.readouterr().err


@pytest.mark.parametrize("config", ["massachusetts_roads", "roadtracer"])
def test_a_missing_folder_of_roads_is_named(config: str, tmp_path: Path, idx_images: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Set root to the folder of the data"):
        run("fit", config, tmp_path, idx_images, f"--data.root={tmp_path / 'nowhere'}")


def test_an_unknown_objective_setting_is_named(
    tmp_path: Path, idx_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("test", "digits", tmp_path, idx_images, "--model.prior.init_args.num_clases=3")
    assert "num_clases" in capsys.readouterr().err


def test_missing_data_is_named_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"airfoil_self_noise\.dat, got no such file"):
        run("fit", "airfoil_self_noise", tmp_path, tmp_path)
