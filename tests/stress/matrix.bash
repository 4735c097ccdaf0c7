#!/usr/bin/env bash
# Test the supported versions (README). Each combination runs the tests below, and the golden fixtures if they exist, in
# a new virtual environment. Prints a table; exit code 1 if a combination failed.
#
#   bash tests/stress/matrix.bash                       all: minutes each; 2 to 8 GB of disk, one at a time
#   bash tests/stress/matrix.bash 3.13 2.14.1 5.23.0    one: Python, torch, transformers
#   bash tests/stress/matrix.bash --short               only transformers 4, on top of the other packages of .venv
#
# Installs the CPU build of torch if an index has it (set PIP_EXTRA_INDEX_URL to PyTorch's), otherwise what pip finds:
# gigabytes of CUDA. Versions that no index has for this machine are reported as "not installable here".
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 PIP_DISABLE_PIP_VERSION_CHECK=1

pinned() { grep -h "^$1==" requirements.txt | sed 's/.*==\([0-9.]*\).*/\1/'; }
torches=("2.6.0" "$(pinned torch)" "2.14.1")             # oldest, pinned, newest
transformers=("4.57.6" "$(pinned transformers)")
tests=(tests/scripts/test_{ask,convert,hub,lm_eval}.py)
tests+=(tests/components/test_{custom_generate,kv_cache,tokenization,lora}.py)
tests+=("tests/components/test_parallelize.py::test_ranks_and_micro_batches_match_one_large_batch[2-8-1-ddp]")  # FSDP needs torch 2.8
few=(tests/components/test_custom_generate.py tests/scripts/test_ask.py tests/components/test_lora.py)
few+=(-k "in_transformers or trust_remote_code or sampling or logits or inputs_embeds or top_tokens or gemma3")
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
table=()

requirements() {  # VERSION: pinned packages without torch, with this transformers and a datasets version that fits
    cat requirements.txt requirements-extra.txt tests/requirements.txt | grep -v -e '^-r' -e '^torch==' |
        sed "s/^transformers==.*/transformers==$1/" |
        if [[ $1 == 4.* ]]; then sed 's/^datasets==.*/datasets>=4,<5/'; else cat; fi
}

interpreter() {  # VERSION: print the command of this Python, if installed
    local candidate
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python; do
        "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
        echo "$candidate" && return
    done
    return 1
}

check() {  # NAME PYTHON PYTEST_ARGS: run the tests and record the outcome
    local outcome=passed
    "$2" -m pytest -p no:cacheprovider -m "not slow" "${@:3}" || outcome=FAILED
    if [ -d ../shared/golden ]; then
        "$2" ../shared/golden/check.py ../shared/golden/fixtures . --quiet || outcome=FAILED
    fi
    table+=("$1: $outcome")
}

combination() {  # PYTHON TORCH TRANSFORMERS
    local name="Python $1, torch $2, transformers $3" python
    echo "== $name"
    python=$(interpreter "$1") || { table+=("$name: Python $1 is not installed"); return; }
    requirements "$3" > "$place/requirements.txt"
    "$python" -m venv --clear "$place/venv"
    local install=("$place/venv/bin/python" -m pip install --quiet --no-cache-dir)
    if ! "${install[@]}" "torch==$2+cpu" && ! "${install[@]}" "torch==$2"; then
        table+=("$name: not installable here")
    elif ! "${install[@]}" "torch==$2" -r "$place/requirements.txt"; then
        table+=("$name: FAILED to install")
    else
        check "$name" "$place/venv/bin/python" "${tests[@]}"
    fi
}

short() {  # transformers 4 in an environment that takes everything else from .venv
    local packages='import site; print(site.getsitepackages()[0])'
    source setup.bash tests/requirements.txt
    python -m venv "$place/venv"
    python -c "$packages" > "$("$place/venv/bin/python" -c "$packages")/venv.pth"
    "$place/venv/bin/python" -m pip install --quiet "transformers==${transformers[0]}" "datasets>=4,<5"
    set +e
    check "transformers ${transformers[0]} on .venv" "$place/venv/bin/python" "${few[@]}"
}

if [ "${1:-}" = --short ]; then
    short
elif [ $# = 3 ]; then
    combination "$@"
else
    for version in 3.11 3.13; do
        for torch in "${torches[@]}"; do
            for other in "${transformers[@]}"; do
                combination "$version" "$torch" "$other"
            done
        done
    done
fi
printf '%s\n' "" "${table[@]}"
[[ "${table[*]}" != *FAILED* ]]
