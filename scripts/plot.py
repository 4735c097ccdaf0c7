"""Plot accuracy and loss of runs over epochs, with the stages marked.

    python scripts/plot.py checkpoints/ring-cot checkpoints/ring-coconut --out ring.svg       or .png, .pdf
    python scripts/plot.py checkpoints/ring-coconut-seed* --chance 14.3

Runs that differ only in their seed are plotted as their mean with a min-max band. Lines of the same method are labelled
with the config keys that differ. A line that ends early is continued by a dotted one to its name.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from runs import DATA_KEYS, FinishedRun, UserError, differences, display_value, read_run

from analysis.style import GREY, STYLE, in_percent, integer_ticks, model_colour, name_lines
from curriculum import METHODS

DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 3)))  # of lines of the same colour
PANELS = {"accuracy": "validation accuracy", "validation loss": "validation loss", "training loss": "training loss"}


def group(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Group runs that differ only in their seed."""
    groups = []
    for run in runs:
        for seeds in groups:
            if not differences(seeds[0], run):
                seeds.append(run)
                break
        else:
            groups.append([run])
    return groups


def labels(groups: list[list[FinishedRun]]) -> list[str]:
    """Label each line with its method and the keys that distinguish it from lines of the same method or other data."""
    names = []
    for seeds in groups:
        config, keys = seeds[0].config, {}
        for other, *_ in groups:
            differing = differences(seeds[0], other)
            keys |= {key: None for key in differing if other.config["method"] == config["method"] or key in DATA_KEYS}
        parts = [config["method"], *(f"{key} {display_value(key, config[key])}" for key in keys)]
        names.append(", ".join(parts) + seed_note(len(seeds)))
    return names


def seed_note(seeds: int) -> str:
    """Return what a label says about the number of seeds."""
    return f" ({seeds} seeds)" if seeds > 1 else ""


def draw_line(axes, seeds: list[FinishedRun], curve: str, percent: bool, **style) -> tuple[int, float]:
    """Plot the mean of a curve over seeds with a min-max band, over the epochs that all seeds have.

    Returns: the last epoch and its mean.
    """
    curves = [run.curves[curve] for run in seeds]
    epochs = sorted(set.intersection(*map(set, curves)))
    if not epochs:
        names = ", ".join(str(run.directory) for run in seeds)
        raise UserError(f"{names}: no epoch that all of these seeds have validated; plot them one by one")
    values = [[(100 if percent else 1) * each[epoch] for each in curves] for epoch in epochs]
    means = [statistics.mean(each) for each in values]
    axes.plot(epochs, means, marker=".", **style)
    if len(seeds) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)
    return epochs[-1], means[-1]


def stage_starts(groups: list[list[FinishedRun]]) -> dict[int, str]:
    """Find where stages start: {first epoch: the stage, or stages such as 1/2}, of the methods with stages of steps.

    icot is left out: its stages count tokens and may change in every epoch.
    """
    starts = {}
    for run in (run for seeds in groups for run in seeds if METHODS[run.config["method"]].steps == "by stage"):
        for epoch, stage in run.stages.items():
            if run.stages.get(epoch - 1) != stage:
                starts.setdefault(epoch, set()).add(stage)
    return {epoch: "/".join(map(str, sorted(stages))) for epoch, stages in sorted(starts.items())}


def draw(groups: list[list[FinishedRun]], chance: float | None):
    """Draw a panel each for accuracy, validation loss and training loss; chance is in %."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(6.5, 8.5), layout="constrained")
    panels = figure.subplots(len(PANELS), sharex=True)
    colours = [model_colour(seeds[0].config["method"]) for seeds in groups]
    names, numbers = labels(groups), {len(seeds) for seeds in groups}
    if len(numbers) == 1:  # named once, in the title
        names = [name.removesuffix(seed_note(*numbers)) for name in names]
    last = max(epoch for seeds in groups for run in seeds for epoch in run.stages)
    for axes, (curve, title) in zip(panels, PANELS.items(), strict=True):
        ends = []
        for number, (seeds, label) in enumerate(zip(groups, names, strict=True)):
            dashes = DASHES[colours[:number].count(colours[number]) % len(DASHES)]
            strong = {"linewidth": 1.2, "zorder": 2} if colours[number] == GREY else {"linewidth": 2, "zorder": 3}
            style = {"color": colours[number], "linestyle": dashes} | strong
            end = draw_line(axes, seeds, curve, curve == "accuracy", **style)
            ends.append((*end, label, colours[number]))
        for epoch in stage_starts(groups):
            axes.axvline(epoch - 0.5, color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(title + (seed_note(*numbers) if len(numbers) == 1 else ""), loc="left")
        axes.set_xlim(0.5, last)
        if curve != "accuracy":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            in_percent(axes.yaxis)
            if chance is not None:
                axes.axhline(chance, color="black", linestyle="--", linewidth=0.8, zorder=1)
                ends.append((last, chance, "chance", "black"))
        name_lines(axes, ends)
    for epoch, stages in stage_starts(groups).items():
        panels[0].annotate(f"stage {stages}", (epoch - 0.45, 0.02), xycoords=("data", "axes fraction"), fontsize=9)
    panels[-1].set_xlabel("epoch")
    integer_ticks(panels[-1].xaxis)
    return figure


def save(groups: list[list[FinishedRun]], path: Path, chance: float | None = None) -> None:
    """Plot into a new file; the same runs give the same SVG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed; pip install -r requirements.txt") from error
    if path.exists():
        raise UserError(f"--out {path}: already exists; remove it or choose another file")
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "coconut"}):
        try:
            draw(groups, chance).savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # missing folder, unknown file type
            raise UserError(f"--out {path}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Plot the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, save_path/name")
    parser.add_argument("--out", type=Path, default=Path("runs.svg"), help="output file (runs.svg)")
    parser.add_argument("--chance", type=float, metavar="PERCENT", help="draw the accuracy of guessing")
    args = parser.parse_args(argv)
    try:
        groups = group([read_run(directory) for directory in args.runs])
        save(groups, args.out, args.chance)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for label, seeds in zip(labels(groups), groups, strict=True):
        print(f"{label}: {', '.join(str(run.directory) for run in seeds)}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
