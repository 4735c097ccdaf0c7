"""Run all questions on a checkpoint and write the report."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from analysis import interventions, k_sweep, lens, operands, probes, search
from analysis.findings import Findings
from analysis.report import refuse_existing, write
from analysis.thoughts import Subject, open_subject
from components.data_sources import read_problems, read_source
from components.files import make_private
from components.run_directory import locate
from config import UserError, listed
from train import git_commit

QUESTIONS = {
    "k_sweep": lambda subject, baselines, chosen: k_sweep.analyze(subject, baselines),
    "search": lambda subject, baselines, chosen: search.analyze(subject, baselines, chosen),
    "lens": lambda subject, baselines, chosen: lens.analyze(subject, baselines, chosen),
    "interventions": lambda subject, baselines, chosen: interventions.analyze(subject, baselines),
    "probes": lambda subject, baselines, chosen: probes.analyze(subject, baselines),
    "operands": lambda subject, baselines, chosen: operands.analyze(subject),
}


def study(
    checkpoint: str,
    data: str | list[str],
    questions: list[str] | None = None,
    baselines: list[str] = (),
    limit: int = 500,
    batch_size: int = 64,
    chosen: int = 0,
    columns: dict[str, str] | None = None,
) -> Path:
    """Analyze a checkpoint on the first `limit` problems of a data set.

    Args:
        questions: None for all that apply to the checkpoint.
        baselines: checkpoints evaluated on the same problems for comparison.
        chosen: index of the problem whose search tree and tokens are drawn.
        columns: as in the config of the run.

    Returns: the folder written, CHECKPOINT/../analysis_CHECKPOINT.

    Raises: UserError for a question that does not apply, or if the folder contains a report.
    """
    folder = folder_of(checkpoint)
    refuse_existing(folder)
    started, problems = time.time(), load_problems(data, limit, columns)
    if not 0 <= chosen < len(problems):
        raise UserError(f"--problem {chosen}: out of range; {data} has problems 0 to {len(problems) - 1} (--limit)")
    subject = open_subject(checkpoint, problems, batch_size)
    others = with_own_names([open_subject(path, problems, batch_size) for path in baselines], subject)
    reasons = obstacles(subject)
    for question in questions or []:
        if question in reasons:
            raise UserError(f"--questions {question}: not applicable: {reasons[question]}; leave it out")
    selected = questions or [question for question in QUESTIONS if question not in reasons]
    findings = [QUESTIONS[question](subject, others, chosen) for question in selected]
    facts = {"checkpoint": checkpoint, "method": subject.checkpoint.config.method}
    facts |= {"problems": f"{len(problems)} of {', '.join(listed(data))}"}
    facts |= {"baselines": ", ".join(baselines) or "none", "seconds": round(time.time() - started)}
    facts |= {"device": device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"commit": git_commit()}
    facts |= {f"skipped: {name}": reason for name, reason in reasons.items() if not questions}
    save(folder, subject.run, facts, findings, problems)
    return folder


def folder_of(checkpoint: str) -> Path:
    """Return the output folder for a checkpoint."""
    place = locate(checkpoint).resolve()
    return place.parent / f"analysis_{place.name}"


def load_problems(data: str | list[str], limit: int, columns: dict[str, str] | None) -> list[dict]:
    """Load the first problems with all their fields, validated as for training."""
    checked = read_problems(data, limit, columns=columns)
    rows = islice(chain.from_iterable(read_source(path, columns) for path in listed(data)), limit)
    return [whole | problem for whole, problem in zip(rows, checked, strict=True)]


def with_own_names(others: list[Subject], subject: Subject) -> list[Subject]:
    """Number the baselines whose method occurs more than once."""
    names, named = {subject.name}, []
    for other in others:
        number = 2
        name = other.name
        while name in names:
            name, number = f"{other.name} {number}", number + 1
        names.add(name)
        named.append(replace(other, name=name))
    return named


def obstacles(subject: Subject) -> dict[str, str]:
    """Return the questions that do not apply to a subject: {question: reason}."""
    at = f"method {subject.checkpoint.config.method} at stage {subject.checkpoint.stage}"
    no_graph = None if all(subject.graphs) else "not all problems have a graph"
    no_thoughts = None if subject.thinks and subject.thoughts else f"{at} has no thoughts"
    no_places = None if subject.thoughts else f"{at} has no thoughts or pause tokens"
    no_sums = None if operands.changeable(subject) else "no problem starts with a calculation <<a*b=c>>"
    reasons = {
        "search": no_graph or no_places,
        "lens": no_thoughts,
        "interventions": no_thoughts,
        "probes": no_thoughts or no_graph or probes.obstacle(subject),
        "operands": no_thoughts or no_sums,
    }
    return {question: reason for question, reason in reasons.items() if reason}


def save(folder: Path, title: str, facts: dict, findings: list[Findings], problems: list[dict]) -> None:
    """Write the report, problems.jsonl and thoughts; print the summary."""
    verdicts = [part.verdict for part in findings if part.verdict]
    summary = [*verdicts[-1:], *(line for part in findings for line in part.summary)]
    lines = []
    for index, problem in enumerate(problems):
        line = {"idx": index, "question": problem["question"], "expected": problem["answer"]}
        for part in findings:
            line |= part.problems.get(index, {})
        lines.append(line)
    make_private(folder)
    for name, tensor in {name: tensor for part in findings for name, tensor in part.tensors.items()}.items():
        save_file({name: tensor.contiguous()}, folder / f"{name}.safetensors")
    write(folder, title, facts, summary, [figure for part in findings for figure in part.figures], lines)
    print("\n".join(summary))
    print(f"report: {folder / 'report.html'}")


def device_name() -> str:
    """Return the name of the device."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
