#!/usr/bin/env bash
# One process of a run, as every launcher here starts it. Its exit code says what to do next:
#   0 the run is finished (results.json is there)    75 it was stopped and saved: run the same again
#   2 bad arguments, config or input                 else it failed
#
#   CONFIG=configs/smoke.py WORKDIR=runs/smoke launch/worker.sh [FLAGS OF scalr_jax.main]
#
# CONFIG, WORKDIR   the flags of these names; WORKDIR on storage that all processes share
# PYTHON            the interpreter (default: python)
set -euo pipefail

fail() {
    echo "worker.sh: error: $1" >&2
    exit 2
}

[[ -n ${CONFIG:-} ]] || fail "set CONFIG to a config file, as in CONFIG=configs/smoke.py"
[[ -n ${WORKDIR:-} ]] || fail "set WORKDIR to a folder on storage that all processes share, as in WORKDIR=/shared/run"

# A signal ends `wait`, so the shell waits again until the program itself has ended.
child='' asked=''
trap 'asked=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
"${PYTHON:-python}" -m scalr_jax.main --config="$CONFIG" --workdir="$WORKDIR" "$@" &
child=$!
[[ -z $asked ]] || kill -TERM "$child" 2>/dev/null || true # it came before the line above
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do
    code=0
    wait "$child" || code=$?
done
# SIGTERM kills a program that has only begun to start, or ends: that costs nothing.
[[ -z $asked || $code != 143 ]] || code=0
((code == 0)) || exit "$code"

# A process that SIGTERM stopped exits with 0, too. Shared storage may show another process's file late.
for _ in {1..5}; do
    [[ ! -e $WORKDIR/results.json ]] || exit 0
    sleep 1
done
exit 75
