"""The folder of a model that thinks wherever transformers opens it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from components.files import make_private

DESCRIPTION = "coconut.json"  # beside the weights: method, c_thought, stage, thoughts, token_ids, ...
GENERATE = Path("custom_generate") / "generate.py"  # transformers looks for it there


def export(lm: PreTrainedModel, folder: Path, description: dict, weights: dict[str, Tensor] | None = None) -> None:
    """Writes a model, what coconut.json says of it, and the code that lets it think with trust_remote_code.

    description: at least token_ids, thoughts, eos_token_id and max_new_tokens; weights: in place of the model's own.
    Answers are greedy and end as here, whatever the model that the training began with was set to.
    """
    lm.save_pretrained(folder, state_dict=weights)
    eos = description["eos_token_id"]
    settings = GenerationConfig(eos_token_id=eos, pad_token_id=eos, max_new_tokens=description["max_new_tokens"])
    settings.save_pretrained(folder)
    make_private((folder / GENERATE).parent)
    shutil.copyfile(Path(__file__).with_name("custom_generate.py"), folder / GENERATE)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
