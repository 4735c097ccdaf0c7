"""Colours and style of all figures: those of the report, of scripts/plot.py and of results/."""

from __future__ import annotations

# Okabe and Ito's colour-blind-safe palette.
BLUE, VERMILION, GREEN, PURPLE, SKY, ORANGE, BLACK, GREY = (
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
CATEGORIES = (GREEN, PURPLE, SKY, ORANGE, BLACK, GREY)  # of anything but methods
STYLE = {
    "font.size": 11,
    "svg.fonttype": "none",  # keep text as text
    "text.parse_math": False,  # $ in a question is not math; log axes need an explicit formatter, such as "{x:g}"
    "legend.edgecolor": "0.6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.alpha": 0.3,
}


def model_colour(name: str) -> str:
    """Return the colour of a model: its method's, which its name starts with ("cot", "cot 2")."""
    return METHOD_COLOURS.get(name.split()[0], GREY)


def in_percent(axis) -> None:
    """Give an axis of rates in % its range and ticks."""
    axis.axes.set(**{f"{axis.axis_name}lim": (-3, 103)})
    axis.set_ticks(range(0, 101, 20), [f"{tick}%" for tick in range(0, 101, 20)])


def integer_ticks(axis) -> None:
    """Put ticks at integers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def name_lines(axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write the name of each line at the right edge, at the height where the line ends: (x, y, name, colour) each.

    A line that ends early is continued by a dotted one. Names that would overlap are moved apart. Call this after the
    limits and scales are set.
    """
    size, edge = 9, axes.get_xlim()[1]
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    placed = sorted((to_fraction((edge, y))[1], name, colour) for _, y, name, colour in ends)
    places = moved_apart([y for y, *_ in placed], 1.5 * size / points(axes))
    for x, y, _, colour in ends:
        axes.plot([x, edge], [y, y], color=colour, linestyle=":", linewidth=0.8)
    for (y, name, colour), place in zip(placed, places, strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 0}
        style = {"va": "center", "fontsize": size, "color": colour, "arrowprops": line, "annotation_clip": False}
        axes.annotate(name, (1, y), (1.04, place), "axes fraction", **style)


def points(axes) -> float:
    """Return the height of a panel in points, before the layout takes room for labels."""
    return axes.get_position().height * axes.get_figure().get_figheight() * 72


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
