"""Runs the examples in cells and keeps what they print and draw: python docs/run_examples.py."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

from cells import PAGES, run, script  # noqa: E402


def main(names: list[str]) -> None:
    """Run the examples of these names, or all; figures are written beside the pages."""
    os.chdir(DOCS)
    for name in names or sorted(PAGES):
        printed = run(script(name))
        text = "".join(f"# %%\n{out}\n" for out in printed)
        Path("printed", f"{name}.txt").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
