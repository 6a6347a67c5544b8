"""Examples in cells, as pages: text, code, and what it printed when it was run."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {"ten_minutes", "what_the_distance_tells"}  # of examples/, in cells
_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def cells(text: str) -> list[tuple[bool, str]]:
    r"""Return the cells of a script: whether it is Markdown, and its text.

    >>> cells('# %% [markdown]\\n# A\\n#\\n# b\\n\\n# %%\\nx = 1\\n')
    [(True, 'A\\n\\nb'), (False, 'x = 1')]
    """
    parts = _CELL.split(text)[1:]
    found = []
    for kind, body in zip(parts[::2], parts[1::2], strict=True):
        words = "[markdown]" in kind
        lines = body.strip().splitlines()
        found.append((words, "\n".join(line[2:] if words else line for line in lines)))
    return found


def run(text: str) -> list[str]:
    """Run the cells of code one after the other; return what each printed."""
    names: dict[str, object] = {"__name__": "__main__"}
    printed = []
    for words, code in cells(text):
        if not words:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, "cell", "exec"), names)
            printed.append(out.getvalue().rstrip())
    return printed


def page(text: str, printed: list[str]) -> str:
    """Return the cells and what they printed as Markdown."""
    outputs, parts = iter(printed), []
    for words, body in cells(text):
        if words:
            parts.append(body)
            continue
        parts.append(f"```python\n{body}\n```")
        if out := next(outputs):
            parts.append(f"```text\n{out}\n```")
    return "\n\n".join(parts) + "\n"


def script(name: str) -> str:
    """Return the text of an example."""
    return (ROOT / "examples" / f"{name}.py").read_text()


def printed_by(name: str) -> list[str]:
    """Return what each cell of an example printed when it was last run."""
    text = (ROOT / "docs" / "printed" / f"{name}.txt").read_text()
    return [part.strip("\n") for part in text.split("# %%\n")[1:]]
