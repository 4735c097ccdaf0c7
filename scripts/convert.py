"""Converts checkpoints of the official code to ours and back; the model gives the same tokens before and after.

    python scripts/convert.py from-official FILE DIR --model-id openai-community/gpt2 --c-thought 2 --max-latent-stage 3
    python scripts/convert.py from-official FILE DIR --model-id openai-community/gpt2 --method cot
    python scripts/convert.py to-official DIR FILE

DIR is what scripts/ask.py, load_model_path and transformers open, without the state of a training run.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from components.errors import SaveError  # noqa: E402
from components.export import DESCRIPTION, describe, export, read_description  # noqa: E402
from components.files import atomic_directory, saving  # noqa: E402
from components.pretrained import PREFIX, load_pretrained, load_state_file  # noqa: E402
from config import Config, UserError  # noqa: E402
from curriculum import END, LATENT, METHODS, PAUSE, START, last_stage  # noqa: E402


def from_official(file: Path, folder: Path, config: Config, stage: int | None) -> None:
    """Writes the folder of an official file; stage: that it was trained at last (None: the config's last one)."""
    check_free(folder)
    _, has_markers = load_state_file(file)
    if has_markers != METHODS[config.method].markers:
        holds = "a Coconut module, with markers" if has_markers else "a plain model, without markers"
        raise UserError(f"--method: {file} holds {holds}, which does not fit {config.method}; name its method")
    if has_markers and not config.max_latent_stage:
        raise UserError("--max-latent-stage: missing; give it and --c-thought as in the config of that training")
    pretrained = load_pretrained(config, file)
    stage = last_stage(config) if stage is None else stage
    with saving(folder), atomic_directory(folder) as partial:
        export(pretrained.lm, partial, describe(config, pretrained.tokenizer, stage, improved=False))
        pretrained.tokenizer.save_pretrained(partial)


def to_official(folder: Path, file: Path) -> None:
    """Writes an official file of a checkpoint of ours. Raises UserError for what the official code has no place for."""
    check_free(file)
    if (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds LoRA adapters; merge them into their model first")
    description = read_description(folder)
    if not description:
        raise UserError(f"{folder} holds no {DESCRIPTION}, so it is no checkpoint of ours")
    method = METHODS[description["method"]]
    if PAUSE in method.tokens:
        raise UserError(f"{folder} was trained with {description['method']}; the official code has no {PAUSE}")
    pretrained = load_pretrained(Config({"method": description["method"]}), folder)
    state, table = pretrained.lm.state_dict(), pretrained.lm.get_input_embeddings().weight
    if method.markers:
        rows, ids = len(table), [pretrained.token_id(token) for token in (START, END, LATENT)]
        if ids != [rows - 3, rows - 2, rows - 1]:
            raise UserError(
                f"{folder} has another vocabulary than the official code makes: of {rows} rows the last three should "
                f"be those of the markers, which are {ids}"
            )
        state = {PREFIX + name: value for name, value in state.items()} | {"embedding.weight": table.detach()}
    partial = file.with_name(file.name + ".partial")
    with saving(file):
        torch.save(state, partial)
        os.replace(partial, file)


def check_free(path: Path) -> None:
    """Raises UserError for a path that is there already."""
    if path.exists():
        raise UserError(f"{path} exists already; remove it or choose another place")


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    coming = commands.add_parser("from-official")
    coming.add_argument("file", type=Path)
    coming.add_argument("folder", type=Path)
    coming.add_argument("--model-id", required=True, help="hub name or folder of the model that was trained")
    coming.add_argument("--method", default="coconut", choices=METHODS)
    coming.add_argument("--c-thought", type=int, default=1)
    coming.add_argument("--max-latent-stage", type=int, default=0)
    coming.add_argument("--stage", type=int, help="at which the file was saved (default: the last one)")
    going = commands.add_parser("to-official")
    going.add_argument("folder", type=Path)
    going.add_argument("file", type=Path)
    arguments = parser.parse_args(words)
    try:
        if arguments.command == "to-official":
            return to_official(arguments.folder, arguments.file)
        keys = ("model_id", "method", "c_thought", "max_latent_stage")
        values = {key: getattr(arguments, key) for key in keys}
        config = Config(values | {"from_scratch": True})  # the file has all weights
        from_official(arguments.file, arguments.folder, config, arguments.stage)
    except (UserError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
