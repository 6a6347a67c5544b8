"""Draws how_it_works.svg, the four steps: python docs/draw_how_it_works.py."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

NETWORK, FROZEN, VALUE, LOSS = "#dbe7fb", "#e6e6e6", "#ffffff", "#fbe3dc"


@plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "it3"})
def draw(path: Path) -> None:
    """Draw the figure into an SVG file."""
    figure, axes = plt.subplots(figsize=(9, 2.9))
    axes.set_xlim(0, 82)
    axes.set_ylim(3, 30)
    axes.axis("off")

    def box(x: float, y: float, width: float, text: str, colour: str, note: str = "") -> None:
        shape = FancyBboxPatch(
            (x, y), width, 6, boxstyle="round,pad=0.6", facecolor=colour, edgecolor="#444444"
        )
        axes.add_patch(shape)
        axes.text(x + width / 2, y + 3, text, ha="center", va="center", fontsize=12)
        axes.text(x + width / 2, y - 2.6, note, ha="center", va="center", fontsize=8.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, **style))

    box(2, 10, 5, "x", VALUE, "a test sample,\nno label")
    box(16, 10, 13, "f(x, 0)", NETWORK, "1  predict,\nshown no prior")
    box(38, 10, 5, "y₀", VALUE)
    box(52, 10, 13, "F(x, y₀)", FROZEN, "2  the frozen copy,\nshown the prediction")
    box(74, 10, 5, "y₁", VALUE)
    box(52, 20, 13, "d(y₀, y₁)", LOSS)
    for start, end in ((8, 15), (30, 37), (44, 51), (66, 73)):
        arrow((start, 13), (end, 13), color="#444444")
    arrow((40.5, 17), (51, 23), color="#444444")
    arrow((76.5, 17), (66, 23), color="#444444")
    arrow((51, 22), (22.5, 17.4), color="#c0392b", connectionstyle="arc3,rad=0.12", linestyle="--")
    axes.text(
        16,
        25,
        "3  move the weights a little, so that the two agree\n"
        "4  predict again, and put every weight back",
        fontsize=8.5,
        color="#c0392b",
        ha="left",
        va="center",
    )
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_name("how_it_works.svg"))
