"""Plot accuracy and loss of runs over epochs, with the stages marked.

    python scripts/plot.py checkpoints/ring-cot checkpoints/ring-coconut --out ring.svg       or .png, .pdf
    python scripts/plot.py checkpoints/ring-coconut-seed*

Runs that differ only in their seed are plotted as their mean with a min-max band. Lines of the same method are labelled
with the config keys that differ. Needs matplotlib (requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from runs import DATA_KEYS, FinishedRun, UserError, differences, display_value, read_run

from analysis.report import COLOURS

DASHES = ("-", "--", "-.", ":")  # readable without colour
STYLE = {"font.size": 12, "svg.hashsalt": "coconut", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}


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
        names.append(", ".join(parts) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""))
    return names


def draw_line(axes, seeds: list[FinishedRun], curve: str, **style) -> None:
    """Plot the mean of a curve over seeds with a min-max band, over the epochs that all seeds have."""
    curves = [run.curves[curve] for run in seeds]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = [[each[epoch] for each in curves] for epoch in epochs]
    axes.plot(epochs, [statistics.mean(each) for each in values], marker=".", **style)
    if len(seeds) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def switches(groups: list[list[FinishedRun]]) -> dict[int, str]:
    """Find the stage switches: {last epoch before a switch: the new stage, or stages such as 1/2}.

    icot is left out: its stages count tokens and may change in every epoch.
    """
    switched = {}
    for run in (run for seeds in groups for run in seeds if run.config["method"] != "icot"):
        for epoch, stage in run.stages.items():
            if run.stages.get(epoch - 1, stage) != stage:
                switched.setdefault(epoch - 1, set()).add(stage)
    return {epoch: "/".join(map(str, sorted(stages))) for epoch, stages in switched.items()}


def draw(groups: list[list[FinishedRun]]):
    """Draw the figure: accuracy above, validation loss (thick) and training loss (thin) below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 8), layout="constrained")
    accuracy, loss = figure.subplots(2, sharex=True)
    for number, (seeds, label) in enumerate(zip(groups, labels(groups), strict=True)):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        draw_line(accuracy, seeds, "accuracy", label=label, linewidth=2, **style)
        draw_line(loss, seeds, "validation loss", linewidth=2, **style)
        draw_line(loss, seeds, "training loss", linewidth=0.8, **style)
    for epoch, stages in switches(groups).items():
        for axes in (accuracy, loss):
            axes.axvline(epoch + 0.5, color="0.5", linestyle=":", zorder=0)
        top = accuracy.get_xaxis_transform()
        accuracy.text(epoch + 0.5, 1.01, f"stage {stages}", transform=top, rotation=30, fontsize=9)
    accuracy.set(ylabel="validation accuracy", ylim=(-0.02, 1.02))
    loss.set(xlabel="finished epochs", ylabel="loss (thin: training)", ylim=(0, None))
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def save(groups: list[list[FinishedRun]], path: Path) -> None:
    """Plot into a new file; the same runs give the same SVG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed; pip install -r requirements-extra.txt") from error
    if path.exists():
        raise UserError(f"--out {path}: already exists; remove it or choose another file")
    with matplotlib.rc_context(STYLE):
        try:
            draw(groups).savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # missing folder, unknown file type
            raise UserError(f"--out {path}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Plot the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, save_path/name")
    parser.add_argument("--out", type=Path, default=Path("runs.svg"), help="output file (runs.svg)")
    args = parser.parse_args(argv)
    try:
        groups = group([read_run(directory) for directory in args.runs])
        save(groups, args.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for label, seeds in zip(labels(groups), groups, strict=True):
        print(f"{label}: {', '.join(str(run.directory) for run in seeds)}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
