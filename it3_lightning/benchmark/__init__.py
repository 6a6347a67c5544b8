"""The benchmark: every way to train and to adapt, on the same samples, beside its baselines."""

from it3_lightning.benchmark.calibrate import Calibrated, PolicyChoice
from it3_lightning.benchmark.results import Record, Results
from it3_lightning.benchmark.rows import Row, rows_for
from it3_lightning.benchmark.run import Benchmark
from it3_lightning.benchmark.tune import Tuned, Tuning

__all__ = [
    "Benchmark",
    "Calibrated",
    "PolicyChoice",
    "Record",
    "Results",
    "Row",
    "Tuned",
    "Tuning",
    "rows_for",
]
