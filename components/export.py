"""Folders that transformers opens: a model, the coconut.json that describes it, and the code that lets it think."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from components.files import make_private
from config import Config, UserError, abbreviated
from curriculum import ALL_STEPS, METHODS, num_placeholders

DESCRIPTION = "coconut.json"
GENERATE = Path("custom_generate") / "generate.py"  # where transformers looks for it


def export(lm: PreTrainedModel, folder: Path, description: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model, its coconut.json, and the code that lets it think under trust_remote_code.

    Decoding is greedy with the description's eos and length, whatever the original model was configured to do.

    Args:
        description: coconut.json; at least token_ids, thoughts, eos_token_id and max_new_tokens.
        weights: written instead of the model's own.
    """
    eos, limit = description["eos_token_id"], description["max_new_tokens"]
    lm.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, max_new_tokens=limit)
    lm.save_pretrained(folder, state_dict=weights)
    make_private((folder / GENERATE).parent)
    shutil.copyfile(Path(__file__).with_name("custom_generate.py"), folder / GENERATE)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def describe(config: Config, tokenizer: PreTrainedTokenizerBase, stage: int, **training) -> dict:
    """Return the coconut.json of a checkpoint: how to prompt it, and which added tokens it has rows for.

    thoughts is the number of thoughts (or pauses) of a problem with as many steps as there are stages.
    training: what else the file says, such as epoch and improved.
    """
    keys = ("method", "c_thought", "max_latent_stage", "pad_latent_to_max")
    return {key: getattr(config, key) for key in keys} | {
        "stage": stage,
        "thoughts": num_placeholders(max(stage, 0), ALL_STEPS, config, training=False),
        "max_new_tokens": config.answer_limit,
        **training,
        "token_ids": {token: tokenizer.convert_tokens_to_ids(token) for token in METHODS[config.method].tokens},
        "eos_token_id": tokenizer.eos_token_id,
    }


def read_description(folder: str | Path, revision: str | None = None) -> dict:
    """Read the coconut.json of a folder, {} if it has none. Raises UserError if it is not such a file.

    revision: that of the hub model that `folder` may name; None for what cannot be one.
    """
    path = Path(folder, DESCRIPTION)
    if revision and not os.path.isdir(folder):
        with suppress(OSError):  # what transformers raises for a missing file
            path = Path(cached_file(str(folder), DESCRIPTION, revision=revision))
    if not os.path.isfile(path):  # False, not an error, for a name that no file can have
        return {}
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(description, dict):
            raise ValueError(f"expected a mapping, got {abbreviated(description)}")
        for key, kind in {"token_ids": dict, "stage": int, "improved": bool}.items():
            if key in description and type(description[key]) is not kind:
                raise ValueError(f"{key}: expected a {kind.__name__}, got {abbreviated(description[key])}")
        if "method" in description and description["method"] not in list(METHODS):
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {abbreviated(description['method'])}")
        if description.get("stage", 0) < -1:  # -1: saved before the first step
            raise ValueError(f"stage: expected at least -1, got {description['stage']}")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"load_model_path: {str(path)!r} cannot be read: {error}") from error
    return description


def require_description(folder: str | Path, *keys: str) -> dict:
    """Read the coconut.json of a checkpoint. Raises UserError if there is none, or if it lacks one of the keys."""
    description = read_description(folder)
    remedy = "give a checkpoint of a run, such as checkpoints/NAME/best"
    if not description:
        what = (
            f"has no {DESCRIPTION}, so it is not a checkpoint of a run" if os.path.exists(folder) else "does not exist"
        )
        raise UserError(f"{folder} {what}; {remedy}")
    if missing := [key for key in keys if key not in description]:
        remedy += ", or pass them to Coconut.save_pretrained"
        raise UserError(f"{Path(folder, DESCRIPTION)} has no {', '.join(missing)}; {remedy}")
    return description
