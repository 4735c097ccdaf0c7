"""Print docs/config.md, the page of all config keys, from config.py.

python scripts/config_page.py > docs/config.md
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import OFFICIAL_METHODS, Config

TOP = """\
# Config

Defaults < YAML file < `key=value` on the command line. Unknown keys, wrong types, values out of range, contradictions
and missing files are all reported at once, with exit code 2 and before anything is written. A YAML file may extend
another one, which its `base:` key names (relative to itself). The official YAML files run once their YOUR_...
placeholders are filled in.

| key | default | meaning |
|---|---|---|
"""
BOTTOM = """
The official code's booleans `coconut`, `cot`, `no_thoughts` and `no_cot` select a method as well.

`python scripts/config_page.py > docs/config.md` generates this page.
"""


def row(option) -> str:
    """Format a key's row of the table, with its choices if it has any."""
    choices = ", ".join(str(choice) for choice in option.metadata["choices"] if choice is not None)
    return f"| `{option.name}` | {option.default} | {option.metadata['doc']}{choices and f' ({choices})'} |\n"


def page() -> str:
    """Format the whole page."""
    return TOP + "".join(row(option) for option in fields(Config) if option.name not in OFFICIAL_METHODS) + BOTTOM


if __name__ == "__main__":
    print(page(), end="")
