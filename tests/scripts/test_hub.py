"""scripts/hub.py: dry run, model card, upload."""

import json
import shutil

import hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from runs import read_run

from helpers.checkpoints import load


def test_hub_dry_run_writes_model_and_card(save_path, tmp_path, capsys):
    checkpoint, folder = save_path / "gpt2" / "best", tmp_path / "dry"
    assert hub.main(["push", str(checkpoint), "owner/name", "--license", "mit", "--dry-run", str(folder)]) == 0
    written = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert written >= {"model.safetensors", "coconut.json", "custom_generate/generate.py", "README.md", "curves.svg"}
    assert not written & {"training_state.pt", "optimizer.safetensors", "manifest.json"}
    assert "owner/name" in capsys.readouterr().out
    lm, _, batch = load(checkpoint)
    assert torch.equal(load(folder)[0].generate(**batch), lm.generate(**batch))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "transformers") and "coconut" in card.data.tags
    for line in map(json.loads, (save_path / "gpt2" / "metrics.jsonl").open()):
        if "eval/epoch" in line:
            row = f"| {line['eval/epoch']} | {line['eval/stage']} | {line['eval/acc']:.1%} | {line['eval/loss']:.4f} |"
            assert row in card.text
    assert "    max_latent_stage: 2\n" in card.text
    first = json.loads((save_path / "gpt2" / "predictions_3.jsonl").open().readline())
    assert repr(first["question"] + "\n") in card.text and repr(first["expected"]) in card.text
    assert "4 continuous thoughts between" in card.text and "Not tested" in card.text
    assert 'from_pretrained("owner/name", trust_remote_code=True)' in card.text
    assert str(save_path) not in card.text  # no local paths
    assert hub.main(["push", str(checkpoint), "owner/name", "--dry-run", str(folder)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_hub_dry_run_names_a_folder_that_cannot_be_made(save_path, tmp_path, capsys):
    (tmp_path / "file").touch()
    command = ["push", str(save_path / "gpt2" / "best"), "owner/name", "--dry-run", str(tmp_path / "file" / "dry")]
    assert hub.main(command) == 2
    assert f"{tmp_path}/file" in capsys.readouterr().err


def test_model_card_has_test_accuracy_of_its_checkpoint(save_path, tmp_path):
    shutil.copytree(save_path / "gpt2", tmp_path / "gpt2", symlinks=True)
    run = read_run(tmp_path / "gpt2")
    metrics = {"val_path": "data/far.json", "problems": 100, "eval/acc": 0.5, "stage": 2}
    for epoch, accuracy in ((3, 0.5), (1, 0.9)):
        folder = tmp_path / "gpt2" / f"eval_checkpoint_{epoch}"
        folder.mkdir()
        (folder / "metrics_far.yaml").write_text(yaml.safe_dump(metrics | {"eval/acc": accuracy}))
    text = hub.card(run, {"epoch": 3, "stage": 2, "thoughts": 4}, "owner/name", None, curves=False)
    assert "Test accuracy on far: 50.0 (40.4 to 59.6) %" in text and "90.0" not in text


def test_model_card_escapes_config_values(save_path, tmp_path):
    shutil.copytree(save_path / "gpt2", tmp_path / "run", symlinks=True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config |= {"val_path": "<img src=x onerror=alert(1)>", "new_token_init": "x\n```\n# <script>alert(1)</script>"}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["owner/name", "--license", "<b>mine</b>", "--dry-run", str(tmp_path / "dry")]
    assert hub.main(["push", str(tmp_path / "run" / "best"), *argv]) == 0
    text = ModelCard.load(tmp_path / "dry" / "README.md").text
    shown = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not any(tag in line for line in shown for tag in ("<img", "<script", "<b>", "```"))
    assert "    new_token_init: " in text


@pytest.mark.parametrize("from_scratch, base", [(False, "openai-community/gpt2"), (True, None)])
def test_model_card_base_model(save_path, from_scratch, base):
    run = read_run(save_path / "gpt2")
    run.config.update({"model_id": "openai-community/gpt2", "from_scratch": from_scratch})
    text = hub.card(run, {"epoch": 3, "stage": 2, "thoughts": 4}, "owner/name", None, curves=False)
    assert ModelCard(text).data.base_model == base


def test_hub_push_uploads_folder_and_reports_errors(save_path, monkeypatch, capsys):
    sent = []

    class Api:
        def create_repo(self, repository, private, exist_ok):
            sent.append((repository, private, exist_ok))

        def upload_folder(self, folder_path, repo_id):
            sent.append({path.name for path in folder_path.iterdir()})
            return "https://example.org/owner/name"

    argv = ["push", str(save_path / "gpt2" / "best"), "owner/name", "--private"]
    monkeypatch.setattr(hub, "HfApi", Api)
    assert hub.main(argv) == 0
    assert sent[0] == ("owner/name", True, True) and {"model.safetensors", "README.md"} <= sent[1]
    assert "https://example.org/owner/name" in capsys.readouterr().out

    def fail(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(Api, "create_repo", fail)
    assert hub.main(argv) == 2
    assert "owner/name: upload failed or incomplete: no network" in capsys.readouterr().err
    for other, message in (
        ([str(save_path / "gpt2_model"), "owner/name"], "metrics.jsonl: cannot be read"),
        ([argv[1], "a/b/c"], "a/b/c"),
    ):
        assert hub.main(["push", *other]) == 2
        assert message in capsys.readouterr().err
