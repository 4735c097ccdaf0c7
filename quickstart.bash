#!/usr/bin/env bash
# The first ten minutes: set up .venv, ask a model that is part of the repository, train CoT, no-CoT and Coconut on small
# problems with a tiny GPT-2, print a table, and ask and analyze the new model. No GPU, no account; downloads only Python
# packages. Ctrl-C stops it; rerun it to resume. Arguments are passed to scripts/table1.py.
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'echo; echo "stopped; rerun to resume: bash quickstart.bash"; exit 130' INT  # once the child has ended
source setup.bash requirements.txt
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # the models are tiny

echo "
1. A trained model: which of two nodes, b or d, can be reached from a?"
python scripts/ask.py models/mini-coconut "a>c e>f c>g f>d g>b d b a" --show-thoughts

echo "
2. Train three methods to follow two arrows around a ring of seven, and test them"
python preprocessing/ring.py --small
python scripts/table1.py smoke --methods cot no_cot coconut "$@"

question="d>a g>e f>d b>g a>c e>f c>b d" model=checkpoints/smoke-coconut-seed0/best
echo "
3. Ask the new model: where do two arrows lead from d?"
python scripts/ask.py "$model" "$question" --show-thoughts
python scripts/analyze.py "$model" --data data/ring_small_test.json --limit 100 --batch 100

echo "
Next: ask your own question   source .venv/bin/activate; python scripts/ask.py $model
      all eight methods       python preprocessing/ring.py; python scripts/table1.py ring
      your own data           docs/faq.md#extending
      the paper's data        README.md#train"
