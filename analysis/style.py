"""Colours and style of all figures: those of the report, of scripts/plot.py and of results/."""

from __future__ import annotations

# Okabe and Ito's colour-blind-safe palette.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY = COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#777777",  # darker than theirs: it is also the colour of names
)
METHOD_COLOURS = {"coconut": BLUE, "cot": VERMILION}  # all other methods are grey
STYLE = {
    "font.size": 11,
    "svg.fonttype": "none",  # keep text as text
    "text.parse_math": False,  # $ in a question is not math; log axes need an explicit formatter, such as "{x:g}"
    "legend.edgecolor": "0.6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def method_colour(method: str) -> str:
    """Return the colour of a method, in every figure."""
    return METHOD_COLOURS.get(method, GREY)


def in_percent(axis, low: float = -3, high: float = 103) -> None:
    """Give an axis of rates in % its range and ticks."""
    axis.set_view_interval(low, high, ignore=True)
    axis.set_ticks(range(0, 101, 20), [f"{tick} %" for tick in range(0, 101, 20)])


def name_lines(axes, ends: list[tuple[float, str, str]]) -> None:
    """Write the name of each line at the right edge, at the height where the line ends: (y, name, colour) each.

    Names that would overlap are moved apart. Call this after the y scale and limits are set.
    """
    size, figure = 9, axes.get_figure()
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted((to_fraction((axes.get_xlim()[1], y))[1], name, colour) for y, name, colour in ends)
    gap = 1.5 * size / (figure.get_figheight() * 72 / len(figure.axes))  # in heights of a panel
    for (y, name, colour), place in zip(ends, moved_apart([y for y, *_ in ends], gap), strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            name,
            (1, y),
            (1.04, place),
            "axes fraction",
            va="center",
            fontsize=size,
            color=colour,
            arrowprops=line,
            annotation_clip=False,
        )


def moved_apart(places: list[float], gap: float) -> list[float]:
    """Move ascending places as little as possible (least squares) until neighbours are at least `gap` apart."""
    blocks = []  # [sum, number] of places that share a shift
    for number, place in enumerate(places):
        blocks.append([place - number * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    shifted = [total / count for total, count in blocks for _ in range(count)]
    return [place + number * gap for number, place in enumerate(shifted)]
