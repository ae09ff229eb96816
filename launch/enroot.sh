#!/usr/bin/env bash
# The container as a .sqsh file for Enroot and pyxis, or one recipe inside it on this machine.
#
#   launch/enroot.sh import [SOURCE]                    make minitron-nemo.sqsh; SOURCE defaults to the local Docker image
#   launch/enroot.sh run RECIPE CONFIG [key=value ...]  run a recipe; it starts its own ranks
#
# SOURCE is what `enroot import` takes: dockerd://minitron-nemo or docker://REGISTRY#IMAGE:TAG. Environment:
#   SQSH     the file; default minitron-nemo.sqsh in the repository
#   MOUNTS   more mounts, HOST:CONTAINER[,...]; the repository is mounted at its own path
set -euo pipefail

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
sqsh=${SQSH:-$root/minitron-nemo.sqsh}
usage="enroot.sh takes 'import [SOURCE]' or 'run RECIPE CONFIG [key=value ...]'"
(($# >= 1)) || refuse "$usage"
command=$1
shift

case $command in
  import)
    (($# <= 1)) || refuse "$usage"
    [[ ! -e $sqsh ]] || refuse "$sqsh exists: move it, or set SQSH to another name"
    exec enroot import --output "$sqsh" -- "${1:-dockerd://minitron-nemo}"
    ;;
  run)
    (($# >= 2)) || refuse "$usage"
    recipe=$1 config=$2
    shift 2
    [[ -f $root/recipes/$recipe.py && $recipe != */* ]] || refuse "unknown recipe '$recipe': there is no recipes/$recipe.py"
    [[ -f $root/conf/$config.yaml && $config != */* ]] || refuse "unknown config '$config': there is no conf/$config.yaml"
    [[ -f $sqsh ]] || refuse "there is no $sqsh: make it with 'launch/enroot.sh import', or set SQSH"
    start=(enroot start --rw "--mount=$root:$root")
    IFS=, read -ra mounts <<<"${MOUNTS:-}"
    for mount in ${mounts[@]+"${mounts[@]}"}; do start+=("--mount=$mount"); done
    exec "${start[@]}" "$sqsh" env "--chdir=$root" "PYTHONPATH=$root" \
      python "recipes/$recipe.py" --config-name "$config" "$@"
    ;;
  *) refuse "unknown command '$command': $usage" ;;
esac
