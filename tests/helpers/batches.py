"""Batches with thoughts at various positions, for tiny models with a vocabulary of 50."""

from __future__ import annotations

import random

import torch

from coconut import Coconut

EOS, START, END, LATENT = 0, 47, 48, 49
WORDS = range(1, 47)


def wrap(lm) -> Coconut:
    return Coconut(lm, LATENT, START, END, EOS)


def make_row(rng, thoughts, before=None, after=None):
    before, after = before or rng.randint(2, 7), after or rng.randint(2, 6)
    return [
        *rng.choices(WORDS, k=before),
        *([START, *[LATENT] * thoughts, END] if thoughts else []),
        *rng.choices(WORDS, k=after),
    ]


def pad(rows, offsets, fill=0):
    """The rows as a tensor (batch, length), each left-padded by its offset."""
    rows = [[fill] * n + row for n, row in zip(offsets, rows, strict=True)]
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def align(rows):
    """The offsets that align the first latents of all rows; 0 for rows without any."""
    firsts = [row.index(LATENT) if LATENT in row else None for row in rows]
    column = max((first for first in firsts if first is not None), default=0)
    return [0 if first is None else column - first for first in firsts]


def scattered():
    """Rows whose thoughts are neither consecutive nor aligned."""
    L = LATENT
    return [[5, L, 7, L, L, 9, 3], [4, 8, 8, L, 2], [6, 2, L, 3, 3, L, 1, L], [9, 9, 9, 9]]


RNG = random.Random(0)
BATCHES = {f"thoughts_{k}": [make_row(RNG, k) for _ in range(3)] for k in (0, 1, 2, 3, 6, 9, 10)}
BATCHES["mixed"] = [make_row(RNG, k) for k in (2, 0, 5, 1, 10)]
BATCHES["single_row"] = [make_row(RNG, 4)]
BATCHES["scattered"] = scattered()
BATCHES["latent_last"] = [[3, 4, START, LATENT, LATENT], [5, LATENT], [1, 2, 3]]


def make_labels(rows):
    """Labels after the last marker or thought; in batches of more than two, the second row has none at all."""
    labels = []
    for number, row in enumerate(rows):
        prompt = max([i for i, id in enumerate(row) if id in (LATENT, END)], default=1) + 1
        labels.append([-100] * len(row) if number == 1 and len(rows) > 2 else [-100] * prompt + row[prompt:])
    return labels


def batch_of(rows, offsets) -> dict:
    """The model's inputs for rows."""
    mask = pad([[1] * len(row) for row in rows], offsets)
    labels = pad(make_labels(rows), offsets, fill=-100)
    return {"input_ids": pad(rows, offsets), "attention_mask": mask, "labels": labels}
