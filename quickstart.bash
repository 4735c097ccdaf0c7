#!/usr/bin/env bash
# Sets up .venv, makes small problems, trains CoT, no-CoT and Coconut on them with a tiny GPT-2 and prints a table:
# minutes on two CPU cores; no GPU, account or download beyond the packages. Further words go to scripts/table1.py.
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.bash requirements.txt
python preprocessing/ring.py
python scripts/table1.py ring --methods cot no_cot coconut "$@"
