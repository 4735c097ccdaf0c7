"""The command for a GPU: its budget, what it resumes, and the whole of it on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402


def run_parts(folder: Path, monkeypatch, cases: dict, seconds: float = 2.0) -> dict:
    """Run cases of two parts of equal shares; returns the results on disk."""
    monkeypatch.setattr(gpu, "SHARES", {"first": 0.5, "second": 0.5})
    monkeypatch.setattr(gpu, "cases", lambda args: cases)
    args = Namespace(out=folder, minutes=seconds / 60, device="cpu")
    gpu.run_parts(args, time.monotonic() + seconds)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_part_that_is_too_slow_is_cut_off_and_its_results_so_far_stay(tmp_path, monkeypatch):
    def swallow() -> dict:
        try:
            time.sleep(60)
        except Exception:  # as a compiler might
            return {}

    first = {"quick": lambda: {"ms": 1}, "slow": swallow, "late": lambda: {"ms": 2}}
    found = run_parts(tmp_path, monkeypatch, {"first": first, "second": {"other": lambda: {"ms": 3}}})
    assert found == {"first": {"quick": {"ms": 1}}, "second": {"other": {"ms": 3}}}


def test_result_is_on_disk_before_the_next_case_starts(tmp_path, monkeypatch):
    def look() -> dict:
        return {"seen": (tmp_path / "first.json").exists()}

    cases = {"first": {"one": lambda: {"ms": 1}, "two": look}, "second": {}}
    assert run_parts(tmp_path, monkeypatch, cases)["first"]["two"] == {"seen": True}


def test_later_call_runs_what_is_missing_or_failed(tmp_path, monkeypatch):
    calls = []

    def work(name: str, error: Exception | None = None) -> dict:
        calls.append(name)
        if error:
            raise error
        return {"ms": 1}

    failing = {"good": lambda: work("good"), "bad": lambda: work("bad", RuntimeError("CUDA out of memory\nmore"))}
    found = run_parts(tmp_path, monkeypatch, {"first": failing, "second": {"other": lambda: work("other")}})
    assert found["first"]["bad"] == {"error": "RuntimeError: CUDA out of memory"} and found["second"]
    mended = {"good": lambda: work("good"), "bad": lambda: work("bad")}
    found = run_parts(tmp_path, monkeypatch, {"first": mended, "second": {"other": lambda: work("other")}})
    assert found["first"] == {"good": {"ms": 1}, "bad": {"ms": 1}}
    assert calls == ["good", "bad", "other", "bad"]


@pytest.mark.parametrize(("method", "thoughts"), [("cot", 0), ("coconut", 6), ("pause_as_thought", 0)])
def test_hours_follow_the_schedule(method, thoughts):
    seconds = {0: 0.1, 3: 0.4, 6: 0.7}
    steps = {f"ProsQA, {n} thoughts, batch 128, bf16": {"ours": {"seconds": s}} for n, s in seconds.items()}
    answers = {"ProsQA, 6 thoughts, batch 64, bf16": {"batched_per_second": 300}}
    results = {"step": steps, "generation": answers, "device": {"speeds": {"AdamW, ms": 100}}}
    # 140 steps per epoch; thoughts 0 to 5 for five epochs each, then 6 for twenty
    per_step = 50 * 0.2 + (5 * (0 + 1 + 2 + 3 + 4 + 5) + 20 * 6) * 0.1 * (thoughts > 0)
    assert gpu.hours(results, "ProsQA", method) == pytest.approx((140 * per_step + 50 * 1) / 3600)
    del steps["ProsQA, 3 thoughts, batch 128, bf16"]
    assert gpu.hours(results, "ProsQA", method) is None


@pytest.mark.slow
def test_command_runs_on_a_cpu_without_datasets_and_wandb(tmp_path):
    program = "import sys; sys.modules['datasets'] = sys.modules['wandb'] = None; import gpu; gpu.main()"
    command = [sys.executable, "-c", program, "--device", "cpu", "--minutes", "20", "--out", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "benchmarks")
    assert outcome.returncode == 0, outcome.stderr
    report = (tmp_path / "report.md").read_text()
    assert "## Failed" not in report and "`datasets` is not installed" in report
    for part in set(gpu.SHARES) - {"compiled"}:  # which may be cut off
        assert json.loads((tmp_path / f"{part}.json").read_text())
    assert "| ProsQA | coconut |" in report and "| GSM8k | pause_as_thought |" in report


RUN = """
import pathlib, signal, sys, time
[folder] = [word.removeprefix("save_path=") for word in sys.argv if word.startswith("save_path=")]
log = pathlib.Path(folder, "prosqa-scratch-coconut", "metrics.jsonl")
log.parent.mkdir(exist_ok=True)
before = log.read_text() if log.exists() else ""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
log.write_text(before + '{"train/step": %d}\\n' % (before.count("step") + 1))
time.sleep(60)
"""


def test_training_run_is_stopped_in_time_and_started_again(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "STOPPING", 0)
    args = Namespace(out=tmp_path, device="cpu")
    for number in (1, 2):
        found = gpu.train(args, time.monotonic() + 3)
        assert "exit code 143" in found and f'"train/step": {{"train/step": {number}}}' in found


def test_training_run_is_not_started_when_no_time_is_left(tmp_path):
    assert "not started" in gpu.train(Namespace(out=tmp_path, device="cpu"), time.monotonic() + gpu.STOPPING)
