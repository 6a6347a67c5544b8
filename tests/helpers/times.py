"""Times that were made up, for the choice of a backend."""

from typing import Any

from it3_lightning.engine import Adaptation


class Times:
    """Tells times that were made up, and how many samples were run meanwhile."""

    def __init__(self, loop: float, vectorised: float) -> None:
        self.times = {"loop": loop, "vectorised": vectorised}
        self.asked: list[tuple[str, int]] = []

    def __call__(self, run: Any) -> tuple[Adaptation, float]:
        """Run, and say what it took."""
        result: Adaptation = run()
        name = "loop" if run.func.__name__ == "_one" else "vectorised"
        samples = result.skipped.numel()
        self.asked.append((name, samples))
        return result, self.times[name] * samples
