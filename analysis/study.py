"""All questions of the analysis to one checkpoint, and the folder with what was found."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import islice
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
from config import UserError
from train import git_commit

QUESTIONS = {
    "k_sweep": lambda subject, beside, chosen: k_sweep.analyze(subject, beside),
    "search": lambda subject, beside, chosen: search.analyze(subject, beside, chosen),
    "lens": lambda subject, beside, chosen: lens.analyze(subject, beside, chosen),
    "interventions": lambda subject, beside, chosen: interventions.analyze(subject, beside),
    "probes": lambda subject, beside, chosen: probes.analyze(subject, beside),
    "operands": lambda subject, beside, chosen: operands.analyze(subject),
}


def study(
    checkpoint: str,
    data: str,
    questions: list[str] | None = None,
    beside: list[str] = (),
    limit: int = 500,
    batch_size: int = 64,
    chosen: int = 0,
) -> Path:
    """Asks a checkpoint questions (None: all that make sense for it) about the first `limit` problems of a data set.

    beside: checkpoints that are asked the same problems, as controls; chosen: the problem whose tree and tokens are
    drawn. Writes CHECKPOINT/../analysis_CHECKPOINT, prints a summary, and returns the folder. Raises UserError for a
    question that makes no sense, and where the folder exists.
    """
    folder = folder_of(checkpoint)
    refuse_existing(folder)
    started, problems = time.time(), load_problems(data, limit)
    if not 0 <= chosen < len(problems):
        raise UserError(f"--problem {chosen}: {data} gives problems 0 to {len(problems) - 1} here")
    subject = open_subject(checkpoint, problems, batch_size)
    others = with_own_names([open_subject(path, problems, batch_size) for path in beside], subject)
    reasons = obstacles(subject)
    for question in questions or []:
        if question in reasons:
            raise UserError(f"--questions {question}: {reasons[question]}; leave it out")
    asked = questions or [question for question in QUESTIONS if question not in reasons]
    found = [QUESTIONS[question](subject, others, chosen) for question in asked]
    facts = {"checkpoint": checkpoint, "method": subject.opened.config.method, "problems": f"{len(problems)} of {data}"}
    facts |= {"beside": ", ".join(beside) or "none", "seconds": round(time.time() - started)}
    facts |= {"device": device_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    facts |= {"commit": git_commit()} | {
        f"without {name}": f"since {why}" for name, why in reasons.items() if not questions
    }
    save(folder, f"{subject.name}: {Path(checkpoint).resolve().name}", facts, found, problems)
    return folder


def folder_of(checkpoint: str) -> Path:
    """Where the analysis of a checkpoint goes."""
    place = Path(checkpoint).resolve()
    return place.parent / f"analysis_{place.name}"


def load_problems(data: str, limit: int) -> list[dict]:
    """The first problems of a source with all their fields, checked as for training."""
    checked = read_problems(data, limit)
    return [whole | problem for whole, problem in zip(islice(read_source(data), limit), checked, strict=True)]


def with_own_names(others: list[Subject], subject: Subject) -> list[Subject]:
    """The models beside a subject, numbered where two have the same method."""
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
    """Why questions make no sense for a subject, by question."""
    at = f"method {subject.opened.config.method} at stage {subject.opened.stage}"
    no_graph = None if all(subject.graphs) else "not every problem states a graph"
    no_thoughts = None if subject.thinks and subject.thoughts else f"{at} has no thoughts"
    no_places = None if subject.thoughts else f"{at} has no thoughts or pauses"
    no_sums = None if operands.changeable(subject) else "no problem's first step is a calculation <<a*b=c>>"
    reasons = {
        "search": no_graph or no_places,
        "lens": no_thoughts,
        "interventions": no_thoughts,
        "probes": no_thoughts or no_graph or probes.obstacle(subject),
        "operands": no_thoughts or no_sums,
    }
    return {question: reason for question, reason in reasons.items() if reason}


def save(folder: Path, title: str, facts: dict, found: list[Findings], problems: list[dict]) -> None:
    """Writes the report with its tables, a line per problem, and the thoughts; prints the summary."""
    summary = [line for part in found for line in part.summary]
    lines = []
    for index, problem in enumerate(problems):
        line = {"idx": index, "question": problem["question"], "expected": problem["answer"]}
        for part in found:
            line |= part.problems.get(index, {})
        lines.append(line)
    make_private(folder)
    for name, tensor in {name: tensor for part in found for name, tensor in part.tensors.items()}.items():
        save_file({name: tensor.contiguous()}, folder / f"{name}.safetensors")
    write(folder, title, facts, summary, [figure for part in found for figure in part.figures], lines)
    print("\n".join(summary))
    print(f"report: {folder / 'report.html'}")


def device_name() -> str:
    """What it ran on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
