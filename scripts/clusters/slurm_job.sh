# The part of a Slurm batch script that is the same for every job. scripts/slurm.py writes #SBATCH lines and the
# variables below in front of it, and the whole to <job.dump_folder>/slurm/job.sh; sbatch runs that on the first node.
#
#   REPOSITORY       the checkout, on a file system that all nodes share; so is the next
#   RUN_FOLDER       job.dump_folder
#   STEPS            training.steps
#   LAUNCHER         torchrun: a task a node, in which torchrun starts the processes; srun: a task a process
#   GPUS_PER_NODE    processes on a node
#   MAX_REQUEUES     how often the job may come back after it was stopped
#   SRUN_OPTIONS     more options of srun, an array
#
# Slurm sends USR1 to this script some time before the limit, and TERM to the training processes when the job is to
# make room for another. Training then finishes its step, saves and exits with 0, and the job is put back into the
# queue, from where it goes on from its checkpoint. What tells a stopped run from a complete one is the signal, or,
# where only the training processes got it, that this start wrote fewer steps to metrics.jsonl than were wanted. Whatever
# happens is noted in slurm/events.jsonl, which `scripts/slurm.py --status` reads.
set -uo pipefail # no -e: exit statuses are looked at below

restart="${SLURM_RESTART_COUNT:-0}"
step_process="" # the srun that trains
signal=""       # the first one that asked this job to stop
forwarded=no
interrupted=no

main() {
    local status=0
    trap 'ask_to_stop USR1' USR1
    trap 'ask_to_stop TERM' TERM
    touch "$RUN_FOLDER/slurm/started" # what metrics.jsonl is compared with: it may be that of an earlier run
    echo "=== job $SLURM_JOB_ID started, restart $restart, nodes $SLURM_JOB_NODELIST, $(date)"
    record started
    prepare || status=$?
    if ((status == 0)) && [[ -z "$signal" ]]; then train || status=$?; fi
    record ended "\"exit_code\": $status, \"signal\": \"$signal\""

    if ((status == 0)) && is_finished; then exit 0; fi
    if ((status != 0)) && [[ -z "$signal" ]]; then
        echo "=== training failed with exit status $status; look above for the reason"
        exit "$status"
    fi
    echo "=== stopped${signal:+ by $signal} at step $(last_step) of $STEPS, exit status $status"
    requeue || exit "$status"
}

record() { # EVENT [more members of the JSON object]
    printf '{"event": "%s", "job_id": "%s", "restart": %d, "time": %d%s}\n' \
        "$1" "$SLURM_JOB_ID" "$restart" "$(date +%s)" "${2:+, $2}" >>"$RUN_FOLDER/slurm/events.jsonl"
}

# What the first node does before all of them train: one environment for all, and the address where they meet.
prepare() {
    local hosts
    cd "$REPOSITORY" || return
    if [[ " ${SRUN_OPTIONS[*]-} " != *" --container-image="* ]]; then # a container brings its own Python
        source "$REPOSITORY/scripts/setup_environment.sh"
        setup_environment run || return
        export PYTHON
    fi
    hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" || return
    export MASTER_ADDR="${hosts%%$'\n'*}"
    export MASTER_PORT="$((20000 + (SLURM_JOB_ID * 7 + restart) % 10000))" # another than that of the run before
}

train() {
    local config="$RUN_FOLDER/slurm/config.toml" status
    local options=(--nodes="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 ${SRUN_OPTIONS[@]+"${SRUN_OPTIONS[@]}"})
    if [[ "$LAUNCHER" == torchrun ]]; then
        export NNODES="$SLURM_JOB_NUM_NODES" NPROC="$GPUS_PER_NODE" RDZV_ENDPOINT="$MASTER_ADDR:$MASTER_PORT"
        export RDZV_ID="slurm-$SLURM_JOB_ID-$restart"
        # Without SLURM_PROCID train.sh takes the task for a node on which torchrun is to be started.
        srun "${options[@]}" --ntasks-per-node=1 env -u SLURM_PROCID "$REPOSITORY/scripts/train.sh" "$config" &
    else
        srun "${options[@]}" --ntasks-per-node="$GPUS_PER_NODE" "$REPOSITORY/scripts/train.sh" "$config" &
    fi
    step_process=$!
    forward
    while # `wait` also returns when a trap has run; the status counts only where none did
        interrupted=no
        wait "$step_process"
        status=$?
        [[ "$interrupted" == yes ]]
    do :; done
    return "$status"
}

ask_to_stop() {
    interrupted=yes
    if [[ -z "$signal" ]]; then echo "=== $1: training is asked to finish its step, save and exit"; fi
    signal="${signal:-$1}"
    forward
}

# Once, and as USR1, which srun passes on to every task. It would answer TERM by killing them.
forward() {
    if [[ -n "$signal" && -n "$step_process" && "$forwarded" == no ]]; then
        forwarded=yes
        kill -USR1 "$step_process" 2>/dev/null
    fi
}

last_step() {
    local line=""
    if [[ -f "$RUN_FOLDER/metrics.jsonl" ]]; then line="$(tail -n 1 "$RUN_FOLDER/metrics.jsonl")"; fi
    if [[ "$line" =~ \"step\":\ *([0-9]+) ]]; then echo "${BASH_REMATCH[1]}"; else echo 0; fi
}

is_finished() { # of a start that ended with 0
    if [[ "$RUN_FOLDER/metrics.jsonl" -nt "$RUN_FOLDER/slurm/started" ]]; then
        (($(last_step) >= STEPS))
    else # it trained no step: asked to stop before its first, or there was nothing to do
        [[ -z "$signal" ]]
    fi
}

# Back into the queue, under the same job id. A job that its user has cancelled is not RUNNING any more and stays away.
requeue() {
    local state
    state="$(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --format=%T)"
    if [[ "$state" != RUNNING ]]; then
        echo "=== not requeued: Slurm says ${state:-nothing} of this job"
    elif ((restart >= MAX_REQUEUES)); then
        echo "=== not requeued: it has been $restart times, and --max-requeues is $MAX_REQUEUES"
    else
        record requeued
        echo "=== requeued: it goes on from its last checkpoint"
        scontrol requeue "$SLURM_JOB_ID" && return 0
        record requeue_failed
        return 1
    fi
    return 1
}

main
