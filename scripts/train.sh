#!/usr/bin/env bash
# Sets up what is missing, then trains: scripts/train.sh [CONFIG.toml] [--section.key value ...]
#
#   scripts/train.sh                                      the default: a small model on text that is already here
#   scripts/train.sh train_configs/qwen3_0_6b.toml        a recipe
#   scripts/train.sh my.toml --training.steps 10          a recipe, with keys changed
#   scripts/train.sh --help                               every key with its type, default and meaning
#
# CONFIG.toml is looked up from where you are; other relative paths start at the checkout, as in the recipes.
#
# How many processes, by environment variables (they become options of transformers_backend/launch.py, as torchrun's):
#   NPROC          processes on this node; default: one a CUDA GPU, or else 2 (1 on a single core)
#   NNODES         nodes, a number or a range such as 2:4; default 1
#   NODE_RANK      this node's number; where it is unset, the rendezvous hands numbers out
#   RDZV_ENDPOINT  host:port of one of the nodes, the same on all; needed with several nodes
#   RDZV_ID        name of this run, the same on all nodes; default "transformers-backend"
#   RDZV_BACKEND   default "c10d"
#   RDZV_CONF      settings of the rendezvous, e.g. join_timeout=600,last_call_timeout=30 (docs/faults.md)
#   LOCAL_ADDR     this node's address, where its host name does not lead the other nodes to it
#   MAX_RESTARTS   how often a failed group of processes is started again; default 0
#   PYTHON         the interpreter to start from; default python3 (see setup_environment.sh)
#
# Where processes were already started by something else, torchrun is left out and this becomes one of them: with RANK
# and WORLD_SIZE set (torchrun, `accelerate launch --no_python scripts/train.sh`, mpirun wrappers), and under `srun`
# with several tasks, whose SLURM variables are translated here.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

main() {
    local from="$PWD" config
    setup_environment run
    cd "$REPOSITORY"
    if (($# > 0)) && [[ "$1" != -* ]]; then
        config="$1"
        shift
        if [[ "$config" != /* && -e "$from/$config" ]]; then config="$from/$config"; fi
        set -- "$config" "$@"
    fi

    translate_slurm
    if asks_for_help "$@" || [[ -n "${RANK:-}" && -n "${WORLD_SIZE:-}" ]]; then
        exec "$PYTHON" -m transformers_backend.train "$@"
    fi
    launch "$@"
}

asks_for_help() {
    local argument
    for argument in "$@"; do
        if [[ "$argument" == --help || "$argument" == -h ]]; then return 0; fi
    done
    return 1
}

# Several tasks of one srun step: the same variables that torchrun would set. The number of tasks in the *step* tells
# such a task from a batch script or an interactive shell, which carry the job's SLURM_NTASKS as well.
translate_slurm() {
    local tasks="${SLURM_STEP_NUM_TASKS:-}"
    if [[ -z "$tasks" && -z "${SLURM_JOB_ID:-}" ]]; then tasks="${SLURM_NTASKS:-}"; fi
    if [[ -n "${RANK:-}" || -z "${SLURM_PROCID:-}" ]] || ((${tasks:-1} <= 1)); then return; fi
    export RANK="$SLURM_PROCID" WORLD_SIZE="$tasks" LOCAL_RANK="${SLURM_LOCALID:-0}"
    export MASTER_ADDR="${MASTER_ADDR:-$(first_slurm_host)}"
    # Every task must come to the same port, and two steps or jobs on one node to different ones.
    export MASTER_PORT="${MASTER_PORT:-$((20000 + (${SLURM_JOB_ID:-0} * 7 + ${SLURM_STEP_ID:-0}) % 10000))}"
    if [[ -z "${OMP_NUM_THREADS:-}" && -n "${SLURM_CPUS_PER_TASK:-}" ]]; then
        export OMP_NUM_THREADS="$SLURM_CPUS_PER_TASK"
    fi
}

first_slurm_host() {
    local hosts="${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-localhost}}" first
    if command -v scontrol >/dev/null; then
        first="$(scontrol show hostnames "$hosts")"
        echo "${first%%$'\n'*}"
    elif [[ "${hosts%%,*}" == *\[* ]]; then # node[03-07,12]: inside a container there may be no scontrol
        first="${hosts#*\[}"
        echo "${hosts%%\[*}${first%%[],-]*}"
    else
        echo "${hosts%%,*}"
    fi
}

launch() {
    local processes="${NPROC:-}" nodes="${NNODES:-1}" cores options
    # Without these two, because nproc answers OMP_NUM_THREADS where that is set.
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
    if [[ -z "$processes" ]]; then
        processes="$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')"
        if ((processes == 0)); then processes=$((cores < 2 ? 1 : 2)); fi
    fi
    # torchrun would give each process one thread.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}"

    options=(--nproc-per-node "$processes" --nnodes "$nodes" --max-restarts "${MAX_RESTARTS:-0}")
    if [[ -n "${RDZV_ENDPOINT:-}" ]]; then
        options+=(--rdzv-backend "${RDZV_BACKEND:-c10d}" --rdzv-endpoint "$RDZV_ENDPOINT")
        options+=(--rdzv-id "${RDZV_ID:-transformers-backend}")
        if [[ -n "${RDZV_CONF:-}" ]]; then options+=(--rdzv-conf "$RDZV_CONF"); fi
        if [[ -n "${NODE_RANK:-}" ]]; then options+=(--node-rank "$NODE_RANK"); fi
        if [[ -n "${LOCAL_ADDR:-}" ]]; then options+=(--local-addr "$LOCAL_ADDR"); fi
    elif [[ "$nodes" == 1 ]]; then
        options+=(--standalone)
    else
        echo "train.sh: NNODES = $nodes needs RDZV_ENDPOINT: set it to host:port of one of the nodes, on all of them." >&2
        exit 2
    fi
    exec "$PYTHON" -m transformers_backend.launch "${options[@]}" -m transformers_backend.train "$@"
}

main "$@"
