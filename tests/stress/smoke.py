"""Trains the smallest reference again, results/smoke's seed 0, and says whether the curves are still like those there.

    python tests/stress/smoke.py                         exit code 0 alike, 1 not, 2 and above: a run failed
    python tests/stress/smoke.py reset_optimizer=False   key=value words go to all runs: this one has to fail

Other machines and versions add in another order, so what is asked is scripts/compare.py's question: within the spread
of the reference's seeds? All in one process, since a start takes longer than a training.
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


def main(words: list[str]) -> int:
    """Makes the problems, trains each method and compares all."""
    torch.set_num_threads(1)
    os.chdir(ROOT)  # where the configs' paths begin
    ring.main(["--small"])
    with tempfile.TemporaryDirectory() as folder:
        for method in ("cot", "no_cot", "coconut"):
            places = [f"save_path={folder}", f"data_cache={folder}/cache"]
            if code := run.main([f"args/smoke_{method}.yaml", *places, *words]):
                return code
        return compare.main([*map(str, sorted(Path(folder).glob("smoke-*"))), "results/smoke"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
