#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, for the tests: munged, slurmctld and slurmd from Debian's packages,
# all of whose files are in one folder and whose traffic stays on the loopback interface.
#
#   apt-get install slurmctld slurmd slurm-client munge
#   tests/launch/slurm_node.sh start FOLDER [CPUS]    then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/launch/slurm_node.sh stop FOLDER
#
# Needs root, as slurmd does.
set -euo pipefail

fail() {
    echo "slurm_node.sh: error: $1" >&2
    exit 2
}

start() {
    local folder=$1 cpus=$2 port
    mkdir -p "$folder"/{state,spool}
    chmod 755 "$folder"
    port=$((20000 + $$ % 20000))
    cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
KillWait=30
NodeName=localhost NodeAddr=127.0.0.1 CPUs=$cpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c -f "$SLURM_CONF"
    slurmd -c -N localhost -f "$SLURM_CONF"
    for _ in {1..100}; do
        [[ $(sinfo --noheader --format=%T 2>/dev/null) != idle ]] || return 0
        sleep 0.2
    done
    stop "$folder"
    tail -n 3 "$folder"/*.log >&2
    fail "the node was not idle after 20 seconds"
}

stop() {
    local name
    for name in slurmd slurmctld munged; do
        [[ ! -s $1/$name.pid ]] || kill "$(<"$1/$name.pid")" 2>/dev/null || true
    done
}

case ${1:-} in
start) start "$(mkdir -p "${2:?folder}" && cd "$2" && pwd)" "${3:-2}" ;;
stop) stop "${2:?folder}" ;;
*) fail "say start FOLDER [CPUS] or stop FOLDER" ;;
esac
