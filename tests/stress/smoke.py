"""Retrain seed 0 of the smallest reference, results/smoke, and compare the curves.

    python tests/stress/smoke.py                         exit code 0 match, 1 differs, 2 and above: a run failed
    python tests/stress/smoke.py reset_optimizer=False   key=value overrides for all runs; this one must fail

Machines and versions differ in the order of additions, so scripts/compare.py decides: within the spread of the
reference's seeds? All runs share a process, because starting one takes longer than training.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "preprocessing")]
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import compare  # noqa: E402
import ring  # noqa: E402
import torch  # noqa: E402

import run  # noqa: E402


def main(overrides: list[str]) -> int:
    """Generate the problems, train each method, and compare."""
    torch.set_num_threads(1)
    os.chdir(ROOT)  # paths in configs are relative to the root
    ring.main(["--small"])
    with tempfile.TemporaryDirectory() as folder:
        for method in ("cot", "no_cot", "coconut"):
            paths = [f"save_path={folder}", f"data_cache={folder}/cache"]
            if code := run.main([f"args/smoke_{method}.yaml", *paths, *overrides]):
                return code
        return compare.main([*map(str, sorted(Path(folder).glob("smoke-*"))), "results/smoke"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
