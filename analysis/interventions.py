"""Replace thoughts and measure the effect on the answer and on later thoughts.

*frozen*: the thoughts after a replaced one keep their values; *propagated*: they are recomputed from it. If no
unreplaced thought follows, the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.figure import Figure as Canvas
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from analysis.findings import Findings
from analysis.report import WIDTH, Figure, draw_rates
from analysis.statistics import compare
from analysis.thoughts import SEED, Subject, extended, noise, read_thoughts, think, write_answers
from evaluate import normalize

# Names of controls, and of what replaces the thoughts.
CONTROLS = UNTOUCHED, NONE, QUESTION = "own thoughts", "no thoughts (k = 0)", "the question alone"
ORDER, REPEATED = "own thoughts, reordered", "thought 1, repeated"  # only applied to all thoughts at once
AS_MANY, OTHER = "another problem's thoughts", "another problem's, other step count"
NOISE_OF_NORM = "noise of the same norm"
WHOLE = ("", "all")  # `places` of controls and of replacements of all thoughts


@dataclass(frozen=True)
class Replacement:
    """Values (problems, thoughts, hidden) for thoughts, and the problems they are taken from, if any."""

    values: Tensor
    donors: list[int] | None = None


def analyze(subject: Subject, baselines: list[Subject]) -> Findings:
    """Run every replacement at every subset of places.

    Controls: the untouched model, no thoughts between the markers (k = 0), the question without markers and thoughts,
    and other models.
    """
    thoughts = read_thoughts(subject)  # (problems, thoughts, hidden)
    answers = {(UNTOUCHED, "", ""): write_answers(subject, UNTOUCHED)}
    answers[NONE, "", ""] = write_answers(subject.with_thoughts(0), NONE)
    answers[QUESTION, "", ""] = write_answers(subject.with_question_alone(), QUESTION)
    for model in baselines:
        answers[model.name, "", ""] = write_answers(model, "control")
    options = replacements(subject, thoughts)
    cells = [
        (name, places, mode)
        for name in options
        for places, chosen in subsets(subject.thoughts).items()
        for mode in modes(chosen)
        if places == "all" or name not in (ORDER, REPEATED)
    ]
    for name, places, mode in tqdm(cells, desc=f"{subject.name}: interventions", leave=False, disable=None):
        values, forced = options[name].values, subsets(subject.thoughts)[places]
        if mode == "frozen":
            replaced = torch.tensor(forced)[:, None]  # (thoughts, 1)
            values = torch.where(replaced, values, thoughts)  # (problems, thoughts, hidden)
            forced = [True] * subject.thoughts
        answers[name, places, mode] = write_answers(subject, name, values, forced)
    figures = [table(subject, answers, options), influence(subject, thoughts, answers[UNTOUCHED, "", ""])]
    problems = {
        index: {
            "correct": answers[UNTOUCHED, "", ""][index]["correct"],
            "interventions": {cell[0]: own[index]["generated"] for cell, own in answers.items() if cell[1] in WHOLE},
        }
        for index in range(len(subject.problems))
    }
    summary = [
        f"accuracy {title}: " + "; ".join(f"{row['condition']} {row['rate']:.1%}" for row in own)
        for title, own in panels(figures[0].rows).items()
    ]
    return Findings(figures, problems, summary + donor_notes(subject, options), verdict=verdict(figures[0].rows))


def verdict(rows: list[dict]) -> str:
    """Say whether the thoughts are used, from the rows of `table`.

    They are if noise or another problem's thoughts lower the accuracy (Holm p < 0.05).
    """
    whole = {row["condition"]: row for row in rows if row["places"] in WHOLE}
    replaced = [whole[name] for name in (NOISE_OF_NORM, AS_MANY) if name in whole]
    used = any(row["difference"] < 0 and row["Holm p"] < 0.05 for row in replaced)
    own, *_ = whole.values()
    effects = " and ".join(f"{row['rate']:.1%} with {row['condition']}" for row in replaced)
    if used:
        opening = f"Thoughts are used: accuracy falls from {own['rate']:.1%} to {effects}"
    else:
        opening = f"No use of the thoughts is found: accuracy is {own['rate']:.1%}, {effects}"
    return f"{opening} (n = {own['n']}). From the question alone, it is {whole[QUESTION]['rate']:.1%}."


def panels(rows: list[dict]) -> dict[str, list[dict]]:
    """Return the controls, and the replacements of all thoughts, by title."""
    return {
        "of controls": [row for row in rows if row["places"] == ""],
        "with all thoughts replaced by": [row for row in rows if row["places"] == "all"],
    }


def replacements(subject: Subject, thoughts: Tensor) -> dict[str, Replacement]:
    """Draw the replacements for thoughts (problems, thoughts, hidden), with a fixed seed."""
    random = torch.Generator().manual_seed(SEED)
    found = {
        "zeros": Replacement(torch.zeros_like(thoughts)),
        "the mean thought": Replacement(thoughts.mean((0, 1)).expand_as(thoughts)),
        "the mean at their position": Replacement(thoughts.mean(0).expand_as(thoughts)),
        NOISE_OF_NORM: Replacement(noise(thoughts)),
    }
    if subject.thoughts > 1:
        moves = torch.randint(1, subject.thoughts, (len(thoughts),), generator=random).tolist()
        turned = [own.roll(move, 0) for own, move in zip(thoughts, moves, strict=True)]
        found[ORDER] = Replacement(torch.stack(turned))  # no thought keeps its place
        found[REPEATED] = Replacement(thoughts[:, :1].expand_as(thoughts))
    steps = [len(problem["steps"]) for problem in subject.problems]
    for name, alike in ((AS_MANY, True), (OTHER, False)):
        if donors := draw_donors(steps, alike, random):
            found[name] = Replacement(thoughts[donors], donors)
    return found


def draw_donors(steps: list[int], alike: bool, random: torch.Generator) -> list[int] | None:
    """Draw another problem for each problem at random.

    alike: with the same number of steps (or the nearest that exists), else with another number. Returns None if a
    problem has no donor.
    """
    donors = []
    for index, own in enumerate(steps):
        others = [other for other in range(len(steps)) if other != index and (alike or steps[other] != own)]
        if not others:
            return None
        if alike:
            nearest = min(abs(steps[other] - own) for other in others)
            others = [other for other in others if abs(steps[other] - own) == nearest]
        donors.append(others[torch.randint(len(others), (), generator=random).item()])
    return donors


def donor_notes(subject: Subject, options: dict[str, Replacement]) -> list[str]:
    """Report left-out controls, and problems whose donor has a different number of steps."""
    notes = [f"left out (not every problem has a donor): {name}" for name in (AS_MANY, OTHER) if name not in options]
    steps = [len(problem["steps"]) for problem in subject.problems]
    if AS_MANY in options:
        others = sum(steps[donor] != own for donor, own in zip(options[AS_MANY].donors, steps, strict=True))
        notes += [f"{AS_MANY}: the nearest number of steps for {others} of {len(steps)} problems"] if others else []
    return notes


def subsets(n: int) -> dict[str, list[bool]]:
    """Return the subsets of places to replace: all, each alone, the first few, the last few."""
    found = {"all": [True] * n}
    if n > 1:
        found |= {f"only {place + 1}": [other == place for other in range(n)] for place in range(n)}
    found |= {f"first {count}": [place < count for place in range(n)] for count in range(2, n)}
    return found | {f"last {count}": [place >= n - count for place in range(n)] for count in range(2, n)}


def modes(chosen: list[bool]) -> list[str]:
    """Return the modes of a subset, or [""] if no unreplaced place follows."""
    return [""] if all(chosen[chosen.index(True) :]) else ["frozen", "propagated"]


def table(subject: Subject, answers: dict[tuple, list[dict]], options: dict[str, Replacement]) -> Figure:
    """Tabulate accuracy of every cell against the untouched model, and how often the donor's answer is given."""
    cells = {cell: {index: answer["correct"] for index, answer in enumerate(own)} for cell, own in answers.items()}
    expected = [normalize(problem["answer"]) for problem in subject.problems]
    untouched = [answer["answer"] for answer in answers[UNTOUCHED, "", ""]]
    rows = []
    for row in compare(cells, (UNTOUCHED, "", "")):
        name, places, mode = row.pop("cell")
        own = [answer["answer"] for answer in answers[name, places, mode]]
        changed = sum(a != b for a, b in zip(own, untouched, strict=True))
        donors = options[name].donors if name in options else None
        from_donor = donors and sum(a == expected[d] for a, d in zip(own, donors, strict=True))
        before = donors and sum(a == expected[d] for a, d in zip(untouched, donors, strict=True))
        rows.append({"condition": name, "places": places, "later thoughts": mode} | row | {"answers changed": changed})
        rows[-1] |= {"donor's answer": from_donor, "donor's answer, untouched": before}
    caption = (
        "Accuracy when thoughts are replaced, with 95 % intervals; dotted: own thoughts, dashed: chance. In the "
        "table, rows without places are controls; later thoughts are frozen (kept), propagated (recomputed), or, if "
        "empty, there are none. Differences are to own thoughts, paired by problem; McNemar p, Holm-corrected over "
        "all rows. Counts are out of n problems."
    )
    title = "Are the thoughts used?"
    return Figure("interventions", title, caption, rows, lambda canvas: draw(canvas, rows, subject.chance))


