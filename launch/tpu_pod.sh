#!/usr/bin/env bash
# A run on Cloud TPU slices, from any machine with gcloud: asks for them as a queued resource (or takes the one of that
# name), waits until they are there, installs the same commit on all workers, starts the same command on all of them,
# and follows the first. A preempted slice is deleted and asked for again, and the run resumes from its workdir.
#
#   TPU_NAME=scalr ZONE=us-east5-a ACCELERATOR_TYPE=v5p-128 RUNTIME_VERSION=v2-alpha-tpuv5 REPOSITORY=GIT_URL \
#       CONFIG=configs/smoke.py WORKDIR=/shared/run launch/tpu_pod.sh [OPTIONS] [FLAGS OF scalr_jax.main]
#
# The run goes on when this script is stopped or its connection breaks; the same command again follows it.
#
# Options, before all flags
#   --dry-run    print the commands and run none of them
#   --clean-up   delete the slices when the run has finished; what they cost ends only then
#   --delete     delete the slices now, whatever runs on them
#
# TPU_NAME, ZONE    the queued resource's; PROJECT too, if it is not gcloud's own
# ACCELERATOR_TYPE  as in v5p-128, v6e-64, v5litepod-32, v4-32
# RUNTIME_VERSION   v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e, v2-alpha-tpuv5-lite (v5e), tpu-ubuntu2204-base (v4)
# SLICES            how many slices of that type (default: 1)
# SPOT              1: cheaper, and preempted when others need them
# CREATE_FLAGS      more flags of `gcloud compute tpus queued-resources create`, as in "--reserved --network=NAME"
# REPOSITORY        the Git URL that workers clone, without a password or token (docs/launch_platforms.md)
# REVISION          the commit that they check out (default: this checkout's)
# SETUP             a command for each worker before all else, as one that mounts the shared storage
# INSTALL           what installs the package in the clone (default: uv and a virtual environment .venv)
# CONFIG, WORKDIR   the flags of these names; WORKDIR on storage that all workers share
# MAX_RESTARTS      how many times a run that failed is started again (default: 3); preemptions do not count
# POLL_SECONDS      between two looks (default: 30)
set -euo pipefail

fail() {
    echo "tpu_pod.sh: error: $1" >&2
    exit 2
}

say() {
    echo "$(date +%H:%M:%S) $1"
}

dry_run=''
clean_up=''
delete=''
while (($#)); do
    case $1 in
    --help | -h)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
        exit 0
        ;;
    --dry-run) dry_run=1 ;;
    --clean-up) clean_up=1 ;;
    --delete) delete=1 ;;
    *) break ;;
    esac
    shift
done

[[ ${TPU_NAME:-} =~ ^[a-z][-a-z0-9]*$ ]] || fail "set TPU_NAME to a name of lower-case letters, digits and dashes"
[[ -n ${ZONE:-} ]] || fail "set ZONE to the zone of the TPU, as in ZONE=us-east5-a"
[[ -n $dry_run ]] || command -v gcloud >/dev/null || fail "gcloud is not installed: see the Google Cloud CLI's page"

queued() { # queued VERB ARGUMENTS: what `gcloud compute tpus queued-resources` can do
    local command=(gcloud compute tpus queued-resources "$@" --zone="$ZONE" --quiet)
    [[ -z ${PROJECT:-} ]] || command+=(--project="$PROJECT")
    if [[ -n $dry_run ]]; then
        printf '%q ' "${command[@]}"
        echo
    else
        "${command[@]}"
    fi
}

if [[ -n $delete ]]; then
    queued delete "$TPU_NAME" --force
    exit 0
fi

