"""Finished benchmarks that several files of tests look at; none of them changes what is there."""

from pathlib import Path

import pytest
from helpers.benchmark_runs import benchmark, digits, make_model

from it3_lightning.benchmark import Results


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, benchmark(folder, rows="all", streams=("equal", "unequal")).run(
        make_model, digits()
    )


@pytest.fixture(scope="session")
def with_distances(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("distances")
    return folder, benchmark(folder, distance_samples=60).run(make_model, digits())
