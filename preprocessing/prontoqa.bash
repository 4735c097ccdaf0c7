#!/usr/bin/env bash
# Generate ProntoQA with its authors' generator and convert it to data/prontoqa_{train,valid,test}.json.
#
#     bash preprocessing/prontoqa.bash [GENERATOR]
#
# GENERATOR is a folder with the generator (asaparov/prontoqa); default: the pinned commit, cloned to
# data/prontoqa_generator. numpy and scipy are installed in a separate environment, data/prontoqa_env. The generator
# takes about 18 minutes and writes its file at the very end; its output goes to data/prontoqa_generator.log, which is
# removed on success. To generate again, delete data/5hop_0shot_random.json.
set -euo pipefail

REPOSITORY=https://github.com/asaparov/prontoqa.git
COMMIT=f0145b867b3c106285ec9ea1941a3f6eb7c6162d

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "$here/.." && pwd)/data
raw=$data/5hop_0shot_random.json
env=$data/prontoqa_env
log=$data/prontoqa_generator.log

# clone FOLDER
clone() {
    [ -d "$1" ] || git clone --quiet "$REPOSITORY" "$1" || fail "cannot clone $REPOSITORY"
    git -C "$1" checkout --quiet "$COMMIT" || fail "$1 has no commit $COMMIT; delete it and try again"
}

make_environment() {
    [ -x "$env/bin/python" ] || "$python" -m venv "$env" || fail "cannot create the environment $env"
    "$env/bin/python" -c "import numpy, scipy" 2>/dev/null || "$env/bin/python" -m pip install --quiet numpy scipy ||
        fail "cannot install numpy and scipy in $env"
}

# generate FOLDER: run the documented command there; print progress every 30 seconds
generate() {
    (cd "$1" && exec "$env/bin/python" run_experiment.py --model-name json --model-size dummy --ordering random \
        --num-trials 10000 --few-shot-examples 0 --ontology fictional --min-hops 5 --max-hops 5 --hops-skip 1) \
        >"$log" 2>&1 &
    trap 'kill $! 2>/dev/null || true; rm -f "$raw.part"' EXIT
    echo "generating 10,000 problems in about 18 minutes; log: $log"
    SECONDS=0
    while sleep 1 && kill -0 $! 2>/dev/null; do
        [ $((SECONDS % 30)) -ne 0 ] || echo "... $SECONDS s, $(($(wc -c <"$log") / 1000000)) MB of log"
    done
    wait $! || fail "the generator failed: $(tail -n 3 "$log")"
}

python=$(command -v python || command -v python3) || fail "no python found; activate the environment first"
if [ -f "$raw" ]; then
    echo "converting $raw; delete it to generate it again"
else
    generator=${1:-$data/prontoqa_generator}
    mkdir -p "$data"
    [ $# -gt 0 ] || clone "$generator"
    [ -f "$generator/run_experiment.py" ] || fail "$generator has no run_experiment.py; is it a clone of $REPOSITORY?"
    make_environment
    generate "$generator"
    cp "$generator/5hop_0shot_random.json" "$raw.part" || fail "the generator wrote no file; see $log"
    mv "$raw.part" "$raw"
    rm "$log"
fi
"$python" "$here/prontoqa.py" "$raw" --out "$data"