[[ -n ${ACCELERATOR_TYPE:-} ]] || fail "set ACCELERATOR_TYPE to the kind and size of a slice, as in v5p-128"
[[ -n ${RUNTIME_VERSION:-} ]] || fail "set RUNTIME_VERSION to the TPU's software, as in v2-alpha-tpuv5; --help lists them"
[[ -n ${REPOSITORY:-} ]] || fail "set REPOSITORY to the Git URL from which the workers clone this project"
# It becomes a part of commands, here and on the workers, which everybody on these machines can read.
[[ ! $REPOSITORY =~ ^https?://[^/]*@|://[^/]*:[^/]*@|\? ]] || fail "REPOSITORY holds a user, password or token, which \
process lists would show: leave it out, and give the workers a Git credential helper in SETUP (docs/launch_platforms.md)"
[[ -n ${CONFIG:-} ]] || fail "set CONFIG to a config file, as in CONFIG=configs/smoke.py"
[[ ${WORKDIR:-} == /* ]] || fail "set WORKDIR to a full path on storage that all workers share, as in /shared/run"
[[ ${SLICES:=1} =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES is not a number of slices"
[[ ${MAX_RESTARTS:=3} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a number"
[[ ${POLL_SECONDS:=30} =~ ^[1-9][0-9]*$ ]] || fail "POLL_SECONDS=$POLL_SECONDS is not a number of seconds"
revision=${REVISION:-$(git -C "$(dirname "$0")" rev-parse HEAD)} || fail "set REVISION to the commit that is to run"

# What the workers run. A run is a process group, whose number is in run.pid; its exit code comes into run.code.
# shellcheck disable=SC2016 # expanded there
going='going() { [ -s ~/scalr_jax/run.pid ] && kill -0 -- "-$(cat ~/scalr_jax/run.pid)" 2>/dev/null; }'
# shellcheck disable=SC2016
signal='kill -TERM -- "-$(cat ~/scalr_jax/run.pid)"'
install="set -e
$going
if going; then $signal; for _ in {1..60}; do going || break; sleep 1; done; fi
if going; then ${signal/TERM/KILL}; fi
${SETUP:-true}
cd
[ -d scalr_jax ] || git clone --quiet $(printf %q "$REPOSITORY") scalr_jax
cd scalr_jax
git fetch --quiet origin
git checkout --quiet --detach $(printf %q "$revision")
${INSTALL:-python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --allow-existing --python '>=3.11' .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'}"
start="set -e
cd ~/scalr_jax
rm -f run.pid run.code
: >run.log
export CONFIG=$(printf %q "$CONFIG") WORKDIR=$(printf %q "$WORKDIR") PYTHON=.venv/bin/python
nohup setsid bash -c 'echo \$\$ >run.pid; launch/worker.sh \"\$@\" >run.log 2>&1; echo \$? >run.code' run \
    $(printf '%q ' "$@") >/dev/null 2>&1 </dev/null &
while [ ! -s run.pid ]; do sleep 0.1; done" # a run that fails at once is followed, too
follow="cd ~/scalr_jax
$going
while [ ! -e run.code ] && going; do sleep 2; done &
tail -n 20 -F --pid=\$! run.log 2>/dev/null" # reads to the end of the file after that loop
exit_code="cat scalr_jax/run.code 2>/dev/null"

on() { # on WHICH COMMAND: one shell command on the first worker or on all
    local which=(--node=0 --worker=0)
    [[ $1 == first ]] || which=(--node=all --worker=all)
    queued ssh "$TPU_NAME" "${which[@]}" --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

create() {
    local flags=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION") more
    if ((SLICES > 1)); then
        flags+=(--node-count="$SLICES" --node-prefix="$TPU_NAME")
    else
        flags+=(--node-id="$TPU_NAME")
    fi
    [[ ${SPOT:-} != 1 ]] || flags+=(--spot)
    read -ra more <<<"${CREATE_FLAGS:-}"
    queued create "$TPU_NAME" "${flags[@]}" ${more[@]+"${more[@]}"}
}

state() { # the queued resource's state, empty when there is none
    queued list --filter="name ~ /queuedResources/$TPU_NAME\$" --format="value(state.state)"
}

get_slices() { # until they are ACTIVE
    local now before='' since=$SECONDS
    while :; do
        now=$(state)
        [[ $now != ACTIVE ]] || break
        case $now in
        '') create ;;
        SUSPENDED) # what a preemption leaves
            say "$TPU_NAME is SUSPENDED: it is deleted and asked for again"
            queued delete "$TPU_NAME" --force
            ;;
        FAILED)
            queued describe "$TPU_NAME" --format="value(state)" >&2
            echo "tpu_pod.sh: error: the request FAILED for the reason above; --delete removes it" >&2
            exit 1
            ;;
        *)
            [[ $now == "$before" ]] || since=$SECONDS
            say "$TPU_NAME is $now for $(((SECONDS - since) / 60)) minutes"
            before=$now
            sleep "$POLL_SECONDS"
            ;;
        esac
    done
    say "$TPU_NAME is ACTIVE"
}

run_once() { # returns worker.sh's code, or 255 when the workers cannot be reached
    local code
    if on first "$going; going"; then
        say "the run is still going"
    else
        say "installing $revision"
        on all "$install" || return 255
        say "starting"
        on all "$start" || return 255
    fi
    for _ in {1..10}; do
        on first "$follow" || true
        code=$(on first "$exit_code") || true
        [[ ! $code =~ ^[0-9]+$ ]] || return "$code"
        [[ $(state) == ACTIVE ]] || break
        sleep "$POLL_SECONDS"
    done
    return 255
}

if [[ -n $dry_run ]]; then
    state
    create
    on all "$install"
    on all "$start"
    on first "$follow"
    on first "$exit_code"
    [[ -z $clean_up ]] || queued delete "$TPU_NAME" --force
    exit 0
fi

restarts=0
while :; do
    get_slices
    code=0
    run_once || code=$?
    case $code in
    0) break ;;
    2) fail "the run was refused for the reason above; the slices are still there, and --delete removes them" ;;
    75) say "the run was stopped and has saved; it is started again" ;;
    *)
        [[ $(state) == ACTIVE ]] || continue # a preemption: get_slices sees to it
        if ((++restarts > MAX_RESTARTS)); then
            on all "tail -n 5 scalr_jax/run.log" || true
            echo "tpu_pod.sh: error: the run failed $restarts times, last with code $code (255: the workers could not \
be reached, or the installation failed); the slices are still there, and --delete removes them" >&2
            exit 1
        fi
        say "the run failed with code $code; it is started again, $restarts of $MAX_RESTARTS"
        sleep "$POLL_SECONDS"
        ;;
    esac
done
say "the run is finished"
[[ -z $clean_up ]] || queued delete "$TPU_NAME" --force
