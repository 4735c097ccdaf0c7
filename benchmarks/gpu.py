"""Take every measurement that needs a GPU, the most valuable first, within a number of minutes.

    python benchmarks/gpu.py --minutes 9 --out FOLDER
    python benchmarks/gpu.py --minutes 2 --out FOLDER --device cpu      the same with tiny sizes, to test the command

Each part has a share of the minutes, after which it is cut off. Each result is in FOLDER/PART.json as soon as it
exists; the same command goes on with those that are missing, and then with a training run. It ends with a report in
Markdown, FOLDER/report.md, beside what was predicted. `datasets` is needed for the training run only.

  device      driver and versions; what waits for the GPU in a step; the speed of a matrix product and of AdamW
  agreement   losses, gradients and greedy tokens of small models, against float32 on the CPU
  step        forward and backward pass of GPT-2 small: see train_step.py for the variants
  generation  problems per second: see generate.py
  memory      the peak of a whole step, simulated by memory.py and measured
  compiled    the step with compiled passes
  training    ProsQA with a small model from scratch, resumed by later calls
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

STARTED = time.monotonic()

import generate  # noqa: E402
import memory  # noqa: E402
import torch  # noqa: E402
import train_step  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from train_step import END, EOS, LATENT, ROOT, START, VOCABULARY, environment, make_batch, run_step, wrap  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from coconut import Coconut, plan_batch  # noqa: E402
from config import Config, read_yaml  # noqa: E402
from curriculum import METHODS, num_placeholders, stage_of  # noqa: E402

SHARES = {"device": 0.06, "agreement": 0.08, "step": 0.38, "generation": 0.1, "memory": 0.1, "compiled": 0.18}
LENGTHS = {"ProsQA": (360, 48), "GSM8k": (64, 32)}  # tokens of question and answer
TABLE = {  # rows of Table 1: prefix of the config, whose lengths, training and validation problems
    "GSM8k": ("gsm", "GSM8k", 385620, 500),
    "ProntoQA, at ProsQA's length": ("prontoqa", "ProsQA", 9000, 200),
    "ProsQA": ("prosqa", "ProsQA", 17886, 300),
}
STOPPING = 30  # seconds that the training run gets to save and exit

PREDICTED = {  # simulated for an H100 before anything was measured: ms of a pass, and GiB by memory.py
    "ProsQA, 0 thoughts, batch 32, bf16": "38",
    "ProsQA, 6 thoughts, batch 32, bf16": "57",
    "ProsQA, 0 thoughts, batch 32, bf16 + tf32": "32",
    "ProsQA, 6 thoughts, batch 32, bf16 + tf32": "57",
    "GSM8k, 0 thoughts, batch 32, bf16": "21",
    "GSM8k, 6 thoughts, batch 32, bf16": "45 to 62",
    "6 thoughts, measured": "7.28",
    "0 thoughts, measured": "7.28",
}


class CutOff(BaseException):
    """The time of a part is over; no `except Exception` of a library may stop it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise CutOff in the block after a number of seconds."""

    def end(*_) -> None:
        raise CutOff

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def sizes(args, **options) -> argparse.Namespace:
    """Return the arguments of train_step.py and generate.py, by name; tiny on a CPU."""
    if args.device == "cpu":
        options |= {"layers": 2, "width": 64, "batch": min(options.get("batch", 4), 4), "repeats": 1}
        options |= {key: min(options[key], most) for key, most in (("question", 24), ("answer", 8)) if key in options}
    bf16 = ["--bf16"] if options.pop("bf16", False) else []
    words = [word for key, value in options.items() for word in (f"--{key}", *str(value).split())]
    return train_step.parse(["--device", args.device, *bf16, *words])


@cache
def gpt2(device: str, layers: int, width: int) -> nn.Module:
    """Return a random GPT-2 on a device, the same for all parts."""
    return train_step.make_model(argparse.Namespace(model="gpt2", layers=layers, width=width)).to(device).train()


def pinned(batch: dict, device: str) -> dict:
    """Return a batch in pinned memory if it is for a GPU."""
    return {key: value.pin_memory() for key, value in batch.items()} if device == "cuda" else batch


# --- the parts: a function per kind of case, which returns its result -------------------------------------------------


def facts(args) -> dict:
    """Return the driver, the GPU's memory and power limit, and the versions of CUDA and Python."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    query = query if args.device == "cuda" else ["echo", "none"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {"driver, memory, power": driver, "cuda": torch.version.cuda, "python": sys.version.split()[0]}


