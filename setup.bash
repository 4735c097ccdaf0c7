# Sourced by quickstart.bash and tests/run.bash: create .venv with the requirements file $1 and activate it.
# PYTHON selects the interpreter (3.11 to 3.13). Linux without an NVIDIA driver gets the CPU build of torch, from an
# index that pip is configured with or TORCH_INDEX_URL names, otherwise by uv. CPU=1 and GPU=1 override the detection.
set -euo pipefail

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: $("$python" --version) found, but 3.11 to 3.13 is required; set PYTHON=/path/to/python3.12" >&2
    exit 2
}

wants_cpu_build() {
    if [ "${CPU:-}${GPU:-}" ]; then [ "${CPU:-}" = 1 ] && [ "${GPU:-}" != 1 ]; return; fi
    [ "$(uname)" = Linux ] && [ ! -e /proc/driver/nvidia ] && ! nvidia-smi > /dev/null 2>&1
}

install_cpu_torch() {  # "$@": pip install and its options
    local torch
    torch=$(grep '^torch==' requirements.txt)
    echo "installing the CPU build of torch, about 190 MB (CPU=1, or no NVIDIA driver; GPU=1 takes the CUDA build)"
    "$@" "$torch+cpu" 2> /dev/null && return
    echo "pip's indexes have no $torch+cpu (TORCH_INDEX_URL can name one that has); trying uv"
    "$@" --quiet uv && .venv/bin/uv pip install --python .venv --torch-backend cpu -c requirements.lock "$torch" && return
    echo "could not get the CPU build: pip now downloads the CUDA build, several GB; Ctrl-C stops it"
}

stamp=.venv/installed-$(cat "$1" requirements* setup.bash | cksum | cut -d' ' -f1)${CPU:+-cpu}${GPU:+-gpu}
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (a few minutes, once)"
    "$python" -m venv .venv
    install=(.venv/bin/python -m pip install --disable-pip-version-check -c requirements.lock)
    install+=(${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"})
    if wants_cpu_build; then install_cpu_torch "${install[@]}"; fi
    "${install[@]}" -r "$1"
    touch "$stamp"
fi
source .venv/bin/activate
