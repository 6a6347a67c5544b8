"""An interruption at any line of the package, or at any moment, leaves nothing behind.

Of the lines that a run executes, every 40th is interrupted here. All of them, in about an hour:
``IT3_EVERY_LINE=1 python -m pytest tests/faults -n auto``.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupting import Line, interrupted, lines_of, process_state
from helpers.toy import Marked, adapting, differing, doubles, everything, loader, net, quiet

WAYS: dict[str, dict[str, Any]] = {
    "batch": {},
    "batch, test": {"stage": "test"},
    "loop": {"scope": "sample", "backend": "loop"},
    "vectorised": {"scope": "sample", "backend": "vectorised"},
    "online, mean": {
        "reset": "never",
        "norm_stats": "batch",
        "prediction": "mean",
        "anchor": "ema",
        "optimizer": "adam",
        "lr": 1e-2,
    },
    "gate, second": {"stage": "test", "gate": 0.3, "prediction": "second"},
}
EVERY = os.environ.get("IT3_EVERY_LINE") == "1"
STRIDE, PARTS = (1, 64) if EVERY else (40, 2)
SIGNALS = 250 if EVERY else 6


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


class Run:
    """A run of one way, on a module in which everything could be left behind."""

    def __init__(self, way: str) -> None:
        given = dict(WAYS[way])
        self.stage = given.pop("stage", "predict")
        self.given = given
        self.model: Any = net(Marked).eval()
        if "gate" in given:
            self.adapted("validate")
        quiet().predict(self.model, loader())  # Lightning leaves attributes of its own
        self.model.calls.zero_()

    def adapted(self, stage: str | None = None) -> Any:
        """Run with adaptation."""
        handler = signal.getsignal(signal.SIGINT)
        try:
            trainer = quiet(callbacks=[adapting(**self.given)])
            return getattr(trainer, stage or self.stage)(self.model, loader())
        finally:
            signal.signal(signal.SIGINT, handler)  # which Lightning disables on Ctrl-C


def lines(way: str, part: int) -> list[tuple[Line, int]]:
    """Return lines to interrupt, each the last time that it runs or half way there."""
    found = lines_of(Run(way).adapted)
    chosen = sorted(found)[part * STRIDE // PARTS :: STRIDE] if not EVERY else sorted(found)
    share = chosen[part::PARTS] if EVERY else chosen
    return [(line, times) for line in share for times in {found[line], max(1, found[line] // 2)}]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # as generators end
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("way", WAYS)
def test_an_interruption_at_a_line_leaves_nothing(way: str, part: int) -> None:
    cases = lines(way, part)
    assert cases
    reference = Run(way)
    reference.adapted("predict")
    expected = torch.cat(Run(way).adapted("predict"))
    fired = 0
    for line, times in cases:
        run, process = Run(way), process_state()
        before = everything(run.model)
        fired += interrupted(run.adapted, line, times)
        run.model.calls.zero_()  # the step's own doing
        assert differing(before, everything(run.model)) == [], (line, times)
        assert process_state() == process, (line, times)
        again = torch.cat(run.adapted("predict"))
        torch.testing.assert_close(again, expected, rtol=0, atol=0, msg=f"{line} {times}")
        run.model.calls.zero_()
        assert differing(before, everything(run.model)) == [], (line, times)
    assert fired > 0.8 * len(cases)


@pytest.mark.parametrize("way", ["batch", "vectorised", "loop"])
def test_signals_at_random_moments_leave_nothing(way: str) -> None:
    tests = Path(__file__).parents[1]
    draws = random.Random(0)
    for _ in range(max(1, SIGNALS // 3)):
        child = subprocess.Popen(
            [sys.executable, "-m", "helpers.interrupted_run", json.dumps(WAYS[way])],
            cwd=tests,
            stdout=subprocess.PIPE,
            text=True,
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(0.2 + draws.random())
            child.send_signal(signal.SIGINT)
            try:
                assert child.communicate(timeout=120)[0] == "interrupted\n[]\n"
            finally:
                child.kill()
