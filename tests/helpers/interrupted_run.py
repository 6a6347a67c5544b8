"""Runs until it is interrupted by a signal; prints what that left behind: run by a test."""

import json
import logging
import signal
import sys
import warnings
from typing import Any

import torch

from helpers.interrupting import process_state
from helpers.toy import Marked, adapting, differing, everything, loader, net, quiet


def say(line: str) -> None:
    """Print a line, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(given: dict[str, Any]) -> None:
    """Predict, for ever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    stage = given.pop("stage", "predict")
    model: Any = net(Marked).eval()
    run = getattr(quiet(callbacks=[adapting(**given)]), stage)
    run(model, loader())
    model.calls.zero_()
    before, process = everything(model), process_state()
    say("ready")
    try:
        getattr(quiet(callbacks=[adapting(**given)]), stage)(model, loader(100_000, batch=4))
    except (KeyboardInterrupt, SystemExit):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        say("interrupted")
    model.calls.zero_()
    left = differing(before, everything(model))
    left += [name for name, value in process_state().items() if value != process[name]]
    say(str(left))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
