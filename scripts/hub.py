"""Upload a checkpoint to the Hugging Face hub, with a model card generated from its run.

    python scripts/hub.py push checkpoints/NAME/best OWNER/NAME --license mit
    python scripts/hub.py push checkpoints/NAME/best OWNER/NAME --dry-run FOLDER        write the files, upload nothing

Uploads the model, its tokenizer and its generation code, without optimizer and random state. The card has training
curves if matplotlib is installed. Log in first (`hf auth login`, or HF_TOKEN).
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path

import plot
import yaml
from evaluations import percent
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from record import tests_of
from runs import FinishedRun, UserError, display_value, read_file, read_run

from components.checkpoint import TRAINING_STATE
from components.checkpoint_manager import OPTIMIZER_STATE
from components.errors import reason
from components.export import require_description
from components.files import MANIFEST
from components.run_directory import locate
from curriculum import METHODS

NOT_UPLOADED = (TRAINING_STATE, OPTIMIZER_STATE, MANIFEST)  # needed only to resume the run
LOCAL_KEYS = ("save_path", "data_cache", "name", "project", "logger")  # specific to a machine or account
USAGE = """\
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("{repository}", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained("{repository}", trust_remote_code=True)
    inputs = tokenizer([{question}], return_tensors="pt", padding=True)
    print(tokenizer.batch_decode(model.generate(**inputs)))  # expected after the last "#": {answer}
"""


def card(run: FinishedRun, description: dict, repository: str, license: str | None, curves: bool) -> str:
    """Render the model card; config values and problems are escaped, whatever characters they contain."""
    config = {key: display_value(key, value) for key, value in run.config.items() if key not in LOCAL_KEYS}
    model = run.config["model_id"]
    on_hub = model.count("/") == 1 and not Path(model).exists()  # a guess: hub names have one slash
    base = model if on_hub and not config["from_scratch"] else None
    tags = ["coconut", "latent-reasoning", config["method"]]
    data = ModelCardData(license=license, base_model=base, tags=tags, library_name="transformers")
    data.pipeline_tag = "text-generation"
    accuracy, loss = (run.curves[name] for name in ("accuracy", "validation loss"))
    epoch, thoughts = description["epoch"], placeholders(config["method"], description["thoughts"])
    question, answer = example(run)
    measured = tests_of(run, epoch) if epoch in run.stages else {}  # not if it was saved within an epoch
    tests = "".join(
        f"Test accuracy on {html.escape(name)}: {percent(metrics)} % (95 % confidence interval).\n"
        for name, metrics in measured.items()
    )
    rows = [f"| {epoch} | {stage} | {accuracy[epoch]:.1%} | {loss[epoch]:.4f} |" for epoch, stage in run.stages.items()]
    epochs = "\n".join(rows)
    resolved = yaml.safe_dump(config, sort_keys=False, allow_unicode=True) + yaml.safe_dump({"versions": run.versions})
    block = "".join(f"    {line}\n" for line in resolved.splitlines())
    return f"""---
{data.to_yaml()}
---

# {html.escape(repository)}

Trained with the method {html.escape(config["method"])} of *Training Large Language Models to Reason in a Continuous
Latent Space* (arXiv 2412.06769), saved after epoch {epoch}, in stage {description["stage"]}, with
{thoughts} between question and output.

## Usage

{USAGE.format(repository=repository, question=repr(question + chr(10)), answer=repr(answer))}
**Without `trust_remote_code=True`, the model silently generates without thoughts.** The code is in
`custom_generate/generate.py`. A question ends with a newline; the answer follows the last `#`.

## Accuracy

{tests or "Not tested; the table shows validation accuracy."}

Validation on {html.escape(str(config["val_path"]))}, trained on {html.escape(str(config["train_path"]))}.
{"![accuracy and loss over the epochs](curves.svg)" if curves else ""}

| epoch | stage | accuracy | loss |
|---|---|---|---|
{epochs}

## Config

{block}
## Licence

{html.escape(license or "") or "Not specified; the licences of the base model and of the data apply."}
"""


def placeholders(method: str, count: int) -> str:
    """Name the thoughts or pause tokens of a prompt: "4 continuous thoughts"."""
    kind = {"latent": "continuous thought", "pause": "pause token", None: "thought"}[METHODS[method].placeholder]
    return f"{count or 'no'} {kind}{'' if count == 1 else 's'}"


def example(run: FinishedRun) -> tuple[str, str]:
    """Return the first validation problem of a run, question and answer, from its predictions."""
    line, _, _ = read_file(run.directory / f"predictions_{max(run.stages)}.jsonl").partition("\n")
    problem = json.loads(line)
    return problem["question"], problem["expected"]


def prepare(checkpoint: Path, folder: Path, repository: str, license: str | None) -> None:
    """Write the files to upload into a new folder."""
    checkpoint = locate(checkpoint)
    run = read_run(checkpoint.resolve().parent)
    description = require_description(checkpoint, "epoch", "stage", "thoughts")
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*NOT_UPLOADED))
    curves = importlib.util.find_spec("matplotlib") is not None
    if curves:
        plot.save([[run]], folder / "curves.svg")
    ModelCard(card(run, description, repository, license, curves)).save(folder / "README.md")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload a folder; return its URL."""
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except Exception as error:  # account, network, permissions: raised by several libraries
        raise UserError(f"{repository}: upload failed or incomplete: {reason(error)}") from error


def main(argv: list[str] | None = None) -> int:
    """Prepare the model folder and upload it (or only write it, with --dry-run)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["push"])
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder inside its run directory")
    parser.add_argument("repository", metavar="OWNER/NAME")
    parser.add_argument("--license", help="licence identifier of the hub: mit, apache-2.0, ...")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write the files there, upload nothing")
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repository)
        if args.dry_run and args.dry_run.exists():
            raise UserError(f"--dry-run {args.dry_run}: already exists; remove it or choose another folder")
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.dry_run or Path(temporary, "model")
            prepare(args.checkpoint, folder, args.repository, args.license)
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            print(f"{args.repository}: {', '.join(files)}")
            print(f"wrote {folder}" if args.dry_run else push(folder, args.repository, args.private))
    except (UserError, HFValidationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