def waits(args) -> dict:
    """Return the places that wait for the GPU in a training step, by torch's own account: none is expected."""
    given = sizes(args, batch=8, question=128, answer=32)
    model, debug = wrap(gpt2(args.device, given.layers, given.width)), lambda mode: None
    batch = make_batch(given.batch, given.question, 3, given.answer)
    plan = plan_batch(batch["input_ids"], batch["attention_mask"], batch["labels"], LATENT)
    if args.device == "cuda":
        batch, plan, debug = pinned(batch, "cuda"), plan.pin_memory(), torch.cuda.set_sync_debug_mode
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in ("default", "warn"):  # once to warm up
            caught.clear()
            debug(mode)
            with torch.autocast(args.device, dtype=torch.bfloat16):
                loss = model(**batch, plan=plan).loss
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            model.zero_grad()
        debug("default")
    found = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"waits": ", ".join(found) or "none"}


def speeds(args) -> dict:
    """Measure a bf16 matrix product, which a share of the peak refers to, and the fused optimizer on GPT-2 small."""
    size = 8192 if args.device == "cuda" else 256
    a, b = (torch.randn(size, size, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    copy = train_step.make_model(sizes(args)).to(args.device)
    for parameter in copy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(copy.parameters(), fused=True)
    product, adamw = (
        statistics.median([train_step.seconds_of(function, args.device) for _ in range(12)][3:])
        for function in (lambda: a @ b, optimizer.step)
    )
    return {"product, TFLOP/s": 2 * size**3 / max(product, 1e-9) / 1e12, "AdamW, ms": 1000 * adamw}


def small(kind: str) -> nn.Module:
    """Return a random model of two layers, without dropout."""
    torch.manual_seed(0)
    if kind == "gpt2":
        options = {"n_embd": 128, "n_layer": 2, "n_head": 4, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **options))
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **shape))


def agreement(args, kind: str, bf16: bool) -> dict:
    """Compare loss, gradients and greedy tokens with those of the CPU in float32; the CPU's own in bf16 beside them."""
    batch = make_batch(8, 40, 6, 16)

    def outcome(device: str, bf16: bool) -> tuple:
        """Return the loss, the flat gradient (parameters,) and the generated tokens (8, columns), on the CPU."""
        model = Coconut(small(kind), LATENT, START, END, EOS).to(device).train()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
            loss = model(**batch).loss
            loss.backward()
            tokens = model.eval().generate(batch["input_ids"][:, :48], batch["attention_mask"][:, :48])
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).cpu()
        return loss.item(), gradient, tokens.cpu()

    loss, gradient, tokens = outcome("cpu", False)
    row = {}
    for device in dict.fromkeys([args.device, "cpu"]):
        its_loss, its_gradient, its_tokens = outcome(device, bf16)
        width = min(tokens.shape[1], its_tokens.shape[1])
        row[device] = {
            "loss": abs(its_loss - loss) / loss,
            "gradient": ((its_gradient - gradient).norm() / gradient.norm()).item(),
            "tokens": (its_tokens[:, 48:width] == tokens[:, 48:width]).float().mean().item(),
        }
    return row


def step(args, data: str, thoughts: int, batch: int, precision: str, variants: str = "ours unfused") -> dict:
    """Compare a forward and backward pass with its floor; precision: float32, bf16, or bf16 + tf32."""
    question, answer = LENGTHS[data]
    options = {"batch": batch, "question": question, "answer": answer, "thoughts": thoughts, "variants": variants}
    given = sizes(args, bf16="bf16" in precision, **options)
    lm = gpt2(args.device, given.layers, given.width)
    made = pinned(make_batch(given.batch, given.question, given.thoughts, given.answer), args.device)
    torch.set_float32_matmul_precision("high" if "tf32" in precision else "highest")
    try:
        rows = train_step.compare(lm, made, given)
        with FlopCounterMode(display=False) as counter:
            run_step(train_step.floor, lm, made, given)
    finally:
        torch.set_float32_matmul_precision("highest")
        lm.zero_grad(set_to_none=True)
    return {row.pop("variant"): {**row, "flops": counter.get_total_flops()} for row in rows}


def generation(args, data: str, thoughts: int, bf16: bool) -> dict:
    """Compare problems per second with those of the naive loop."""
    question, answer = LENGTHS[data]
    given = sizes(args, bf16=bf16, batch=64, question=question, answer=answer, repeats=2)
    lm = gpt2(args.device, given.layers, given.width).eval()
    try:
        return generate.compare(lm, make_batch(given.batch, given.question, thoughts, 0), given)
    finally:
        lm.train()


