#!/usr/bin/env bash
# The whole chain of one config as Slurm jobs, each starting when the one before it has succeeded.
#
#   launch/pipeline.sh CONFIG [key=value ...]
#
# Run it on a login node, from the repository's root. Environment:
#   NODES     nodes of the steps that train or run the model; default 1. The others take one
#   STEPS     recipes to run, in order, such as STEPS="prune distill"; default: those of the config's pipeline
#   SBATCH    options for every job, such as SBATCH="--account=me --partition=h100"
# and those of slurm.sbatch: CONTAINER_IMAGE, CONTAINER_MOUNTS, VENV.
set -euo pipefail

refuse() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

(($# >= 1)) || refuse "pipeline.sh needs a CONFIG: launch/pipeline.sh llama31_width"
config=$1
shift
[[ -f launch/slurm.sbatch ]] || refuse "there is no launch/slurm.sbatch here: run it from the repository's root"
[[ -f conf/$config.yaml && $config != */* ]] || refuse "unknown config '$config': there is no conf/$config.yaml"
[[ ${NODES:-1} =~ ^[1-9][0-9]*$ ]] || refuse "NODES=$NODES: a whole number of at least 1"
command -v sbatch >/dev/null || refuse "there is no sbatch here: run it on a Slurm login node"

if grep -q '^ *overrides:' "conf/$config.yaml"; then
  refuse "the steps of '$config' carry overrides: run it in one job, sbatch launch/slurm.sbatch pipeline $config"
fi
# The steps that the config lists, or the default of config.py.
chain=$(sed -n 's/^ *- recipe: *\([a-z_]*\).*/\1/p' "conf/$config.yaml" | tr '\n' ' ')
: "${chain:=import_hf prepare_data correct_teacher estimate_importance prune distill evaluate export_hf}"
read -ra steps <<<"${STEPS:-$chain}"
read -ra options <<<"${SBATCH:-}"

previous=
for recipe in "${steps[@]}"; do
  [[ -f recipes/$recipe.py && $recipe != */* ]] || refuse "unknown recipe '$recipe': there is no recipes/$recipe.py"
done
for recipe in "${steps[@]}"; do
  job=(sbatch --parsable "--job-name=$config-$recipe" ${options[@]+"${options[@]}"})
  case $recipe in
    correct_teacher | estimate_importance | distill | evaluate) job+=("--nodes=${NODES:-1}") ;;
    *) job+=(--nodes=1) ;;
  esac
  # A job whose predecessor failed would wait for ever; let it go instead.
  [[ -z $previous ]] || job+=("--dependency=afterok:$previous" --kill-on-invalid-dep=yes)
  previous=$("${job[@]}" launch/slurm.sbatch "$recipe" "$config" "$@")
  previous=${previous%%;*} # with several clusters: JOB;CLUSTER
  printf '%-20s job %s\n' "$recipe" "$previous"
done
