"""The methods of the paper's Table 1 and the stage curriculum: which thoughts replace which steps, and when."""

from __future__ import annotations

import sys
from dataclasses import dataclass

# The tokens that the methods add to a tokenizer, in this order; the last one for pause methods only.
START, END, LATENT, PAUSE = "<|start-latent|>", "<|end-latent|>", "<|latent|>", "<|pause|>"
ALL = sys.maxsize  # more steps than there are


@dataclass(frozen=True)
class Method:
    """One row of the paper's Table 1, described by two independent choices.

    steps:       what happens to the written reasoning steps: "kept" (always written), "by stage" (removed one after
                 another, stage by stage), "by token" (removed token by token) or "removed" (gone from the start).
    placeholder: what stands, between the two markers, in the place of removed steps: "latent" (continuous
                 thoughts), "pause" (a learned token) or None (nothing, and no markers either).
    """

    steps: str
    placeholder: str | None = None

    @property
    def markers(self) -> bool:
        """Whether the sequences hold <|start-latent|> and <|end-latent|>, so that the model needs their rows."""
        return self.placeholder is not None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The added tokens that this method's sequences hold."""
        return {None: (), "latent": (START, END, LATENT), "pause": (START, END, PAUSE)}[self.placeholder]


METHODS = {
    "cot": Method(steps="kept"),
    "no_cot": Method(steps="removed"),
    "icot": Method(steps="by token"),
    "pause_token": Method(steps="removed", placeholder="pause"),
    "coconut": Method(steps="by stage", placeholder="latent"),
    "no_curriculum": Method(steps="removed", placeholder="latent"),
    "no_thoughts": Method(steps="by stage"),
    "pause_as_thought": Method(steps="by stage", placeholder="pause"),
}


def last_stage(config) -> int:
    """The stage from which on no written step is left; for icot, whose stages count tokens, where all are dropped."""
    icot = METHODS[config.method].steps == "by token"
    return config.remove_all_when_remove_beyond if icot else config.max_latent_stage + 1


def stage_of(progress: float, config) -> int:
    """The stage that is trained after `progress` epochs, 0 .. last_stage, past which nothing changes."""
    last = last_stage(config)
    stages = {
        "kept": 0,
        "removed": last,
        "by stage": int(progress // config.epochs_per_stage),
        "by token": int(progress * config.remove_per_epoch),
    }
    return min(stages[METHODS[config.method].steps], last)


def evaluation_stage(config, description: dict) -> int:
    """Return the stage of an evaluation: that of epoch `resume` if it is set, else that of the checkpoint."""
    return stage_of(config.resume, config) if config.resume else description.get("stage", 0)


def apply_curriculum(
    stage: int, steps: list[list[int]], config, training: bool, offset: int = 0
) -> tuple[int, list[int]]:
    """The curriculum rule: the number of placeholder tokens, and the step tokens that are still written.

    Args: the stage, the tokens of each step, the config, whether the sequence is for training (else a prompt for
    generation, which never holds steps), and for icot the tokens that an example drops beyond the stage.
    Sources: the paper, section 3 "Training procedure"; for icot Deng et al. 2024 (arXiv 2405.14838), section 3.
    """
    first = num_removed(stage, config, training) + offset
    if METHODS[config.method].steps == "by token":
        rest = [token for step in steps for token in step][first:]
    else:
        rest = [token for step in steps[first:] for token in step]
    return num_placeholders(stage, len(steps), config, training), rest


def num_removed(stage: int, config, training: bool) -> int:
    """How many of an example's steps (icot: of its step tokens), from the first on, are not written; ALL: none is."""
    stage = effective_stage(stage, config)
    return ALL if stage >= last_stage(config) or not training else stage


def num_placeholders(stage: int, steps: int, config, training: bool) -> int:
    """The number of placeholder tokens of an example with so many steps."""
    if not METHODS[config.method].placeholder:
        return 0
    most = config.max_latent_stage if config.pad_latent_to_max else min(steps, config.max_latent_stage)
    thoughts = effective_stage(stage, config)
    if num_removed(stage, config, training) == ALL:
        thoughts = min(thoughts, most)
    return thoughts * config.c_thought


def effective_stage(stage: int, config) -> int:
    """The stage at which the method stays, whatever the epoch, if it has no curriculum."""
    return {"kept": 0, "removed": last_stage(config)}.get(METHODS[config.method].steps, stage)


def schedule_table(config) -> str:
    """The curriculum of a run as text: for each stage its epochs (counted from 1), placeholders and steps left."""
    placeholder = METHODS[config.method].placeholder
    unit = "tokens" if METHODS[config.method].steps == "by token" else "steps"
    rows, first = [("epochs", "stage", "pauses" if placeholder == "pause" else "thoughts", f"{unit} left")], 1
    for epoch in range(config.num_epochs):
        stage = stage_of(epoch, config)
        if epoch + 1 < config.num_epochs and stage_of(epoch + 1, config) == stage:
            continue
        steps = [[0]] * (last_stage(config) + 1)  # any problem with more steps than there are stages
        count, rest = apply_curriculum(stage, steps, config, training=True)
        left = {len(steps): "all", 0: "none"}.get(len(rest), f"all but the first {stage}")
        rows.append((f"{first}-{epoch + 1}", str(stage), str(count), left))
        first = epoch + 2
    return "\n".join(f"{a:>10}  {b:>5}  {c:>8}  {d}" for a, b, c, d in rows)
