#!/usr/bin/env bash
# Runs a command on one host in as many processes as it has GPUs.
set -euo pipefail

usage() {
  cat << 'END'
launch/multi_gpu.sh [--dry-run] COMMAND...
    launch/multi_gpu.sh python -m resnet_jax.main --config=imagenet_50 --workdir=runs/imagenet_50

One process drives all GPUs of a host, and needs no launcher: run COMMAND as it is. One process a GPU, as here, is for
hosts where a single Python can't feed them: first try --config.data.worker_type=process. It takes the GPUs of
CUDA_VISIBLE_DEVICES, or all of the machine, and passes output, signals and exit statuses on as local.sh does.

--dry-run    print the commands, run nothing
END
}

fail() { echo "error: $*" >&2; exit 2; }

option=()
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --dry-run) option=(--dry-run); shift ;;
esac
[[ ${1:--} != -* ]] || fail "no command: multi_gpu.sh COMMAND... (--help)"

gpus=${CUDA_VISIBLE_DEVICES-}
if [[ -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
  command -v nvidia-smi > /dev/null || fail "no nvidia-smi here: set CUDA_VISIBLE_DEVICES=0,1,... to the GPUs to use"
  gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)
fi
[[ -n $gpus ]] || fail "no GPU to be seen: see nvidia-smi and CUDA_VISIBLE_DEVICES"

commas=${gpus//[^,]/}
count=$((${#commas} + 1))
if ((count == 1)); then
  echo "one GPU: one process is enough, the command runs as it is" >&2
  [[ ${#option[@]} -eq 0 ]] || { printf '%q ' "$@"; echo; exit 0; }
  exec "$@"
fi
echo "$count processes, one a GPU; one process for all $count is the command as it is, without this script" >&2
GPUS=$gpus exec bash "$(dirname "$0")/local.sh" ${option[@]+"${option[@]}"} "$count" "$@"
