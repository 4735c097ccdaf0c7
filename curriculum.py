"""The methods of the paper's Table 1 and the curriculum: how many thoughts replace which steps at each stage."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

# Special tokens that are added to a tokenizer, in this order; <|pause|> for the methods that use it only.
START, END, LATENT, PAUSE = "<|start-latent|>", "<|end-latent|>", "<|latent|>", "<|pause|>"
ALL_STEPS = sys.maxsize  # a number of steps, or of step tokens, that no example exceeds


@dataclass(frozen=True)
class Method:
    """A row of the paper's Table 1, described by two independent choices.

    Attributes:
        steps: what happens to the language reasoning steps: "written" (always), "by stage" (removed one by one, stage
            by stage), "by token" (removed token by token) or "removed" (from the start).
        placeholder: what replaces removed steps, between the two markers: "latent" (continuous thoughts), "pause" (a
            learned token) or None (nothing, and no markers).
    """

    steps: str
    placeholder: str | None = None

    @property
    def markers(self) -> bool:
        """Whether sequences contain <|start-latent|> and <|end-latent|>, so that the model needs their embeddings."""
        return self.placeholder is not None

    @property
    def tokens(self) -> tuple[str, ...]:
        """Special tokens in this method's sequences."""
        return {None: (), "latent": (START, END, LATENT), "pause": (START, END, PAUSE)}[self.placeholder]


METHODS = {
    "cot": Method(steps="written"),
    "no_cot": Method(steps="removed"),
    "icot": Method(steps="by token"),
    "pause_token": Method(steps="removed", placeholder="pause"),
    "coconut": Method(steps="by stage", placeholder="latent"),
    "no_curriculum": Method(steps="removed", placeholder="latent"),
    "no_thoughts": Method(steps="by stage"),
    "pause_as_thought": Method(steps="by stage", placeholder="pause"),
}


def method_of(config) -> Method:
    """Return the method of a config. Raises ValueError if it names none."""
    if config.method not in METHODS:
        raise ValueError(f"method: {config.method!r} is not a method; choose one of {', '.join(METHODS)}")
    return METHODS[config.method]


def needs_steps(config) -> bool:
    """Return whether a run needs the problems' steps: to write them in training, or to count the thoughts."""
    method = method_of(config)
    written = method.steps != "removed" and not config.only_eval
    return written or (method.markers and not config.pad_latent_to_max)


def last_stage(config) -> int:
    """Return the first stage without written steps; beyond it nothing changes. icot's stages count step tokens."""
    icot = method_of(config).steps == "by token"
    return config.remove_all_when_remove_beyond if icot else config.max_latent_stage + 1


