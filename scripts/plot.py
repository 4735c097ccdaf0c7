"""Draws accuracy and loss of runs over their epochs, with the stages marked.

    python scripts/plot.py checkpoints/ring-cot checkpoints/ring-coconut --out ring.svg       or .png, .pdf
    python scripts/plot.py checkpoints/ring-coconut-seed*

Runs that differ in their seed alone become one line, their mean, in a band from the lowest to the highest. Lines of
the same method are told apart by the keys in which they differ. Needs matplotlib (requirements-extra.txt).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from runs import DATA_KEYS, Finished, UserError, differences, read_run, shown

from analysis.report import COLOURS

DASHES = ("-", "--", "-.", ":")  # they tell lines apart without their colours
STYLE = {"font.size": 12, "svg.hashsalt": "coconut", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3}


def group(runs: list[Finished]) -> list[list[Finished]]:
    """The runs, those that differ in their seed alone together."""
    groups = []
    for run in runs:
        alike = [seeds for seeds in groups if not differences(seeds[0], run)]
        if alike:
            alike[0].append(run)
        else:
            groups.append([run])
    return groups


def labels(groups: list[list[Finished]]) -> list[str]:
    """A name for each line: its method, and the keys that tell it from lines of that method or of other data."""
    names = []
    for seeds in groups:
        config, keys = seeds[0].config, {}
        for other, *_ in groups:
            differing = differences(seeds[0], other)
            keys |= {key: None for key in differing if other.config["method"] == config["method"] or key in DATA_KEYS}
        parts = [config["method"], *(f"{key} {shown(key, config[key])}" for key in keys)]
        names.append(", ".join(parts) + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""))
    return names


def draw_line(axes, seeds: list[Finished], curve: str, **style) -> None:
    """The mean of a curve over the seeds, in a band from the lowest to the highest, over the epochs that all have."""
    curves = [run.curves[curve] for run in seeds]
    epochs = sorted(set.intersection(*map(set, curves)))
    values = [[each[epoch] for each in curves] for epoch in epochs]
    axes.plot(epochs, [statistics.mean(each) for each in values], marker=".", **style)
    if len(seeds) > 1:
        low, high = [min(each) for each in values], [max(each) for each in values]
        axes.fill_between(epochs, low, high, color=style["color"], alpha=0.2, linewidth=0)


def switches(groups: list[list[Finished]]) -> dict[int, str]:
    """The last epochs before a stage switch, and the stages that begin there (of several lines: 1/2).

    Not those of icot, whose stages count tokens and may switch in every epoch.
    """
    found = {}
    for run in (run for seeds in groups for run in seeds if run.config["method"] != "icot"):
        for epoch, stage in run.stages.items():
            if run.stages.get(epoch - 1, stage) != stage:
                found.setdefault(epoch - 1, set()).add(stage)
    return {epoch: "/".join(map(str, sorted(stages))) for epoch, stages in found.items()}


def draw(groups: list[list[Finished]]):
    """The figure: accuracy above, the losses of validation (thick) and training (thin) below."""
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


def save(groups: list[list[Finished]], path: Path) -> None:
    """Draws into a file that does not exist yet; the same runs make the same SVG."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError("matplotlib is not installed; pip install -r requirements-extra.txt") from error
    if path.exists():
        raise UserError(f"--out {path}: exists already; remove it or name another file")
    with matplotlib.rc_context(STYLE):
        try:
            draw(groups).savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # no such folder, unknown ending
            raise UserError(f"--out {path}: {error}") from error


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's directory, save_path/name")
    parser.add_argument("--out", type=Path, default=Path("runs.svg"), help="the file to write (runs.svg)")
    arguments = parser.parse_args(words)
    try:
        groups = group([read_run(directory) for directory in arguments.runs])
        save(groups, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for label, seeds in zip(labels(groups), groups, strict=True):
        print(f"{label}: {', '.join(str(run.directory) for run in seeds)}")
    print(f"drawn: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
