#!/usr/bin/env bash
# Runs a command in several processes on this machine: how a run on several hosts is tried on one.
set -euo pipefail

usage() {
  cat << 'END'
launch/local.sh [--dry-run] N COMMAND...
    launch/local.sh 2 python -m resnet_jax.main --config=digits_20 --workdir=runs/two
    DEVICES=4 launch/local.sh 2 python -m resnet_jax.main --config=digits_20 --workdir=runs/two

Starts COMMAND N times, with --coordinator=127.0.0.1:PORT --num_processes=N --process_id=I. Process 0 prints as it does
alone; lines of the others begin with [I]. Ctrl-C and SIGTERM go on to all. Ends when all have: with 75 if one did
(preempted and saved: the same command resumes), else with the highest exit status.

--dry-run      print the commands, run nothing
DEVICES=D      give each process D virtual CPU devices
GPUS=0,1,...   give process I the I-th of these GPUs alone; otherwise processes run on the CPU, or on JAX_PLATFORMS
END
}

fail() { echo "error: $*" >&2; exit 2; }

dry_run=
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
[[ ${1:-} =~ ^[1-9][0-9]{0,3}$ ]] || fail "'${1:-}' is no number of processes: local.sh N COMMAND... (--help)"
[[ $# -ge 2 && $2 != -* ]] || fail "'${2:-}' is no command: local.sh [--dry-run] N COMMAND... (--help)"
count=$1
shift
[[ ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]] || fail "DEVICES=$DEVICES is no number of devices"
IFS=, read -r -a gpus <<< "${GPUS:-}"
[[ ${#gpus[@]} -eq 0 || ${#gpus[@]} -eq $count ]] || fail "GPUS=$GPUS names ${#gpus[@]} GPUs for $count processes"

# A port that nobody listens at; below the range that outgoing connections take theirs from.
port=$((20000 + RANDOM % 12000))
while (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((20000 + RANDOM % 12000)); done

# What process I is run with: "environment" and "command".
describe() {
  environment=()
  if [[ ${#gpus[@]} -gt 0 ]]; then
    environment+=("CUDA_VISIBLE_DEVICES=${gpus[$1]}")
  else
    environment+=("JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}")
  fi
  if [[ -n ${DEVICES:-} ]]; then
    environment+=("XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES")
  fi
  command=("${arguments[@]}" "--coordinator=127.0.0.1:$port" "--num_processes=$count" "--process_id=$1")
}

arguments=("$@")
if [[ -n $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    describe "$i"
    printf '%q ' env "${environment[@]}" "${command[@]}"
    echo
  done
  exit 0
fi

prefix() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do printf '[%s] %s\n' "$1" "$line"; done
}

set -m # Each process in a group of its own: a terminal's Ctrl-C reaches this script alone, which sends it on, once.
pipes=$(mktemp -d)
pids=() readers=() signalled=
# shellcheck disable=SC2329 # The traps call it.
forward() {
  local pid
  signalled=1
  for pid in ${pids[@]+"${pids[@]}"}; do kill -s "$1" -- "-$pid" 2> /dev/null || true; done
}
# Whatever a process left behind goes first, so that nobody writes to the readers any more.
trap 'trap "" INT TERM HUP; forward KILL; wait ${readers[@]+"${readers[@]}"} || true; rm -rf "$pipes"' EXIT
trap 'forward INT' INT
trap 'forward TERM' TERM
trap 'forward TERM' HUP

for ((i = 0; i < count; i++)); do
  describe "$i"
  if ((i == 0)); then
    env "${environment[@]}" "${command[@]}" < /dev/null &
    pids+=($!)
  else
    mkfifo "$pipes/$i"
    prefix "$i" < "$pipes/$i" &
    readers+=($!)
    env "${environment[@]}" "${command[@]}" < /dev/null > "$pipes/$i" 2>&1 &
    pids+=($!)
  fi
done

worst=0 saved=
for pid in "${pids[@]}"; do
  while :; do
    status=0 signalled=
    wait "$pid" || status=$?
    ((status > 128)) && [[ -n $signalled ]] || break # A signal to us ended the waiting, not the process.
  done
  ((status != 75)) || saved=1
  ((status <= worst)) || worst=$status
done
exit "$((saved ? 75 : worst))"
