#!/usr/bin/env bash
# A Cloud TPU slice from nothing to a running training, with gcloud.
set -euo pipefail

usage() {
  cat << 'END'
launch/cloud_tpu.sh [--dry-run] create|install|log|stop|delete NAME
launch/cloud_tpu.sh [--dry-run] run|up NAME COMMAND...
    ZONE=us-central1-a TYPE=v5litepod-64 SPOT=1 launch/cloud_tpu.sh up pod \
      python -m resnet_jax.main --config=imagenet_50_pod --workdir=gs://BUCKET/pod --config.data.dir=...

create   asks for the slice as a queued resource, and waits until it is there (Ctrl-C ends the waiting, not the request)
install  copies this checkout's tracked files to all hosts, and installs them beside a Python 3.12
run      starts COMMAND on all hosts, detached; a second COMMAND beside it is refused
log      follows host 0's output until the run ends
up       all of these; after a preemption, delete and then up with the same COMMAND resumes
stop     lets the run save and end; run with the same COMMAND resumes
delete   deletes the slice and its request: it costs until then

ZONE=...     needed for all; PROJECT=... if not gcloud's own
TYPE=...     accelerator type, for create (v4-32, v5litepod-64, v5p-32, v6e-16); SPOT=1 for a preemptible slice
VERSION=...  its runtime, where this script does not know it (gcloud compute tpus versions list)
SETUP=...    a shell command that install ends with on all hosts: what mounts the data, say
--dry-run    print the commands, run nothing
END
}

fail() { echo "error: $*" >&2; exit 2; }

dry_run=
case ${1:-} in
  -h | --help) usage; exit 0 ;;
  --dry-run) dry_run=1; shift ;;
esac
action=${1:-} name=${2:-}
[[ $action =~ ^(create|install|run|log|up|stop|delete)$ ]] ||
  fail "'$action' is none of create, install, run, log, up, stop, delete"
[[ $name =~ ^[a-z][a-z0-9-]*$ ]] || fail "'$name' is no name: small letters, digits and -, as in pod-1"
shift 2
[[ $action =~ ^(run|up)$ || $# -eq 0 ]] || fail "$action takes no command"
[[ ! $action =~ ^(run|up)$ || ${1:--} != -* ]] || fail "no command: cloud_tpu.sh $action NAME COMMAND... (--help)"
[[ -n ${ZONE:-} ]] || fail "ZONE is not set, as in ZONE=us-central1-a"
where=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet)

# Prints a command, or runs it.
do_it() {
  if [[ -n $dry_run ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all() { do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

create() {
  local version=${VERSION:-} state=
  case ${TYPE:-} in
    '') fail "TYPE is not set, as in TYPE=v5litepod-64" ;;
    v4-*) version=${version:-tpu-ubuntu2204-base} ;;
    v5litepod-*) version=${version:-v2-alpha-tpuv5-lite} ;;
    v5p-*) version=${version:-v2-alpha-tpuv5} ;;
    v6e-*) version=${version:-v2-alpha-tpuv6e} ;;
    *) [[ -n $version ]] || fail "TYPE=$TYPE: say its runtime too, VERSION=..." ;;
  esac
  do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" "${where[@]}" \
    --accelerator-type="$TYPE" --runtime-version="$version" ${SPOT:+--spot}
  until [[ -n $dry_run || $state == ACTIVE ]]; do
    state=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)')
    case $state in
      ACTIVE) ;;
      FAILED | SUSPEND*) fail "the request is $state: cloud_tpu.sh delete $name, then create again (or elsewhere)" ;;
      *) echo "$name: $state"; sleep "${POLL:-30}" ;;
    esac
  done
}

install() {
  local archive=/tmp/resnet_jax.tar.gz root tree=HEAD # The archive's name here and there.
  root=$(dirname "$0")/..
  # A commit of the tracked files as they are now; nothing if they are as in HEAD.
  [[ -n $dry_run ]] || tree=$(git -C "$root" -c user.name=launch -c user.email=launch stash create)
  do_it git -C "$root" archive --format=tar.gz --output="$archive" "${tree:-HEAD}"
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name:$archive" "${where[@]}" --worker=all
  on_all "set -e; mkdir -p resnet_jax; tar -xzf $archive -C resnet_jax; cd resnet_jax
python3 -m pip install -q --user uv; PATH=~/.local/bin:\$PATH
uv venv -q --clear --python=3.12; uv pip install -q -c constraints.txt -e '.[tpu,gcs]'
${SETUP:-true}"
}

run() {
  local command
  command="$(printf '%q ' "$@")"
  # The lock is held as long as the run lives, and says whether it does.
  on_all "set -e; cd resnet_jax; . .venv/bin/activate
exec 9> ~/run.lock; flock -n 9 || { echo 'a run is going on here: cloud_tpu.sh stop $name, or log'; exit 1; }
setsid bash -c $(printf %q "$command; echo exit status \$?") > ~/run.log 2>&1 < /dev/null &"
}

log() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command="tail -n 100 -F ~/run.log & flock ~/run.lock true; sleep 1; kill \$!"
}

stop() { on_all "pkill -TERM -f '^[^ ]*python[^ ]* -m resnet_jax'"; }

delete() { do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force; }

if [[ $action == up ]]; then
  create
  install
  run "$@"
  log
  echo "the slice costs until: cloud_tpu.sh delete $name" >&2
else
  "$action" "$@"
fi
