#!/usr/bin/env bash
# The steps of a config's pipeline as Slurm jobs, each starting when the one before it has succeeded.
#
#   launch/pipeline.sh CONFIG [key=value ...]
#
# Run it on a login node, from the repository's root. The whole chain is checked before the first job is submitted.
# Environment:
#   NODES     nodes of the steps that train or run the model; default 1. The others take one
#   STEPS     only the steps of these recipes, such as STEPS="prune distill"; default: every step
#   SBATCH    options for every job, such as SBATCH="--account=me --partition=h100"
#   PYTHON    the Python of this node that reads the config, when the jobs run in a container; default that of VENV
# and those of slurm.sbatch: CONTAINER_IMAGE, CONTAINER_MOUNTS, VENV.
set -euo pipefail

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

split() { # LINE: its fields, the empty ones too, as the array `fields`
  local rest=$1$'\t'
  fields=()
  while [[ -n $rest ]]; do
    fields+=("${rest%%$'\t'*}")
    rest=${rest#*$'\t'}
  done
}

is_in() { # WORD ITEM...
  local word=$1 item
  shift
  for item in "$@"; do [[ $item != "$word" ]] || return 0; done
  return 1
}

job_name() { # LABEL
  local LC_ALL=C name=$config-$1
  printf '%s' "${name//[^A-Za-z0-9_.-]/-}"
}

(($# >= 1)) || refuse "pipeline.sh needs a CONFIG: launch/pipeline.sh llama31_width"
config=$1
shift
[[ -f launch/slurm.sbatch ]] || refuse "there is no launch/slurm.sbatch here: run it from the repository's root"
[[ -f conf/$config.yaml && $config != */* ]] || refuse "unknown config '$config': there is no conf/$config.yaml"
[[ ${NODES:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NODES=$NODES: a whole number of at least 1"
command -v sbatch >/dev/null || refuse "there is no sbatch here: run it on a Slurm login node"
read -ra wanted <<<"${STEPS:-}"
read -ra options <<<"${SBATCH:-}"

python=${PYTHON:-${VENV:-.venv}/bin/python}
command -v -- "$python" >/dev/null ||
  refuse "$python does not run here: the config is read on this node; make .venv, or set VENV or PYTHON"
notes=$(mktemp)
trap 'rm -f -- "$notes"' EXIT
# With the nodes that the jobs will get, so that what is checked is what will run.
ask=("$python" recipes/pipeline.py --config-name "$config" --jobs "trainer.num_nodes=${NODES:-1}" "$@")
jobs=$("${ask[@]}" 2>"$notes" </dev/null) || {
  reason=$(tail -n 1 -- "$notes")
  [[ $reason != "error: "* ]] || refuse "${reason#error: }"
  refuse "$python cannot read the config on this node (set VENV or PYTHON to one that can): $reason"
}
cat -- "$notes" >&2

lines=() recipes=()
while IFS= read -r line; do
  split "$line"
  ((${#fields[@]} >= 3)) && is_in "${fields[0]}" one ranks || refuse "recipes/pipeline.py --jobs printed '$line'"
  lines+=("$line") recipes+=("${fields[2]}")
done <<<"$jobs"
for recipe in ${wanted[@]+"${wanted[@]}"}; do
  is_in "$recipe" "${recipes[@]}" || refuse "STEPS: the pipeline of '$config' has no '$recipe', only ${recipes[*]}"
done

previous=
for line in "${lines[@]}"; do
  split "$line"
  processes=${fields[0]} label=${fields[1]} recipe=${fields[2]}
  [[ -z ${wanted[*]-} ]] || is_in "$recipe" "${wanted[@]}" || continue
  nodes=1
  [[ $processes == one ]] || nodes=${NODES:-1}
  job=(sbatch --parsable "--job-name=$(job_name "$label")" ${options[@]+"${options[@]}"} "--nodes=$nodes")
  # A job whose predecessor failed would wait for ever; let it go instead.
  [[ -z $previous ]] || job+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
  # What the step overrides comes after what was given here, as it does when the pipeline runs by itself.
  job+=(launch/slurm.sbatch "$recipe" "$config" "$@")
  ((${#fields[@]} == 3)) || job+=("${fields[@]:3}")
  previous=$("${job[@]}" </dev/null) || {
    printf 'error: sbatch refused %s; the jobs above it are in the queue\n' "$label" >&2
    exit 1
  }
  previous=${previous%%;*} # with several clusters: JOB;CLUSTER
  printf '%-40s job %s\n' "$label" "$previous"
done
