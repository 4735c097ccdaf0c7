"""Generate docs/config.md, the reference of all config keys: python scripts/config_page.py > docs/config.md"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import OFFICIAL_METHODS, Config

TOP = """\
# Config

Defaults < YAML < `key=value` words. An unknown key, a wrong type, a value out of range, a contradiction or a missing
file is refused before anything is written, all at once, with exit code 2. A YAML file may name a `base:` file (relative
to itself) that it changes. The official YAML files run once their YOUR_... placeholders are filled in.

| key | default | |
|---|---|---|
"""
BOTTOM = """
The official code's booleans `coconut`, `cot`, `no_thoughts` and `no_cot` name a method as well.

This page is made by `python scripts/config_page.py > docs/config.md`.
"""


def row(option) -> str:
    """Render a key as a table row, with its allowed values."""
    choices = ", ".join(str(choice) for choice in option.metadata["choices"] if choice is not None)
    return f"| `{option.name}` | {option.default} | {option.metadata['doc']}{choices and f' ({choices})'} |\n"


def page() -> str:
    """Render the page."""
    return TOP + "".join(row(option) for option in fields(Config) if option.name not in OFFICIAL_METHODS) + BOTTOM


if __name__ == "__main__":
    print(page(), end="")
