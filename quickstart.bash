#!/usr/bin/env bash
# Set up .venv, generate small problems, train CoT, no-CoT and Coconut on them with a tiny GPT-2, and print a table.
# Takes minutes on two CPU cores; downloads only Python packages. Arguments are passed to scripts/table1.py.
cd "$(dirname "${BASH_SOURCE[0]}")"
source setup.bash requirements.txt
python preprocessing/ring.py
python scripts/table1.py ring --methods cot no_cot coconut "$@"
