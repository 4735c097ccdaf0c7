"""Uploads a checkpoint to the Hugging Face hub, with a model card made from its run.

    python scripts/hub.py push checkpoints/NAME/best OWNER/NAME --license mit
    python scripts/hub.py push checkpoints/NAME/best OWNER/NAME --dry-run FOLDER        only writes what it would upload

The folder holds the model, its tokenizer and the code that lets it think, without the optimizer and random states.
Curves are drawn where matplotlib is installed. Log in first (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import shutil
import sys
import tempfile
from pathlib import Path

import plot
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from runs import Finished, UserError, read_run, shown

from components.checkpoint_manager import OPTIMIZER_STATE
from components.export import DESCRIPTION, read_description
from components.files import MANIFEST

LEFT_OUT = ("training_state.pt", OPTIMIZER_STATE, MANIFEST)  # what only continuing the run needs
PLACES = ("save_path", "data_cache", "name", "project", "logger")  # of one machine or account
LOADING = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{repository}", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained("{repository}", trust_remote_code=True)
    inputs = tokenizer(["a question\\n"], return_tensors="pt", padding=True)
    print(tokenizer.batch_decode(model.generate(**inputs)))
"""


def card(run: Finished, description: dict, repository: str, license: str | None, curves: bool) -> str:
    """The model card. What a config holds is shown as text, whatever characters it has."""
    config = {key: shown(key, value) for key, value in run.config.items() if key not in PLACES}
    model = run.config["model_id"]
    on_hub = model.count("/") == 1 and not Path(model).exists()  # as far as one can see
    base = model if on_hub and not config["from_scratch"] else None
    tags = ["coconut", "latent-reasoning", config["method"]]
    data = ModelCardData(license=license, base_model=base, tags=tags, library_name="transformers")
    data.pipeline_tag = "text-generation"
    accuracy, loss = (run.curves[name] for name in ("accuracy", "validation loss"))
    rows = [f"| {epoch} | {stage} | {accuracy[epoch]:.1%} | {loss[epoch]:.4f} |" for epoch, stage in run.stages.items()]
    epochs = "\n".join(rows)
    resolved = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) + yaml.safe_dump({"versions": run.versions})
    block = "".join(f"    {line}\n" for line in resolved.splitlines())
    return f"""---
{data.to_yaml()}
---

# {html.escape(repository)}

Trained with the method {html.escape(config["method"])} of *Training Large Language Models to Reason in a Continuous
Latent Space* (arXiv 2412.06769), as of epoch {description["epoch"]}, stage {description["stage"]}:
{description["thoughts"]} thoughts or pauses stand between a question and what is written.

## How to load it so that it thinks

{LOADING.format(repository=repository)}
**Without `trust_remote_code=True` it is a plain model that silently does not think.** The code is in
`custom_generate/generate.py`. A question ends with a newline; the answer follows the last `#`.

## Validation

On {html.escape(str(config["val_path"]))}, trained on {html.escape(str(config["train_path"]))}.
{"![accuracy and loss over the epochs](curves.svg)" if curves else ""}

| epoch | stage | accuracy | loss |
|---|---|---|---|
{epochs}

## Config

{block}
## Licence

{html.escape(license or "") or "None was named. The licences of the base model and of the data apply."}
"""


def prepare(checkpoint: Path, folder: Path, repository: str, license: str | None) -> None:
    """Writes what is uploaded into a new folder."""
    description, run = read_description(str(checkpoint)), read_run(checkpoint.resolve().parent)
    if not description:
        raise UserError(
            f"{checkpoint} holds no {DESCRIPTION}; give a checkpoint of a run, such as checkpoints/NAME/best"
        )
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    curves = importlib.util.find_spec("matplotlib") is not None
    if curves:
        plot.save([[run]], folder / "curves.svg")
    ModelCard(card(run, description, repository, license, curves)).save(folder / "README.md")


def push(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder and returns its address."""
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except Exception as error:  # no account, no network, no rights: of many libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"{repository}: nothing or not all was uploaded: {reason}") from error


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["push"])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint's folder in its run's directory")
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--license", help="of the model, as the hub names it: mit, apache-2.0, ...")
    parser.add_argument("--private", action="store_true", help="for a repository that is made now")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write it there and upload nothing")
    arguments = parser.parse_args(words)
    try:
        validate_repo_id(arguments.repository)
        if arguments.dry_run and arguments.dry_run.exists():
            raise UserError(f"--dry-run {arguments.dry_run}: exists already; remove it or name another folder")
        with tempfile.TemporaryDirectory() as place:
            folder = arguments.dry_run or Path(place, "model")
            prepare(arguments.checkpoint, folder, arguments.repository, arguments.license)
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            print(f"{arguments.repository}: {', '.join(files)}")
            print(f"written: {folder}" if arguments.dry_run else push(folder, arguments.repository, arguments.private))
    except (UserError, HFValidationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
