"""Files: written whole or not at all, and refused where they are not what was written."""

import io
import zipfile
from pathlib import Path
from typing import IO

import pytest
import torch

from it3_lightning.utils.files import check_archive, load_plain, read_json, write, write_json


def fails_halfway(error: BaseException) -> object:
    def content(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise error

    return content


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("disk full"), SystemExit(1)])
@pytest.mark.parametrize("before", ["what was there", None])
def test_an_interrupted_write_leaves_what_was_there_and_no_other_file(
    error: BaseException, before: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "results.json"
    if before is not None:
        file.write_text(before)
    with pytest.raises(type(error)):
        write(file, fails_halfway(error))  # type: ignore[arg-type]
    assert (file.read_text() if file.exists() else None) == before
    assert list(tmp_path.iterdir()) == [file] * (before is not None)


def test_a_write_that_cannot_be_put_in_place_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    write(file, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(file, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_text_is_written_as_it_is_into_a_new_folder_and_through_a_link(tmp_path: Path) -> None:
    file, link = tmp_path / "a" / "b" / "table.md", tmp_path / "link.md"
    write(file, "±\r\n")
    link.symlink_to(file)
    write(link, "10⁻³\n")
    assert link.is_symlink()
    assert file.read_bytes() == "10⁻³\n".encode()


def test_plain_data_come_back_exactly_and_files_without_a_digest_too(tmp_path: Path) -> None:
    file, content = tmp_path / "a.json", {"b": [0.1, 1e-300, float("inf")], "a": {"ü": None}}
    write_json(file, content)
    assert read_json(file) == content
    file.write_text('{"a": 1}')
    assert read_json(file) == {"a": 1}


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '{"a": 1, "digest": "0"}', "\x00"])
def test_what_is_no_json_of_ours_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"^Exp"):
        read_json(tmp_path / "a.json")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save({"weight": torch.arange(64.0)}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_a_changed_weight_is_found_though_torch_reads_it(weights: Path) -> None:
    content = weights.read_bytes()
    at = content.index(torch.arange(64.0).numpy().tobytes())
    weights.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    assert torch.load(weights)["weight"][0] != 0
    with pytest.raises(ValueError, match=r"as torch\.save wrote it, got a damaged one: .*weights"):
        check_archive(weights)


def test_an_archive_without_checksums_is_read(weights: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(64.0)}, weights)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_plain(weights)["weight"], torch.arange(64.0))


def test_the_format_before_archives_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_plain(tmp_path / "a.pt")["a"], torch.ones(2))


def foreign_archive() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("readme.txt", "hello")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x02}q\x00.", b"PK\x03\x04", foreign_archive()]
)
def test_what_torch_did_not_write_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "other.pt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"that torch\.save wrote, got another .*other\.pt"):
        load_plain(file)


def test_objects_are_refused_with_what_to_save(tmp_path: Path) -> None:
    torch.save({"net": torch.nn.Linear(1, 1)}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match=r"objects\.pt' holds objects besides weights.*Save the"):
        load_plain(tmp_path / "objects.pt")
