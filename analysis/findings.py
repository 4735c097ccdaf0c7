"""What a question of the analysis finds: figures, a record for every problem, and a few lines for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.report import Figure


@dataclass
class Findings:
    """figures: for the report; problems: for each problem by its place, what was found of it; summary: lines of text;
    tensors: what is kept as safetensors."""

    figures: list[Figure] = field(default_factory=list)
    problems: dict[int, dict] = field(default_factory=dict)
    summary: list[str] = field(default_factory=list)
    tensors: dict = field(default_factory=dict)