def peak(args, thoughts: int, way: str) -> dict:
    """Simulate the peak of a whole step of GPT-2 small at ProsQA's length, or measure it (on a GPU only)."""
    batch, length, answer = ("32", "416", "48") if args.device == "cuda" else ("2", "32", "8")
    given = memory.parse(["--batch", batch, "--length", length, "--answer", answer, "--bf16"])
    config = memory.model_config(given)
    if args.device == "cpu":
        config.n_layer, config.n_embd = 2, 192
    found = memory.measure if way == "measured" else lambda *given: memory.simulate(*given).total
    return {"gib": found(config, given, thoughts) / memory.GIB}


def cases(args) -> dict[str, dict[str, Callable[[], dict]]]:
    """List what is measured: for each part its cases by name, the most valuable first."""
    steps, compiled = {}, {}
    shapes = [("bf16", 32), ("bf16", 128), ("bf16 + tf32", 32), ("float32", 32), ("bf16 + tf32", 128)]
    for precision, batch in shapes if args.device == "cuda" else shapes[1:4]:
        for thoughts in (6, 0, 3):
            for data in LENGTHS:
                name = f"{data}, {thoughts} thoughts, batch {batch}, {precision}"
                steps[name] = partial(step, args, data, thoughts, batch, precision)
    for data in LENGTHS:
        compiled[f"{data}, 6 thoughts, batch 32, bf16"] = partial(step, args, data, 6, 32, "bf16", "ours compiled")
    ways, name = ["simulated"] + ["measured"] * (args.device == "cuda"), {False: "float32", True: "bf16"}
    return {
        "device": {f.__name__: partial(f, args) for f in (facts, waits, speeds)},
        "agreement": {f"{k}, {name[b]}": partial(agreement, args, k, b) for b in name for k in ("gpt2", "llama")},
        "step": steps,
        "generation": {
            f"{data}, 6 thoughts, batch 64, {name[bf16]}": partial(generation, args, data, 6, bf16)
            for bf16 in (True, False)
            for data in LENGTHS
        },
        "memory": {f"{n} thoughts, {way}": partial(peak, args, n, way) for n in (6, 0) for way in ways},
        "compiled": compiled,
    }


# --- running them within the time, and reporting ----------------------------------------------------------------------


