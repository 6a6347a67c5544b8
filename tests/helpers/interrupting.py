"""Interrupts a run where it executes a line of the package, or by a signal at any moment."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch._dynamo import eval_frame  # loaded, so that compiled code is looked after
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import it3_lightning

PACKAGE = str(Path(it3_lightning.__file__).parent)
Line = tuple[str, int, str]
"""A file of the package, the number of a line in it, and ``"line"`` or ``"return"``."""


def lines_of(run: Callable[[], object]) -> dict[Line, int]:
    """Return each line of the package that a run executes, and how often."""
    hits: Counter[Line] = Counter()

    def note(line: Line) -> None:
        hits[line] += 1

    _traced(run, note)
    return dict(hits)


def interrupted(run: Callable[[], object], at: Line, time: int) -> bool:
    """Interrupt a run when it executes a line for the n-th time; return whether it came there."""
    count = 0

    def note(line: Line) -> None:
        nonlocal count
        if line == at:
            count += 1
            if count == time:
                raise KeyboardInterrupt

    try:
        _traced(run, note)
    except (KeyboardInterrupt, SystemExit):
        return True
    return count >= time


def _traced(run: Callable[[], object], note: Callable[[Line], None]) -> None:
    def trace(frame: FrameType, event: str, _: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return None
        if event in ("line", "return"):
            note((file[len(PACKAGE) + 1 :], frame.f_lineno, event))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)


def saved_tensors_hooks() -> Any:
    """Return the hooks for tensors that autograd saves; ``None`` too where torch does not tell."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    return top(False)


def process_state() -> dict[str, Any]:
    """Return the switches and hooks of the process that an interruption could leave."""
    backends = torch.backends
    hooks = {
        name: len(value)
        for name, value in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention": backends.mha.get_fastpath_enabled(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "cudnn": torch._C._get_cudnn_enabled(),
        "flash": backends.cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient": backends.cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "dtype": torch.get_default_dtype(),
        "saved": saved_tensors_hooks(),
        "modes": len(_get_current_dispatch_mode_stack()),
        "compiled": str(eval_frame._stance),
        **hooks,
    }
