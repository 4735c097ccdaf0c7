"""Run every command of README and docs in a fresh clone with a new virtual environment.

    python tests/stress/commands.py                 minutes: the quickstart trains three models
    python tests/stress/commands.py --check         run nothing; check each command's files, options and config

Prints a line per command: ran, or checked and why it was not run. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from torch.distributed.run import get_args_parser  # noqa: E402

from config import Config, parse_overrides, read_yaml  # noqa: E402

PAGES = [*sorted(ROOT.glob("*.md"), key=lambda page: page.name != "README.md"), *sorted(ROOT.glob("*/*.md"))]
STARTS = ("bash", "conda", "head", "pip", "printf", "python", "source", "srun", "time", "torchrun")
ONLY_CHECKED = {  # pattern: why matching commands are not run
    r"\b(?!README)[A-Z_]{3,}\b|\bDIR\b|_node N\b": "has a placeholder",
    r"\b(gsm_icot|prontoqa)\.": "needs network access",
    r"run_experiment": "part of ProntoQA's generator",
    r"^conda": "alternative environment",
    r"^(torchrun|srun)|table1.py (prosqa|gsm)|checkpoints/prosqa": "needs GPUs, or days",
    r"benchmarks/\w+\.py": "long benchmark",
    r"_[78]hops|(?<!models/)\bmini[._-]|table1.py (ring|mini)|ring-c|smoke": "takes minutes, or needs a longer run",
    r"published/": "needs the published files",
    r"tests/stress/(soak|fuzz|mutate|commands)\.py|matrix\.bash|\.ci/run|-m slow": "minutes to hours",
}
TINY = {"bash tests/run.bash": "bash tests/run.bash tests/test_config.py"}  # arguments go to pytest
EXTERNAL = {"CONFIG.yaml", "run_experiment.py"}  # files of the user, and of ProntoQA


def commands(page: Path) -> Iterator[str]:
    """Yield the commands in a page's indented and fenced blocks, with continuation lines, and fenced Python."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        if language == "python":
            yield f"python - <<'end'\n{block}end"
    shell = "".join(block for language, block in blocks if language in ("bash", "sh"))
    shell += "".join(re.findall(r"^    (.*\n)", text, re.MULTILINE))
    for line in re.findall(rf"^(?:\$ )?((?:{'|'.join(STARTS)}) (?:.*\\\n)*.*)$", shell, re.MULTILINE):
        yield line if "\\\n" in line else re.split(r"   +(?=[a-z#])", line)[0]  # without the explanation


def reason(command: str) -> str | None:
    """Return why a command is only checked, or None."""
    return next((why for pattern, why in ONLY_CHECKED.items() if re.search(pattern, command)), None)


def check(command: str) -> None:
    """Raise ValueError if a command names a file, option or config key that does not exist."""
    for word in re.findall(r"(?<![\w./-])(?:[\w.]+/)*[\w.]+\.(?:py|bash|yaml)\b", command):
        if word not in EXTERNAL and not (ROOT / word).exists():
            raise ValueError(f"{word} does not exist")
    words = shlex.split(command.split("<<")[0].replace("\\\n", ""), comments=True)
    place = next((i for i, word in enumerate(words) if (ROOT / word).is_file() and word.endswith(".py")), None)
    if "torchrun" in words:
        check_options(words[words.index("torchrun") : place], " ".join(get_args_parser()._option_string_actions))
    if place is None or words[place] == "scripts/lm_eval_coconut.py":  # its options belong to lm-evaluation-harness
        return
    folder = (ROOT / words[place]).parent  # scripts share options
    check_options(words[place:], "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py")))
    if words[place] == "run.py" and (ROOT / words[place + 1]).exists():
        keys, problems = parse_overrides([word for word in words[place + 2 :] if not word.startswith(("[", "--"))])
        Config(read_yaml(ROOT / words[place + 1]) | keys)
        if problems:
            raise ValueError("; ".join(problems))


def check_options(words: list[str], known: str) -> None:
    """Raise ValueError for the first --option that does not occur in the text `known`."""
    for word in words:
        option = re.match(r"\[?(--[\w-]+)", word)
        if option and not re.search(rf"{option[1]}\b(?!-)", known):
            raise ValueError(f"{option[1]} is not an option of {words[0]}")


def run(command: str, clone: Path) -> None:
    """Run a command in the activated virtual environment; raise ValueError if it fails."""
    activated = f"[ ! -e .venv ] || source .venv/bin/activate\n{TINY.get(command, command)}\n"
    own = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    own["PATH"] = os.pathsep.join(p for p in own["PATH"].split(os.pathsep) if Path(p) != Path(sys.prefix, "bin"))
    done = subprocess.run(["bash", "-c", activated], cwd=clone, env=own, stdin=subprocess.DEVNULL, capture_output=True)
    if done.returncode:
        raise ValueError(f"exit code {done.returncode}: ...{done.stderr.decode()[-2000:]}")


def main() -> int:
    """Check or run all commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="run nothing")
    only_check, failed, seen = parser.parse_args().check, 0, set()
    with tempfile.TemporaryDirectory() as place:
        clone = Path(place, "coconut")
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        for page in PAGES:
            for command in commands(page):
                why, started = reason(command) or ("--check" if only_check else None), time.perf_counter()
                if command in seen:
                    continue
                seen.add(command)
                try:
                    check(command)
                    if not why:
                        run(command, clone)
                    outcome = f"checked ({why})" if why else f"ran in {time.perf_counter() - started:.0f} s"
                except ValueError as error:
                    failed, outcome = failed + 1, f"FAILED: {error}"
                print(f"{page.relative_to(ROOT)}: {command!r}: {outcome}", flush=True)
    print(f"{len(seen)} commands, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
