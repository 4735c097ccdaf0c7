"""Convert checkpoints between the official code and this one; greedy outputs stay the same.

    python scripts/convert.py from-official FILE DIR --model-id openai-community/gpt2 --c-thought 2 --max-latent-stage 3
    python scripts/convert.py from-official FILE DIR --model-id openai-community/gpt2 --method cot
    python scripts/convert.py to-official DIR FILE

DIR is a checkpoint for scripts/ask.py, load_model_path and transformers, without training state.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from components.errors import SaveError
from components.export import describe, export, require_description
from components.files import atomic_directory, saving
from components.pretrained import PREFIX, load_pretrained, load_state_file
from components.run_directory import locate
from config import Config, UserError
from curriculum import END, LATENT, METHODS, PAUSE, START, last_stage

MARKERS = {START, END, LATENT, PAUSE}


def from_official(file: Path, folder: Path, config: Config, stage: int | None) -> None:
    """Convert an official file into a checkpoint folder; stage: the last training stage (None: that of the config)."""
    check_free(folder)
    _, has_markers = load_state_file(file)
    if has_markers != METHODS[config.method].markers:
        found = "a Coconut checkpoint, with marker tokens" if has_markers else "a plain model, without marker tokens"
        raise UserError(f"--method {config.method}: {file} is {found}; pass the method it was trained with")
    if has_markers and not config.max_latent_stage:
        raise UserError("--max-latent-stage: missing; pass it and --c-thought as in the training config")
    pretrained = load_pretrained(config, file)
    stage = last_stage(config) if stage is None else stage
    with saving(folder), atomic_directory(folder) as partial:
        export(pretrained.lm, partial, describe(config, pretrained.tokenizer, stage, improved=False))
        pretrained.tokenizer.save_pretrained(partial)


def to_official(folder: Path, file: Path) -> None:
    """Convert a checkpoint folder into an official file.

    Raises: UserError for a checkpoint that the official code cannot represent (LoRA adapters, pause tokens, another
    vocabulary layout).
    """
    check_free(file)
    if not file.absolute().parent.is_dir():
        raise UserError(f"{file.parent} does not exist; create it first")
    folder = locate(folder)
    description = require_description(folder, "method")
    method = METHODS[description["method"]]
    if PAUSE in method.tokens:
        raise UserError(f"{folder} was trained with {description['method']}; the official code has no {PAUSE}")
    pretrained = load_pretrained(Config({"method": description["method"]}), folder)
    state, table = pretrained.lm.state_dict(), pretrained.lm.get_input_embeddings().weight
    rows, ids = len(table), [pretrained.token_id(token) for token in (START, END, LATENT)]
    own_tokens = len(pretrained.tokenizer) - len(pretrained.tokenizer.get_added_vocab().keys() & MARKERS)
    if not method.markers and own_tokens < rows <= len(pretrained.tokenizer):  # more: rows that the model had to spare
        raise UserError(
            f"{folder}: the official code loads {description['method']} into a model with {own_tokens} rows in its "
            f"embedding, but there are {rows}, with those of the marker tokens, because training started from a "
            "Coconut checkpoint; it cannot be converted"
        )
    if method.markers:
        if ids != [rows - 3, rows - 2, rows - 1]:
            raise UserError(
                f"{folder}: the official code expects the marker tokens in the last three of {rows} rows of the "
                f"embedding, but their ids are {ids}"
            )
        state = {PREFIX + name: value for name, value in state.items()} | {"embedding.weight": table.detach()}
    partial = file.with_name(file.name + ".partial")
    with saving(file):
        torch.save(state, partial)
        os.replace(partial, file)


def check_free(path: Path) -> None:
    """Raise UserError if the output path exists."""
    if path.exists():
        raise UserError(f"{path} already exists; remove it or choose another path")


def main(argv: list[str] | None = None) -> None:
    """Run the conversion given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    from_parser = commands.add_parser("from-official")
    from_parser.add_argument("file", type=Path)
    from_parser.add_argument("folder", type=Path)
    from_parser.add_argument("--model-id", required=True, help="hub name or folder of the base model")
    from_parser.add_argument("--method", default="coconut", choices=METHODS)
    from_parser.add_argument("--c-thought", type=int, default=1)
    from_parser.add_argument("--max-latent-stage", type=int, default=0)
    from_parser.add_argument("--stage", type=int, help="stage at which the file was saved (default: the last)")
    to_parser = commands.add_parser("to-official")
    to_parser.add_argument("folder", type=Path)
    to_parser.add_argument("file", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.command == "to-official":
            to_official(args.folder, args.file)
            return print(f"wrote {args.file}, which the official code loads as load_model_path")
        keys = ("model_id", "method", "c_thought", "max_latent_stage")
        values = {key: getattr(args, key) for key in keys}
        config = Config(values | {"from_scratch": True})  # all weights are in the file
        from_official(args.file, args.folder, config, args.stage)
        print(f"wrote {args.folder}: {', '.join(sorted(path.name for path in args.folder.iterdir()))}")
        print(f'  ask:   python scripts/ask.py {args.folder} "..."')
    except (UserError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
