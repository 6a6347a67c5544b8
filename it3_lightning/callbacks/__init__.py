"""Callbacks: test-time adaptation under a Trainer, in ``test``, ``predict`` and ``validate``.

``test_time`` has the hooks; ``gate`` measures validation samples; ``checks`` says what a Trainer
may not do; ``summary`` what a run came to; ``prediction_writer`` writes what ``predict`` saw.
"""

from it3_lightning.callbacks.prediction_writer import IT3PredictionWriter
from it3_lightning.callbacks.summary import Summary
from it3_lightning.callbacks.test_time import IT3TestTimeCallback, TestTimeCallback

__all__ = ["IT3PredictionWriter", "IT3TestTimeCallback", "Summary", "TestTimeCallback"]
