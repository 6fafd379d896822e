#!/usr/bin/env bash
# The default test run beside two busy loops and a disk writer, REPETITIONS times (1): `tests/loaded.sh [REPETITIONS]`.
#
# NICE=10 gives these helpers that niceness (0). The first run that fails is the last one, and its status that of the
# script. However the script ends, its helpers and the run end with it, and what the helpers wrote goes with them.
set -euo pipefail
set -m # a process group for each of the processes that are started here, to end it with all of its children

cd "$(dirname "$0")/.."
repetitions=${1:-1}
if ! [[ $repetitions =~ ^[1-9][0-9]*$ ]]; then
    echo "tests/loaded.sh: REPETITIONS must be a number from 1, got '$repetitions'" >&2
    exit 2
fi
folder=$(mktemp -d "${TMPDIR:-/tmp}/evenodds-loaded-XXXXXX")
helpers=()
tests=

stop() {
    trap - EXIT INT TERM
    for helper in "${helpers[@]}"; do kill -KILL -- "-$helper" 2>/dev/null || true; done
    if [[ -n $tests ]] && kill -INT -- "-$tests" 2>/dev/null; then
        for _ in {1..60}; do kill -0 -- "-$tests" 2>/dev/null && sleep 0.5; done # it stops its database servers
        kill -KILL -- "-$tests" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

loop='while :; do :; done'
write="while :; do dd if=/dev/zero of='$folder/written' bs=1M count=256 conv=fsync status=none; done"
for helper in "$loop" "$loop" "$write"; do
    nice -n "${NICE:-0}" bash -c "$helper" &
    helpers+=($!)
    disown # nobody needs to hear how it ends
done

for ((i = 1; i <= repetitions; i++)); do
    echo "loaded run $i of $repetitions"
    make test &
    tests=$!
    wait "$tests"
    tests=
done
