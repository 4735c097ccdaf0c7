#!/usr/bin/env bash
# Download GSM8k in the iCoT format, verify it, and convert it to data/gsm_{train,valid,test}.json.
#
#     bash preprocessing/gsm_icot.bash [--from SOURCE] [train] [valid] [test]
#
# SOURCE is a folder or an http(s) URL with train.txt, valid.txt and test.txt (in a folder also gsm_train.txt etc.);
# default: the URLs in gsm_icot.sums, which also has sizes and checksums. Default splits: all three. Files already
# complete in data/ are not downloaded again. Needs curl or wget.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# problem_with FILE BYTES SHA256: print what is wrong with the file, or nothing
problem_with() {
    if head -c 100 "$1" | grep -aq '^version https://git-lfs'; then
        echo "is a git-lfs pointer, not the data"
    elif [ "$(wc -c <"$1")" -ne "$2" ]; then
        echo "has $(wc -c <"$1") bytes instead of $2: truncated, or another version"
    elif [ "$(sha256 "$1")" != "$3" ]; then
        echo "does not have the SHA-256 $3: damaged, or another version"
    fi
}

# download URL FILE: resumes a partial FILE
download() {
    if command -v curl >/dev/null; then
        curl --fail --location --progress-bar --connect-timeout 30 --speed-limit 1 --speed-time 60 \
            --continue-at - --output "$2" "$1" && return
        [ $? -ne 33 ] || rm -f "$2" # no range requests: the next attempt starts over
        return 1
    fi
    command -v wget >/dev/null || fail "neither curl nor wget found: install one, or use --from FOLDER"
    wget --continue --tries=1 --timeout=60 --output-document="$2" "$1"
}

# fetch SPLIT SOURCE FILE
fetch() {
    local name attempt
    for name in "$1.txt" "gsm_$1.txt"; do
        if [ -f "$2/$name" ]; then
            cp "$2/$name" "$3"
            return
        fi
    done
    case $2 in http://* | https://*) ;; *) fail "$2 has no $1.txt" ;; esac
    for attempt in 1 2 3 4; do
        if download "${2%/}/$1.txt" "$3"; then return; fi
        echo "attempt $attempt failed" >&2
        sleep 1
    done
    fail "cannot download ${2%/}/$1.txt; try again later, or download it elsewhere and use --from FOLDER"
}

from=
if [ "${1:-}" = --from ]; then
    [ $# -ge 2 ] || fail "--from needs a folder or a URL"
    from=$2
    shift 2
fi
case $from in
    "" | http://* | https://*) ;;
    *) from=$(cd "$from" 2>/dev/null && pwd) || fail "--from: no such folder, and not an http(s) URL" ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v python || command -v python3) || fail "no python found; activate the environment first"
cd "$here/.."
mkdir -p data
part=
trap '[ -z "$part" ] || rm -f "$part"' EXIT
for split in ${*:-train valid test}; do
    line=$(grep "^$split " "$here/gsm_icot.sums") || fail "no split '$split'; choose train, valid or test"
    read -r _ bytes sum address <<<"$line"
    text=data/gsm_$split.txt
    problem='is missing'
    [ ! -f "$text" ] || problem=$(problem_with "$text" "$bytes" "$sum")
    if [ -n "$problem" ]; then
        echo "$text $problem; downloading it" >&2
        part=$text.part
        rm -f "$part"
        fetch "$split" "${from:-$address}" "$part"
        problem=$(problem_with "$part" "$bytes" "$sum")
        [ -z "$problem" ] || fail "$split.txt from ${from:-$address} $problem; try again, or use another --from"
        mv "$part" "$text"
    fi
    "$python" "$here/gsm_icot.py" "$split"
done
