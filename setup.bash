# Sourced by quickstart.bash and tests/run.bash: create .venv with the requirements file $1 and activate it.
# PYTHON selects the interpreter (3.11 to 3.13).
set -euo pipefail

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
    echo "error: $("$python" --version) found, but 3.11 to 3.13 is required; set PYTHON=/path/to/python3.12" >&2
    exit 2
}
stamp=.venv/installed-$(cat "$1" requirements*.txt | cksum | cut -d' ' -f1)
if [ ! -e "$stamp" ]; then
    echo "setting up .venv (a few minutes, once)"
    "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    touch "$stamp"
fi
source .venv/bin/activate
