"""Damaged files: read as they were written, made again with a warning, or refused by name."""

import io
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import toy_distances, toy_results
from helpers.toy import IT3Net, LitNet, loader, parts, quiet
from hypothesis import given, settings
from hypothesis import strategies as st

from it3_lightning import IT3Predictor, Settings
from it3_lightning.benchmark.distances import kept_distances
from it3_lightning.benchmark.kept import check_folder, kept, mark_folder
from it3_lightning.benchmark.report import overview
from it3_lightning.integration.checkpoints import load_source
from it3_lightning.utils.files import load_plain, read_json, write, write_json

Read = Callable[[Path], Any]
FINGERPRINT = '{"data": {"size": 1}}'


def weights(module: torch.nn.Module) -> dict[str, list[float]]:
    return {name: value.flatten().tolist() for name, value in module.state_dict().items()}


def predictor(file: Path) -> Any:
    return weights(
        IT3Predictor.from_checkpoint(file, IT3Net, settings=Settings(), **parts()).module
    )


def source(file: Path) -> Any:
    torch.manual_seed(0)
    module = LitNet()
    load_source(module, str(file))
    return weights(module)


def models(file: Path) -> Any:
    def read(content: dict[str, Any]) -> dict[str, list[float]]:
        module = LitNet()
        module.load_state_dict(content["states"]["joint"])
        return weights(module)

    return kept(file, FINGERPRINT, read, load_plain)


def distances(file: Path) -> Any:
    return kept_distances(file.parent, 0, FINGERPRINT)


def results(file: Path) -> Any:
    overview([file.parent])
    return read_json(file)["table"]


def run(file: Path) -> Any:
    check_folder(file.parent, {"epochs": 1})
    return True


READS: dict[str, tuple[str, Read]] = {
    "predictor": ("it3.ckpt", predictor),
    "source": ("plain.ckpt", source),
    "weights": ("plain.pt", source),
    "models": ("seed_0.ckpt", models),
    "distances": ("distances_seed_0.json", distances),
    "results": ("results.json", results),
    "run": ("run.json", run),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    for name, module in (("it3.ckpt", IT3Net(**parts())), ("plain.ckpt", LitNet())):
        trainer = quiet()
        trainer.fit(module, loader())
        trainer.save_checkpoint(folder / name)
    state = LitNet().state_dict()
    torch.save(state, folder / "plain.pt")
    models = {"fingerprint": FINGERPRINT, "states": {"joint": state}}
    write(folder / "seed_0.ckpt", lambda stream: torch.save(models, stream))
    few = [asdict(each) for each in toy_distances()[:3]]
    told = [asdict(each) for each in toy_results().records[:2]]
    content = {"fingerprint": FINGERPRINT, "separations": told, "distances": few}
    write_json(folder / "distances_seed_0.json", content)
    toy_results().save(folder)
    mark_folder(folder, {"epochs": 1})
    return folder


def outcome(read: Read, file: Path) -> Any:
    """Return what is read, or ``None`` where the file is refused or to be made again, by name."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found, texts = read(file), [str(each.message) for each in said]
        except Exception as error:  # of any kind, but it must say of which file
            found, texts = None, [str(error)]
    assert found is not None or any(file.name in text for text in texts), texts
    return found


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Cut content off, add to it, or change up to four bytes beside each other."""
    kind = data.draw(st.sampled_from(["cut", "add", "change"]))
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content) - 1))]
    if kind == "add":
        return content + data.draw(st.binary(min_size=1, max_size=40))
    start = data.draw(st.integers(0, len(content) - 1))
    own = content[start : start + data.draw(st.integers(1, 4))]
    other = bytes(byte ^ data.draw(st.integers(1, 255)) for byte in own)
    return content[:start] + other + content[start + len(own) :]


@pytest.mark.parametrize("kind", READS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_is_never_read_as_something_else(
    kind: str, whole: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    name, read = READS[kind]
    expected = read(whole / name)
    file = tmp_path_factory.mktemp("damaged") / name
    file.write_bytes(damaged((whole / name).read_bytes(), data))
    assert outcome(read, file) in (None, expected)


def saved(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def archive_of_text() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", "hello")
    return stream.getvalue()


OTHERS: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "number": b"3",
    "pickled junk": b"\x80\x04\x95\x00\x00.",
    "other mapping": b'{"a": 1}',
    "archive of text": archive_of_text(),
    "list": saved([1, 2]),
    "other keys": saved({"state_dict": {"a": torch.ones(1)}}),
    "keys that are no names": saved({1: torch.ones(1)}),
    "a Trainer's without weights": saved({"pytorch-lightning_version": "2.5.0", "epoch": 0}),
    "a Trainer's with junk": saved({"pytorch-lightning_version": "2.5.0", "state_dict": "junk"}),
    "objects": saved({"state_dict": torch.nn.Linear(1, 1)}),
}


@pytest.mark.parametrize("kind", READS)
@pytest.mark.parametrize("other", OTHERS)
def test_files_of_other_content_are_refused_or_made_again_by_name(
    other: str, kind: str, tmp_path: Path
) -> None:
    name, read = READS[kind]
    (tmp_path / name).write_bytes(OTHERS[other])
    assert outcome(read, tmp_path / name) is None


@pytest.mark.parametrize("kind", ["predictor", "source", "weights"])
def test_a_folder_in_the_place_of_a_checkpoint_is_named(kind: str, tmp_path: Path) -> None:
    name, read = READS[kind]
    (tmp_path / name).mkdir()
    assert outcome(read, tmp_path / name) is None


Change = Callable[[dict[str, Any]], Any]
OF_WEIGHTS: list[Change] = [
    lambda c: c["state_dict"].popitem(),
    lambda c: c["state_dict"].update({"net.dense.weight": torch.ones(1)}),
    lambda c: c["state_dict"].update({"net.dense.weight": "junk"}),
    lambda c: c["state_dict"].update({"net.bn.num_batches_tracked": None}),
    lambda c: c["state_dict"].update({"net.dense.weight": torch.eye(8).to_sparse()}),
    lambda c: c.pop("state_dict"),
]
OF_ITS_OWN: list[Change] = [
    lambda c: c.update(it3=3),
    lambda c: c.update(it3={"calibration": "junk"}),
    lambda c: c.update(it3={"calibration": {"quantiles": torch.ones(3)}}),
    lambda c: c.update(it3={"calibration": {"quantiles": [1], "by": "", "weights": ""}}),
    lambda c: c.update(it3={"source_in_place": "yes"}),
    lambda c: c.update(hyper_parameters=[1]),
]


@pytest.mark.parametrize(
    ("kind", "change"),
    [(k, c) for k in ("predictor", "source") for c in OF_WEIGHTS]
    + [("predictor", c) for c in OF_ITS_OWN],
)
def test_a_checkpoint_with_other_entries_is_refused_by_name(
    kind: str, change: Change, whole: Path, tmp_path: Path
) -> None:
    name, read = READS[kind]
    content = torch.load(whole / name, weights_only=True)
    change(content)
    torch.save(content, tmp_path / name)
    assert outcome(read, tmp_path / name) is None
