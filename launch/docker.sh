#!/usr/bin/env bash
# One recipe on this machine inside Docker; the recipe starts its own ranks. Builds the image when there is none.
#
#   launch/docker.sh RECIPE CONFIG [key=value ...]
#
# Environment:
#   IMAGE    image to run; default minitron-nemo, built from the Dockerfile
#   GPUS     what --gpus takes; default all; none for a machine without
#   MOUNTS   more mounts, HOST:CONTAINER[,...]; the repository is mounted at /workspace, and ~/.cache/huggingface
set -euo pipefail

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

(($# >= 2)) || refuse "docker.sh needs RECIPE and CONFIG: launch/docker.sh distill llama31_width"
recipe=$1 config=$2
shift 2
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
[[ -f $root/recipes/$recipe.py && $recipe != */* ]] || refuse "unknown recipe '$recipe': there is no recipes/$recipe.py"
[[ -f $root/conf/$config.yaml && $config != */* ]] || refuse "unknown config '$config': there is no conf/$config.yaml"
command -v docker >/dev/null || refuse "docker is not installed"

image=${IMAGE:-minitron-nemo}
if [[ -z ${IMAGE:-} ]] && ! docker image inspect "$image" >/dev/null 2>&1; then
  docker build --tag "$image" "$root"
fi

mkdir -p -- "$HOME/.cache/huggingface"
# Ranks talk through shared memory, and pinned buffers need unlimited locked memory.
run=(docker run --rm --init --ipc=host --ulimit memlock=-1 --ulimit stack=67108864)
[[ ${GPUS:-all} == none ]] || run+=("--gpus=${GPUS:-all}")
# As the caller, so that results are not root's.
run+=("--user=$(id -u):$(id -g)" --env HOME=/tmp --env HF_HOME=/huggingface --env HF_TOKEN)
run+=(--env PYTHONPATH=/workspace)
run+=("--volume=$root:/workspace" "--volume=$HOME/.cache/huggingface:/huggingface" --workdir=/workspace)
IFS=, read -ra mounts <<<"${MOUNTS:-}"
for mount in ${mounts[@]+"${mounts[@]}"}; do run+=("--volume=$mount"); done
[[ ! -t 0 || ! -t 1 ]] || run+=(--interactive --tty)
exec "${run[@]}" "$image" python "recipes/$recipe.py" --config-name "$config" "$@"
