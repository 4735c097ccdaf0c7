"""Compare numbers of OpenMP threads and wait policies for a training step on the CPU, alone and beside busy processes.

    python benchmarks/threads.py                                     a model of the size of args/mini_model
    python benchmarks/threads.py --layers 6 --width 512 --busy 0 2   a larger one, alone and beside two busy processes

A busy process is a loop that does nothing. Each variant trains in a process of its own, since OpenMP reads its settings
once; the variants take turns. Reported are steps per second by the clock, and ratios to one thread within each repeat:
median, min and max of steps per second, and of CPU seconds per step, which other processes affect less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coconut import Coconut  # noqa: E402

ONE = "1 thread"
VARIANTS = {  # name: threads, OMP_WAIT_POLICY (None: not set, so that waiting threads spin for a while)
    ONE: (1, None),
    "2 threads": (2, None),
    "2 threads, passive": (2, "PASSIVE"),
}
QUESTION, THOUGHTS, ANSWER = 38, 3, 4  # tokens, about mini's
START, END, LATENT, EOS, VOCABULARY = 290, 291, 292, 293, 294


def train(args) -> tuple[float, float]:
    """Train a random GPT-2 with Coconut for args.seconds; return its steps per second, and CPU seconds per step."""
    torch.manual_seed(0)
    shape = {"n_layer": args.layers, "n_embd": args.width, "n_head": args.width // 32, "n_positions": 64}
    drops = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    model = Coconut(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **drops)), LATENT, START, END, EOS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    length = QUESTION + 2 + THOUGHTS + ANSWER
    input_ids = torch.randint(0, START, (args.batch, length))
    input_ids[:, QUESTION : length - ANSWER] = torch.tensor([START, *[LATENT] * THOUGHTS, END])
    labels = input_ids.clone()
    labels[:, : length - ANSWER] = -100

    def step() -> None:
        """Forward, backward, update."""
        model(input_ids, torch.ones_like(input_ids), labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # warm-up
    steps, started, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - started) < args.seconds:
        step()
        steps += 1
    return steps / elapsed, (time.process_time() - cpu) / steps


def measure(variant: str, busy: int) -> tuple[float, float]:
    """Run this script with a variant's settings beside busy processes; return what its `train` does."""
    threads, policy = VARIANTS[variant]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "MKL_"))}
    environment |= {"OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": policy} if policy else {})
    with ExitStack() as neighbours:
        for _ in range(busy):
            neighbour = neighbours.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            neighbours.callback(neighbour.kill)
        command = [sys.executable, __file__, *sys.argv[1:], "--child"]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return tuple(map(float, output.split()))


def main() -> None:
    """Measure all variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=4, help="to train per measurement")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="numbers of busy processes (0 1)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(*train(args))
        return
    shape = f"{args.layers} layers of width {args.width}, batch {args.batch}"
    print(f"{shape}, {args.repeats} repeats, {os.cpu_count()} cores")
    print("\n| busy processes | variant | steps/s | ratio to 1 thread | min .. max | CPU s/step, ratio | min .. max |")
    print("|---|---|---|---|---|---|---|")
    for busy in args.busy:
        rounds = []
        for number in range(args.repeats):  # rotate the order
            order = [*VARIANTS][number % len(VARIANTS) :] + [*VARIANTS][: number % len(VARIANTS)]
            rounds.append({variant: measure(variant, busy) for variant in order})
        for variant in VARIANTS:
            speed = statistics.median(measured[variant][0] for measured in rounds)
            cells = [f"{busy} | {variant} | {speed:.2f}"]
            for value in (0, 1):
                ratios = [measured[variant][value] / measured[ONE][value] for measured in rounds]
                cells.append(f"{statistics.median(ratios):.2f} | {min(ratios):.2f} .. {max(ratios):.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
