"""The methods of the paper's Table 1 and the stage curriculum: which thoughts replace which steps, and when."""

from __future__ import annotations

from dataclasses import dataclass

# The tokens that the methods add to a tokenizer, in this order; the last one for pause methods only.
START, END, LATENT, PAUSE = "<|start-latent|>", "<|end-latent|>", "<|latent|>", "<|pause|>"


@dataclass(frozen=True)
class Method:
    """One row of the paper's Table 1, described by two independent choices.

    steps:       what happens to the written reasoning steps: "kept" (always written), "staged" (removed one
                 after another, stage by stage) or "removed" (gone from the first epoch on).
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
    "pause_token": Method(steps="removed", placeholder="pause"),
    "coconut": Method(steps="staged", placeholder="latent"),
    "no_curriculum": Method(steps="removed", placeholder="latent"),
    "no_thoughts": Method(steps="staged"),
    "pause_as_thought": Method(steps="staged", placeholder="pause"),
}


def stage_of(epoch: int, config) -> int:
    """The stage that epoch (counted from 0) trains: 0 .. max_latent_stage + 1, past which nothing changes."""
    last = config.max_latent_stage + 1
    fixed = {"kept": 0, "removed": last}
    return fixed.get(METHODS[config.method].steps, min(epoch // config.epochs_per_stage, last))


def thoughts_and_removed(stage: int, n_steps: int, config, training: bool) -> tuple[int, int]:
    """The curriculum rule (paper, section 3 "Training procedure"; design: the table "Curriculum").

    Args: the stage, the number of written steps of the example, the config (method, c_thought, max_latent_stage,
    pad_latent_to_max) and whether the sequence is for training (else for generation, which never holds steps).
    Returns the number of placeholder tokens and the number of steps removed from the front.
    """
    method = METHODS[config.method]
    if method.steps == "removed":
        stage = config.max_latent_stage + 1
    most = config.max_latent_stage if config.pad_latent_to_max else min(n_steps, config.max_latent_stage)
    final = stage > config.max_latent_stage
    thoughts = min(stage, most) if final or not training else stage
    removed = n_steps if final or not training else min(stage, n_steps)
    return thoughts * config.c_thought if method.placeholder else 0, removed


def schedule_table(config) -> str:
    """The curriculum of a run as text: for each stage its epochs (counted from 1), thoughts and steps left."""
    rows, first = [], 1
    for epoch in range(config.num_epochs):
        stage = stage_of(epoch, config)
        if epoch + 1 == config.num_epochs or stage_of(epoch + 1, config) != stage:
            n_steps = config.max_latent_stage + 2  # any problem with more steps than stages
            thoughts, removed = thoughts_and_removed(stage, n_steps, config, training=True)
            left = "none" if removed == n_steps else "all" if removed == 0 else f"all but the first {removed}"
            rows.append((f"{first}-{epoch + 1}", str(stage), str(thoughts), left))
            first = epoch + 2
    placeholders = "pauses" if METHODS[config.method].placeholder == "pause" else "thoughts"
    head = ("epochs", "stage", placeholders, "steps left")
    return "\n".join(f"{a:>10}  {b:>5}  {c:>8}  {d}" for a, b, c, d in [head, *rows])