def read(path: Path) -> dict:
    """Return the results in a JSON file, {} if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def run_parts(args, deadline: float) -> None:
    """Run the cases that have no result yet, each part within its share of the minutes; save every result at once."""
    for part, share in SHARES.items():
        path, ends = args.out / f"{part}.json", min(time.monotonic() + share * 60 * args.minutes, deadline)
        results = read(path)
        for name, case in cases(args)[part].items():
            if "error" not in results.get(name, {"error": ""}):
                continue
            try:
                with time_limit(ends - time.monotonic()):
                    results[name] = case()
            except CutOff:
                print(f"{part}: cut off in {name}", flush=True)
                break
            except Exception as error:  # out of memory, say: the other cases go on
                results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
                if args.device == "cuda":
                    torch.cuda.empty_cache()
            print(f"{time.monotonic() - STARTED:.0f} s, {part}, {name}: {json.dumps(results[name])}", flush=True)
            partial_file = path.with_suffix(".partial")
            partial_file.write_text(json.dumps(results, indent=1) + "\n")
            partial_file.replace(path)


def train(args, deadline: float) -> str:
    """Start or resume a training run for the time that is left; returns where it is."""
    if importlib.util.find_spec("datasets") is None:
        return "not run: `datasets` is not installed"
    words = [sys.executable, "run.py", "args/prosqa_scratch_coconut.yaml", f"save_path={args.out.resolve()}"]
    code, on_cpu = "unknown, as it was not started", args.device == "cpu"
    words += ["train_path=data/prosqa_valid.json", "batch_size_training=4", "num_epochs=1"] if on_cpu else []
    environ = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {})
    if (left := deadline - time.monotonic() - STOPPING) > 0:
        with subprocess.Popen(words, cwd=ROOT, env=environ) as process:
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()  # it finishes its step and saves
                code = process.wait()
    path = args.out / "prosqa-scratch-coconut/metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    last = {key: line for line in lines for key in ("train/step", "eval/epoch") if key in line}
    return f"exit code {code}; last step and validation: {json.dumps(last)}"


def hours(results: dict, data: str, method: str) -> float | None:
    """Estimate the hours of a row of Table 1 on one such GPU: steps of 128 problems in bf16, and the validations.

    Step times are interpolated in the number of thoughts; None while one of the measurements is missing.
    """
    (prefix, like, train_size, valid_size), config = TABLE[data], Config()
    config.update(read_yaml(ROOT / f"args/{prefix}_{method}.yaml"))
    measured = {n: results["step"].get(f"{like}, {n} thoughts, batch 128, bf16", {}).get("ours") for n in (0, 3, 6)}
    answers = results["generation"].get(f"{like}, 6 thoughts, batch 64, bf16", {}).get("batched_per_second")
    optimizer = results["device"].get("speeds", {}).get("AdamW, ms")
    if not (all(measured.values()) and answers and optimizer):
        return None
    seconds = 0
    for epoch in range(config.resume, config.num_epochs):
        thoughts = num_placeholders(stage_of(epoch, config), 6, config, training=True)
        if METHODS[method].placeholder != "latent":
            thoughts = 0  # other placeholders are part of the first pass
        low = 3 if thoughts >= 3 else 0
        slope = (measured[low + 3]["seconds"] - measured[low]["seconds"]) / 3
        step_seconds = measured[low]["seconds"] + slope * (thoughts - low) + optimizer / 1000
        seconds += math.ceil(train_size / 128) * step_seconds + valid_size / answers
    return seconds / 3600


def section(title: str, head: str, rows: list[list]) -> str:
    """Format a section with a Markdown table; head: its columns, separated by |."""
    lines = [f"| {head} |", "|---" * len(head.split("|")) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return f"\n## {title}\n\n" + "\n".join(lines) + "\n"


def report(results: dict, env: dict, training: str) -> str:
    """Format all results beside the predictions, as Markdown."""
    failed = [[part, case, x["error"]] for part, cases in results.items() for case, x in cases.items() if "error" in x]
    results = {part: {c: x for c, x in cases.items() if "error" not in x} for part, cases in results.items()}
    text = "# Measurements\n\n" + ", ".join(f"{key} {value}" for key, value in env.items()) + "\n"
    rows = [[key, value] for row in results["device"].values() for key, value in row.items()]
    text += section("Device", "fact | value", rows)
    compared = [(case, *x) for case, y in results["agreement"].items() for x in y.items()]
    rows = [[case, on, *(f"{error:.2g}" for error in x.values())] for case, on, x in compared]
    text += section("Compared with float32 on the CPU", "case | on | error of the loss | gradient | same tokens", rows)
    fastest, rows = results["device"].get("speeds", {}).get("product, TFLOP/s", math.inf), []
    steps = [(case, *x) for part in ("step", "compiled") for case, y in results[part].items() for x in y.items()]
    for case, name, x in steps:
        cells = [f"{1000 * x['seconds']:.1f}", PREDICTED.get(case, "") if name == "ours" else ""]
        cells += [f"{x['tokens_per_second']:.0f}", f"{x['flops'] / x['seconds'] / 1e12 / fastest:.0%}"]
        cells += [f"{x['ratio']:.2f} ({x['least']:.2f} .. {x['most']:.2f})", f"{x['memory_mib'] / 1024:.2f}"]
        rows.append([case, name, *cells])
    head = "case | variant | ms | predicted ms | tokens/s | share of the product's speed | ratio to floor | GiB"
    text += section("Forward and backward pass of GPT-2 small", head, rows)
    text += "\nThe official code, which is not run here, would take 4,700 ms for ProsQA in bf16, simulated.\n"
    rows = [[case, *(f"{value:.4g}" for value in x.values())] for case, x in results["generation"].items()]
    text += section("Generation", "case | problems/s | naive loop | ratio | least | most", rows)
    rows = [[case, f"{x['gib']:.2f}", PREDICTED.get(case, "")] for case, x in results["memory"].items()]
    text += section("Peak memory of a whole step", "case | GiB | predicted", rows)
    found = [(data, method, hours(results, data, method)) for data in TABLE for method in METHODS]
    rows = [[data, method, f"{h:.1f}"] for data, method, h in found if h]
    text += section("Table 1 on one such GPU, estimated from these", "data set | method | hours", rows)
    text += f"\n## Training\n\n{training}\n"
    return text + (section("Failed", "part | case | error", failed) if failed else "")


def main() -> None:
    """Measure what is missing, train, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="for everything, the start of Python included")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; resumed if it has some")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    deadline = STARTED + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    env = environment(args.device)
    if (before := read(args.out / "environment.json")) not in ({}, env):
        parser.error(f"{args.out} has the results of {before}, this is {env}; choose another folder")
    (args.out / "environment.json").write_text(json.dumps(env) + "\n")
    run_parts(args, deadline - STOPPING)
    training = train(args, deadline)
    text = report({part: read(args.out / f"{part}.json") for part in SHARES}, env, training)
    (args.out / "report.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
