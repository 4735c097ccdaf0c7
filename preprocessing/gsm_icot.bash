#!/usr/bin/env bash
# Downloads GSM8k in the iCoT format, checks it, and converts it to data/gsm_{train,valid,test}.json.
#
#     bash preprocessing/gsm_icot.bash [--from SOURCE] [train] [valid] [test]
#
# SOURCE is a folder, or an http(s) address, with train.txt, valid.txt and test.txt (in a folder also gsm_train.txt
# ...). Without it the addresses of gsm_icot.sums are used, which also lists sizes and checksums. Without splits:
# all three. A file that is complete in data/ already is not fetched again. Needs curl or wget.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# flaw FILE BYTES SHA256: prints what is wrong with the file, or nothing
flaw() {
    if head -c 100 "$1" | grep -aq '^version https://git-lfs'; then
        echo "is a git-lfs pointer, not the data"
    elif [ "$(wc -c <"$1")" -ne "$2" ]; then
        echo "has $(wc -c <"$1") bytes instead of $2: cut off, or another version"
    elif [ "$(sha256 "$1")" != "$3" ]; then
        echo "does not have the SHA-256 $3: damaged, or another version"
    fi
}

# download ADDRESS FILE: continues a FILE that is there
download() {
    if command -v curl >/dev/null; then
        curl --fail --location --progress-bar --connect-timeout 30 --speed-limit 1 --speed-time 60 \
            --continue-at - --output "$2" "$1" && return
        [ $? -ne 33 ] || rm -f "$2" # the server cannot continue: the next attempt starts over
        return 1
    fi
    command -v wget >/dev/null || fail "neither curl nor wget found: install one, or use --from FOLDER"
    wget --continue --tries=1 --timeout=60 --output-document="$2" "$1"
}

# fetch SPLIT ADDRESS FILE
fetch() {
    local name attempt
    for name in "$1.txt" "gsm_$1.txt"; do
        if [ -f "$2/$name" ]; then
            cp "$2/$name" "$3"
            return
        fi
    done
    case $2 in http://* | https://*) ;; *) fail "$2 holds no $1.txt" ;; esac
    for attempt in 1 2 3 4; do
        if download "${2%/}/$1.txt" "$3"; then return; fi
        echo "attempt $attempt failed" >&2
        sleep 1
    done
    fail "cannot download ${2%/}/$1.txt. Try again later, or download it elsewhere and use --from FOLDER"
}

from=
if [ "${1:-}" = --from ]; then
    [ $# -ge 2 ] || fail "--from needs a folder or an address"
    from=$2
    shift 2
fi
case $from in
    "" | http://* | https://*) ;;
    *) from=$(cd "$from" 2>/dev/null && pwd) || fail "--from: no such folder, and not an http(s) address" ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
python=$(command -v python || command -v python3) || fail "no python found: activate the environment first"
cd "$here/.."
mkdir -p data
part=
trap '[ -z "$part" ] || rm -f "$part"' EXIT
for split in ${*:-train valid test}; do
    line=$(grep "^$split " "$here/gsm_icot.sums") || fail "no split '$split': train, valid or test"
    read -r _ bytes sum address <<<"$line"
    text=data/gsm_$split.txt
    problem='is missing'
    [ ! -f "$text" ] || problem=$(flaw "$text" "$bytes" "$sum")
    if [ -n "$problem" ]; then
        echo "$text $problem; fetching it" >&2
        part=$text.part
        rm -f "$part"
        fetch "$split" "${from:-$address}" "$part"
        problem=$(flaw "$part" "$bytes" "$sum")
        [ -z "$problem" ] || fail "$split.txt from ${from:-$address} $problem. Try again, or with another --from"
        mv "$part" "$text"
    fi
    "$python" "$here/gsm_icot.py" "$split"
done
