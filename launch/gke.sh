#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster: fills in launch/gke_jobset.yaml and gives it to kubectl.
#
#   NAME=scalr IMAGE=REGISTRY/scalr_jax:1 TPU=tpu-v5p-slice TOPOLOGY=4x4x8 VOLUME_CLAIM=shared \
#       CONFIG=configs/smoke.py WORKDIR=/shared/run launch/gke.sh [OPTIONS] [FLAGS OF scalr_jax.main]
#   kubectl logs --follow job/scalr-slice-0           the progress
#   kubectl delete jobset scalr                       ends it; the same launch/gke.sh again resumes
#
# Options, before all flags
#   --dry-run   print the YAML and give it to nobody
#
# NAME             the JobSet's
# IMAGE            an image with jax[tpu] (docker build --build-arg EXTRA=tpu), where the cluster can pull it
# TPU, TOPOLOGY    the labels gke-tpu-accelerator and gke-tpu-topology of the node pools, as in tpu-v6e-slice and 8x8
# SLICES           node pools of that topology to train on together (default: 1)
# CHIPS_PER_HOST   TPU chips of a node (default: 4)
# RUN_AS           number of the user and group that the pods run as, who must own WORKDIR's folder (default: 1000)
# VOLUME_CLAIM     a ReadWriteMany PersistentVolumeClaim, mounted at MOUNT (default: /shared), for data and workdir
# CONFIG, WORKDIR  the flags of these names; WORKDIR under MOUNT
# MAX_RESTARTS     how many times a run that failed is started again (default: 10); preemptions do not count
set -euo pipefail

fail() {
    echo "gke.sh: error: $1" >&2
    exit 2
}

dry_run=''
case ${1:-} in
--help | -h)
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
--dry-run)
    dry_run=1
    shift
    ;;
esac

[[ ${NAME:-} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "set NAME to 1 to 40 lower-case letters, digits and dashes"
[[ -n ${IMAGE:-} ]] || fail "set IMAGE to a container image with this package and jax[tpu], as launch/Dockerfile makes"
[[ ${TPU:-} == tpu* ]] || fail "set TPU to the node pools' label gke-tpu-accelerator, as in TPU=tpu-v5p-slice"
[[ ${TOPOLOGY:-} =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "set TOPOLOGY to the chips of a slice, as in TOPOLOGY=4x4x8 or 8x8"
[[ -n ${VOLUME_CLAIM:-} ]] || fail "set VOLUME_CLAIM to a ReadWriteMany PersistentVolumeClaim for data and workdir"
[[ -n ${CONFIG:-} ]] || fail "set CONFIG to a config file in the image, as in CONFIG=configs/smoke.py"
: "${MOUNT:=/shared}"
[[ ${WORKDIR:-} == "$MOUNT"/* ]] || fail "set WORKDIR to a folder under $MOUNT, where the volume is, as in $MOUNT/run"
[[ ${SLICES:=1} =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES is not a number of slices"
[[ ${CHIPS_PER_HOST:=4} =~ ^[1-9][0-9]*$ ]] || fail "CHIPS_PER_HOST=$CHIPS_PER_HOST is not a number of chips"
[[ ${RUN_AS:=1000} =~ ^[1-9][0-9]*$ ]] || fail "RUN_AS=$RUN_AS is not the number of a user other than root"
[[ ${MAX_RESTARTS:=10} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS is not a number"
chips=$((${TOPOLOGY//x/ * }))
((chips % CHIPS_PER_HOST == 0)) || fail "the $chips chips of TOPOLOGY=$TOPOLOGY are not a multiple of CHIPS_PER_HOST=$CHIPS_PER_HOST"
HOSTS=$((chips / CHIPS_PER_HOST))
((SLICES == 1 || HOSTS > 1)) || fail "several slices need slices of several hosts: TOPOLOGY=$TOPOLOGY is one host"

# Texts are filled in as JSON, which YAML reads, so that no value can be more than a value.
export NAME IMAGE TPU TOPOLOGY SLICES CHIPS_PER_HOST HOSTS VOLUME_CLAIM MOUNT CONFIG WORKDIR MAX_RESTARTS RUN_AS
yaml=$(python3 -c '
import json, os, string, sys
values = {key: value if value.isdigit() else json.dumps(value) for key, value in os.environ.items()}
template = string.Template(open(sys.argv[1]).read())
print(template.substitute(values, FLAGS=json.dumps(sys.argv[2:])), end="")
' "$(dirname "$0")/gke_jobset.yaml" "$@")

if [[ -n $dry_run ]]; then
    echo "$yaml"
    exit 0
fi
command -v kubectl >/dev/null || fail "kubectl is not installed"
kubectl apply --filename=- <<<"$yaml"
