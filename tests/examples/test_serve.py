"""`examples/serve.py`: a real server on a local port, asked by real clients, and stopped."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from torch import Tensor

from it3_lightning import IT3Predictor, Settings
from it3_lightning.data import DigitsDataModule

ROOT = Path(__file__).parent.parent.parent
SCRIPT = ROOT / "examples" / "serve.py"
DARK = [[0.0] * 8] * 8


@dataclass(frozen=True)
class Server:
    """A server in processes of its own."""

    process: subprocess.Popen[str]
    port: int
    checkpoint: Path

    def ask(self, path: str, data: bytes | None = None) -> tuple[int, Any]:
        """Send a request and return status and answer."""
        kind = {"Content-Type": "application/json"}
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, kind)
        try:
            with urlopen(request, timeout=30) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    def predict(self, image: Tensor) -> Any:
        """Return the answer to an image `(1, 8, 8)`."""
        status, answer = self.ask("/predict", json.dumps({"image": image[0].tolist()}).encode())
        assert status == 200, answer
        return json.loads(answer)

    def wait_until_healthy(self, seconds: float = 120) -> None:
        """Wait for the server, no longer than it lives."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            with suppress(URLError, ConnectionError):  # it does not listen yet
                if self.ask("/health")[0] == 200:
                    return
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"The server does not answer:\n{self.process.communicate()[0]}")

    def kill(self) -> None:
        """End all of its processes."""
        with suppress(ProcessLookupError):  # they have ended
            os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, which trains its model first."""
    checkpoint = tmp_path_factory.mktemp("serve") / "digits.ckpt"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--checkpoint", str(checkpoint), "--port", str(port)],
        cwd=checkpoint.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    running = Server(process, port, checkpoint)
    try:
        running.wait_until_healthy()
        yield running
    finally:
        running.kill()
        process.communicate(timeout=30)


@pytest.fixture(scope="module")
def predictor(server: Server) -> IT3Predictor:
    """The predictor of the same model, in this process."""
    kind = runpy.run_path(str(SCRIPT))["IT3Digits"]
    settings = Settings(scope="sample", backend="loop")
    return IT3Predictor.from_checkpoint(server.checkpoint, kind, settings=settings)


@pytest.fixture(scope="module")
def images() -> dict[str, Tensor]:
    """Forty test digits, clean and under noise."""
    data = DigitsDataModule(shifts=("gaussian_noise",), severity=5)
    loaders = zip(data.test_names, data.test_dataloader(), strict=True)
    return {name: next(iter(loader))[0][:40] for name, loader in loaders}


def test_answers_are_the_predictions_of_the_predictor(
    server: Server, predictor: IT3Predictor, images: dict[str, Tensor]
) -> None:
    for image in images["gaussian_noise"][:10]:
        answer, expected = server.predict(image), predictor(image[None])
        probabilities = expected.outputs.softmax(1)[0]
        got = torch.tensor(answer["probabilities"])
        torch.testing.assert_close(got, probabilities, atol=1e-4, rtol=0)
        assert answer["label"] == probabilities.argmax()
        assert answer["source_label"] == expected.source_outputs.argmax()
        assert answer["distance"] == pytest.approx(expected.distance.item(), rel=1e-4)
        assert answer["skipped"] is False


def test_weights_adapt_to_an_image(predictor: IT3Predictor, images: dict[str, Tensor]) -> None:
    predictions = [predictor(image[None]) for image in images["gaussian_noise"]]
    moved = [float((p.outputs - p.source_outputs).abs().max()) for p in predictions]
    assert max(moved) > 1e-3


def test_distance_is_larger_for_what_is_unlike_the_training_data(
    predictor: IT3Predictor, images: dict[str, Tensor]
) -> None:
    clean, noise = (predictor(images[name]).distance for name in ("clean", "gaussian_noise"))
    assert noise.mean() > 1.5 * clean.mean()


def test_clients_at_once_get_what_each_gets_alone(
    server: Server, images: dict[str, Tensor]
) -> None:
    mixed = [image for pair in zip(*images.values(), strict=True) for image in pair][:24]
    alone = [server.predict(image) for image in mixed]
    with ThreadPoolExecutor(8) as clients:
        runs = [list(clients.map(server.predict, order)) for order in (mixed, mixed[::-1])]
    for run in (runs[0], runs[1][::-1]):
        for answer, expected in zip(run, alone, strict=True):
            for name in ("probabilities", "distance"):
                assert answer[name] == pytest.approx(expected[name], abs=1e-4)
            assert answer["source_label"] == expected["source_label"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 422, "Field required"),
        (b"hello", 422, "JSON decode error"),
        (b"\xff\xfe", 422, "JSON decode error"),
        (b"[1, 2]", 422, "body: Input should be a valid dictionary"),
        (b"{}", 422, "body.image: Field required"),
        (b'{"image": NaN}', 422, "body.image: Input should be a valid list"),
        (json.dumps({"image": DARK[:7]}).encode(), 422, "at least 8 items after validation, not 7"),
        (json.dumps({"image": DARK}).replace("0.0", "NaN").encode(), 422, "body.image.0.0: Input"),
        (
            json.dumps({"image": DARK}).replace("0.0", "255").encode(),
            422,
            "less than or equal to 1",
        ),
        (json.dumps({"image": DARK}).replace("0.0", '"a"').encode(), 422, "a valid number"),
        (b"[" * 10_000, 400, "error parsing the body"),
        (b"[" * 20_000, 413, "Payload too large"),
    ],
    ids=[
        *("empty", "text", "bytes", "list", "no image", "no list", "seven rows"),
        *("not finite", "bytes of grey", "words", "deep", "large"),
    ],
)
def test_malformed_request_is_told_what_is_wrong_with_it(
    server: Server, body: bytes, status: int, message: str
) -> None:
    got, answer = server.ask("/predict", body)
    assert got == status
    assert message in json.loads(answer)["detail"]
    assert server.ask("/health") == (200, "ok")


def test_server_ends_on_sigterm_with_all_its_processes(server: Server) -> None:
    server.process.terminate()
    # the output ends when the last process that can write to it has
    output = server.process.communicate(timeout=30)[0]
    assert server.process.returncode == 0, output
    assert "Traceback" not in output
    with pytest.raises(URLError, match="refused"):
        server.ask("/health")