def stage_of(progress: float, config) -> int:
    """Return the stage that is trained after `progress` epochs, in 0 .. last_stage."""
    if method_of(config).steps == "by token":
        stage = int(round(progress * config.remove_per_epoch, 9))  # a whole number may come out just below itself
    else:
        stage = int(progress // config.epochs_per_stage)
    return min(effective_stage(stage, config), last_stage(config))


def effective_stage(stage: int, config) -> int:
    """Return the stage itself, or for methods without a curriculum the one at which they always are."""
    return {"written": 0, "removed": last_stage(config)}.get(method_of(config).steps, stage)


def evaluation_stage(config, description: dict) -> int:
    """Return the stage of an evaluation: that of epoch `resume` if it is set, else that of the checkpoint.

    A method without a curriculum has a single one. A checkpoint saved before the first step (stage -1) is evaluated at
    the first stage.
    """
    stage = stage_of(config.resume, config) if config.resume else max(description.get("stage", 0), 0)
    return effective_stage(stage, config)


def scheduled_stages(config, description: dict) -> set[int]:
    """Return the stages of a run's epochs; of an evaluation, its only one (see `evaluation_stage`)."""
    if config.only_eval:
        return {evaluation_stage(config, description)}
    return {stage_of(epoch, config) for epoch in range(config.resume, config.num_epochs)}


def apply_curriculum(
    stage: int, steps: list[list[int]], config, training: bool, offset: int = 0
) -> tuple[int, list[int]]:
    """Apply the curriculum rule to an example.

    Sources: the paper, section 3 "Training procedure"; for icot Deng et al. 2024 (arXiv 2405.14838), section 3.

    Args:
        stage: the scheduled stage, or the one drawn for the example.
        steps: the token ids of each step.
        training: whether the sequence is for training; else it is a prompt for generation, without written steps.
        offset: icot's removal smoothing: number of tokens that are removed in addition.

    Returns:
        The number of placeholder tokens, and the token ids of the steps that are still written.
    """
    start = num_removed(stage, config, training) + offset
    if method_of(config).steps == "by token":
        written = [token for step in steps for token in step][start:]
    else:
        written = [token for step in steps[start:] for token in step]
    return num_placeholders(stage, len(steps), config, training), written


def num_removed(stage: int, config, training: bool) -> int:
    """Return the number of leading steps (icot: step tokens) that are removed at a stage; ALL_STEPS if none is left."""
    stage = effective_stage(stage, config)
    return ALL_STEPS if stage >= last_stage(config) or not training else stage


def num_placeholders(stage: int, num_steps: int, config, training: bool) -> int:
    """Return the number of placeholder tokens at a stage in an example of `num_steps` steps."""
    if not method_of(config).placeholder:
        return 0
    thoughts = effective_stage(stage, config)
    if num_removed(stage, config, training) == ALL_STEPS:
        most = config.max_latent_stage if config.pad_latent_to_max else min(num_steps, config.max_latent_stage)
        thoughts = min(thoughts, most)
    return thoughts * config.c_thought


def schedule_table(config) -> str:
    """Format the curriculum of a run as a table: for each stage its epochs (from 1), placeholders and steps left.

    A warning follows if the run ends before its method does what it is meant for.
    """
    placeholder = method_of(config).placeholder
    unit = "tokens" if method_of(config).steps == "by token" else "steps"
    rows, first = [("epochs", "stage", "pauses" if placeholder == "pause" else "thoughts", f"{unit} left")], 1
    for epoch in range(config.num_epochs):
        stage = stage_of(epoch, config)
        if epoch + 1 < config.num_epochs and stage_of(epoch + 1, config) == stage:
            continue
        steps = [[0]] * (last_stage(config) + 1)  # an example with more steps than stages
        count, written = apply_curriculum(stage, steps, config, training=True)
        left = {len(steps): "all", 0: "none"}.get(len(written), f"all but the first {stage}")
        rows.append((f"{first}-{epoch + 1}", str(stage), str(count), left))
        first = epoch + 2
    return "\n".join([*(f"{a:>10}  {b:>5}  {c:>8}  {d}" for a, b, c, d in rows), *idle_curriculum(config)])


def idle_curriculum(config) -> list[str]:
    """Return a warning if a run never inserts a placeholder or removes a step, though its method does; else []."""
    method, stage = method_of(config), stage_of(math.nextafter(config.num_epochs, 0), config)
    if method.steps == "by stage" and config.uniform_prob:
        stage = ALL_STEPS  # some examples take later stages than the scheduled one
    measure = (
        num_placeholders(stage, ALL_STEPS, config, True) if method.placeholder else num_removed(stage, config, True)
    )
    if method.steps == "written" or measure > 0:
        return []
    what = "inserts a thought or pause" if method.placeholder else "removes a step"
    keys = "remove_per_epoch" if method.steps == "by token" else "epochs_per_stage, max_latent_stage and c_thought"
    epochs = f"{config.num_epochs} epoch{'s' * (config.num_epochs > 1)}"
    return [f"warning: method {config.method} never {what} in {epochs}; check num_epochs, {keys}"]
