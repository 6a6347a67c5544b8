"""What `tests/benchmarks/value_contexts.py` shows beside a prior, and that it runs."""

import math
from pathlib import Path

import pytest
import torch
from value_contexts import (
    NONE,
    STREAMS,
    Errors,
    SharesInBatch,
    SharesOfMap,
    ValuesInBatch,
    gain,
    lines,
    main,
)

from it3_lightning import FeatureInjection


def test_values_see_mean_and_spread_of_their_batch() -> None:
    prior = ValuesInBatch(size=2, mean=[1.0, 2.0], std=[2.0, 4.0])
    values = prior.from_target(torch.tensor([[1.0, 2.0], [5.0, 2.0]]))  # 0 and 2, 0 and 0
    seen = prior.joined(values)
    spread = [math.log(1.02), math.log(0.02)]
    expected = torch.tensor([[*row, 1.0, 0.0, *spread] for row in values.tolist()])
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize("kind", [SharesOfMap, SharesInBatch])
def test_maps_see_shares_at_every_position(kind: type[SharesOfMap]) -> None:
    prior = kind(num_classes=2)
    maps = prior.from_target(torch.tensor([[[0, 0], [0, 1]], [[1, 1], [1, 1]]]))
    seen = prior.joined(maps)
    own = [[0.75, 0.25], [0.0, 1.0]]
    if kind is SharesInBatch:
        own = [[0.375, 0.625]] * 2
    for sample in range(2):
        for row in range(2):
            for column in range(2):
                pixel = maps[sample, :, row, column].tolist()
                pixel += [math.log(share + 0.02) for share in own[sample]]
                assert seen[sample, :, row, column].tolist() == pytest.approx(pixel)


def test_a_conditioning_has_room_for_the_context() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1))
    prior, conditioning = SharesOfMap(num_classes=2), FeatureInjection("0")
    conditioning.attach(network, prior)
    with conditioning.given(torch.rand(2, 2, 5, 5)):
        assert network(torch.rand(2, 3, 5, 5)).shape == (2, 4, 5, 5)


def test_a_gain_counts_a_sample_once_whatever_the_number_of_shifts() -> None:
    draw = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 40, generator=draw)
    cells = [("equal", "noise"), ("equal", "fog")]
    every = [(stream, shift) for stream in STREAMS for shift in ("clean", "noise", "fog")]
    found: Errors = {NONE: dict.fromkeys(every, one), "more": dict.fromkeys(every, other)}
    mean, half = gain(found, NONE, "more", cells)
    taken = (one - other).tolist()
    expected = sum(taken) / 40
    assert mean == pytest.approx(expected, abs=1e-6)
    variance = sum((each - expected) ** 2 for each in taken) / 39
    assert half == pytest.approx(1.96 * math.sqrt(variance / 40), rel=1e-4)
    found = {"first prediction": found[NONE], **found}
    assert lines("toy", [found], 1)[-1].startswith("| toy | … more | ")


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--data", "it3_lightning.data.BundledDataModule", "--data.name", "diabetes"]
    sizes = ["--data.train_size", "64", "--data.test_size", "40"]
    epochs = ["--benchmark.epochs", "1", "--benchmark.posthoc_epochs", "1"]
    network = ["--model.network.in_features", "10"]
    given = ["configs/boston.yaml", "--seeds", "0", "--output", str(tmp_path / "tiny")]
    for _ in range(2):  # the second time from its files
        main([*given, *data, *sizes, *epochs, *network])
    table = capsys.readouterr().out.splitlines()
    assert table[:3] == table[3:]
    assert [line.split("|")[2].strip() for line in table[:3]] == [
        "first",
        "second, no context",
        "… mean and spread",
    ]
    assert all(line.count("|") == 9 for line in table)
    assert len([*(tmp_path / "tiny").iterdir()]) == 3
