#!/usr/bin/env bash
# Sets up .venv and runs the tests, two files at a time; further words go to pytest: bash tests/run.bash -m slow
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source setup.bash tests/requirements.txt
words=("$@")
[ $# -gt 0 ] || words=(-m "not slow")
python -m pytest -n 2 --dist loadfile --durations 5 "${words[@]}"