def draw(canvas: Canvas, rows: list[dict], chance: float | None) -> None:
    """Plot the accuracy of the controls, and below that of the replacements of all thoughts, with intervals."""
    parts = panels(rows)
    canvas.set_size_inches(WIDTH, 1.6 + 0.32 * sum(map(len, parts.values())))
    drawn = canvas.subplots(2, 1, sharex=True, height_ratios=[len(own) + 1 for own in parts.values()])
    for axes, (title, own) in zip(drawn, parts.items(), strict=True):
        draw_rates(axes, own, "rate", [row["condition"] for row in own], chance)
        axes.axvline(100 * rows[0]["rate"], color="black", linestyle=":", linewidth=0.8, zorder=0)
        axes.set_title(f"accuracy {title} (n = {own[0]['n']})")


def influence(subject: Subject, thoughts: Tensor, answers: list[dict]) -> Figure:
    """Replace each thought by noise of the same norm and measure the effect on later thoughts and on the answer.

    KL divergence (nats) from the untouched to the changed model: of the projection of later thoughts onto the
    vocabulary, and averaged over the tokens that the untouched model generates.
    """
    prompts = subject.prompts
    outputs = [own["ids"] for own in answers]
    if subject.positions:  # an eos may lie beyond the last position
        room = [subject.positions - len(prompt["input_ids"]) for prompt in prompts]
        outputs = [ids[:limit] for ids, limit in zip(outputs, room, strict=True)]
    items = [extended(prompt, ids) for prompt, ids in zip(prompts, outputs, strict=True)]
    changed = noise(thoughts)  # (problems, thoughts, hidden)
    sums = torch.zeros(subject.thoughts, subject.thoughts + 1)  # (replaced thought, later thought or answer)
    for part, batch in subject.batches(items, "influence"):
        before = projections(subject, batch, [len(outputs[index]) for index in part])
        for place in range(subject.thoughts):
            forced = [other == place for other in range(subject.thoughts)]
            after = projections(subject, batch, [len(outputs[index]) for index in part], changed[part], forced)
            for later in range(place + 1, subject.thoughts):
                sums[place, later] += divergence(before[0][:, later], after[0][:, later]).sum().item()
            sums[place, -1] += sum(divergence(a, b).mean().item() for a, b in zip(before[1], after[1], strict=True))
    means, rows = (sums / len(items)).tolist(), []
    for place, line in enumerate(means):
        row = {"replaced by noise": f"thought {place + 1}", "n": len(items)}
        row |= {f"thought {later + 1}": line[later] if later > place else None for later in range(subject.thoughts)}
        rows.append(row | {"answer": line[-1]})
    caption = (
        "Mean KL divergence (nats) between the vocabulary distributions of the untouched and the changed model, at "
        "later thoughts and at each token of the untouched model's output."
    )
    return Figure("influence", "What a thought changes", caption, rows)


@torch.no_grad()
def projections(subject: Subject, batch: dict, written: list[int], values: Tensor | None = None, forced=()):
    """Project thoughts and outputs onto the vocabulary.

    Returns: log probabilities at the thoughts, (batch, thoughts, vocabulary), and for each row at its last `written`
    tokens, (tokens, vocabulary).
    """
    hidden, embeds = think(subject, batch, values, forced)
    is_latent = batch["input_ids"] == subject.model.latent_token_id  # (batch, length)
    own = embeds[is_latent.to(embeds.device)].view(len(hidden), subject.thoughts, -1)  # (batch, thoughts, hidden)
    ends = batch["attention_mask"].shape[1] - batch["attention_mask"].flip(1).argmax(1)  # (batch,), past the last token
    rows = [
        subject.model.logits(row[end - count - 1 : end - 1]).log_softmax(-1)
        for row, end, count in zip(hidden, ends.tolist(), written, strict=True)
    ]
    return subject.model.logits(own).log_softmax(-1), rows


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """Compute the KL divergence, (n,), of (n, vocabulary) log probabilities."""
    return F.kl_div(after, before, log_target=True, reduction="none").sum(-1)
