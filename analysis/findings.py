"""The result of one question of the analysis."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.report import Figure


@dataclass
class Findings:
    """The result of one question.

    figures: of the report; problems: {index: values for problems.jsonl}; summary: lines for the terminal; tensors:
    saved as safetensors; verdict: the answer in a sentence, "" if the question has none.
    """

    figures: list[Figure] = field(default_factory=list)
    problems: dict[int, dict] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    tensors: dict = field(default_factory=dict)
    verdict: str = ""
