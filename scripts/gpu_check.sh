#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go within 8 minutes: scripts/gpu_check.sh [FOLDER]
#
#   scripts/gpu_check.sh                                  results in docs/benchmarks
#   scripts/gpu_check.sh /tmp/results                     results elsewhere
#
# It runs the GPU tests, the benchmarks of training (the shapes of Llama-3.2-1B and 3B), of each kernel and of context
# parallelism, and the default job shortened, and writes FOLDER/<date>_<device>_torch<version>.md, .json and, with
# matplotlib, .png. Contenders whose package (accelerate, liger_kernel, torchtitan) is missing are left out. Nothing is downloaded where torch and Transformers are installed; pytest,
# accelerate and datasets may be missing. A part that fails or takes too long is reported and the others still run.
#
# Exit status: 0 all passed, 1 a part failed, 2 there is no CUDA device.
set -uo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

main() {
    local from="$PWD"
    setup_environment run || exit 1
    if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "gpu_check: torch finds no CUDA device here; run it on a machine that has one." >&2
        exit 2
    fi
    FOLDER="${1:-$REPOSITORY/docs/benchmarks}"
    if [[ "$FOLDER" != /* ]]; then FOLDER="$from/$FOLDER"; fi
    WORK="$(mktemp -d)"
    trap 'rm -rf "$WORK"' EXIT
    cd "$REPOSITORY" || exit 1

    # Together these limits stay below 8 minutes. A benchmark of training ends by itself a little before its limit.
    if "$PYTHON" -c 'import pytest' 2>/dev/null; then
        run_part tests 100 "$PYTHON" -m pytest tests/gpu
    else
        run_part tests 100 "$PYTHON" -m unittest discover --verbose --start-directory tests/gpu
    fi
    local plot=()
    if "$PYTHON" -c 'import matplotlib' 2>/dev/null; then plot=(--plot "$WORK/benchmark_1b.png"); fi
    run_part benchmark_1b 170 "$PYTHON" scripts/benchmark.py --preset llama3.2-1b --steps 5 --blocks 4 --limit 150 \
        --contenders ours,hf_trainer,torchtitan,bare,ours_kernels,hf_trainer_liger,ours_eager_kernels,ours_eager \
        --json "$WORK/benchmark_1b.json" --markdown "$WORK/benchmark_1b.md" "${plot[@]}"
    run_part benchmark_3b 85 "$PYTHON" scripts/benchmark.py --preset llama3.2-3b --steps 3 --blocks 3 --limit 70 \
        --contenders ours,hf_trainer,torchtitan \
        --json "$WORK/benchmark_3b.json" --markdown "$WORK/benchmark_3b.md"
    run_part kernels 75 "$PYTHON" scripts/benchmark_kernels.py --context \
        --json "$WORK/kernels.json" --markdown "$WORK/kernels.md"
    run_part default_job 40 scripts/train.sh --training.steps 30 --job.dump_folder "$WORK/default_job"
    write_results
}

# run_part NAME SECONDS COMMAND...: its output goes to the terminal and to a file, its outcome to another.
run_part() {
    local name="$1" limit="$2" status start=$SECONDS
    shift 2
    echo "gpu_check: $name (at most $limit s)" >&2
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$WORK/$name.log" >&2
    status=${PIPESTATUS[0]}
    echo "$status $((SECONDS - start))" >"$WORK/$name.outcome"
    if ((status != 0)); then echo "gpu_check: $name failed (status $status; 124 means out of time)" >&2; fi
}

write_results() {
    mkdir -p "$FOLDER"
    "$PYTHON" - "$WORK" "$FOLDER" <<'CODE'
import datetime
import json
import re
import shutil
import sys
from pathlib import Path

import torch

work, folder = Path(sys.argv[1]), Path(sys.argv[2])
parts = {}
for name in ("tests", "benchmark_1b", "benchmark_3b", "kernels", "default_job"):
    status, seconds = map(int, (work / f"{name}.outcome").read_text().split())
    log = (work / f"{name}.log").read_text(errors="replace").splitlines()
    parts[name] = {"passed": status == 0, "status": status, "seconds": seconds, "last_lines": log[-8:]}
metrics = work / "default_job" / "metrics.jsonl"
job = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def measured(name):
    """What a part wrote, or None where it was stopped before."""
    file = work / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


results = {
    "device": torch.cuda.get_device_name(),
    "devices": torch.cuda.device_count(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "parts": parts,
    **{name: measured(name) for name in ("benchmark_1b", "benchmark_3b", "kernels")},
    "default_job": job,
}
slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
stem = folder / f"{datetime.date.today().isoformat()}_{slug}_torch{results['torch'].split('+')[0]}"
lines = [f"# {results['devices']} x {results['device']}, torch {results['torch']}, CUDA {results['cuda']}", ""]
lines += ["| part | outcome | seconds |", "| --- | --- | ---: |"]
for name, part in parts.items():
    outcome = "passed" if part["passed"] else f"failed (status {part['status']})"
    lines.append(f"| {name} | {outcome} | {part['seconds']} |")
picture = work / "benchmark_1b.png"
if picture.exists():
    shutil.copyfile(picture, f"{stem}.png")
    lines += ["", f"![Llama-3.2-1B]({stem.name}.png)"]
for name, title in (("benchmark_1b", "Llama-3.2-1B"), ("benchmark_3b", "Llama-3.2-3B"), ("kernels", "Kernels")):
    text = work / f"{name}.md"
    lines += ["", f"## {title}", "", text.read_text().rstrip() if text.exists() else "Unmeasured."]
if job:
    last = job[-1]
    lines += [
        "", "## Default job, shortened", "",
        f"Loss {job[0]['loss']:.3f} at step {job[0]['step']}, {last['loss']:.3f} at step {last['step']}; "
        f"{last['tokens_per_second']:,.0f} tokens/s, {last['peak_memory_gib']:.2f} GiB.",
    ]  # fmt: skip
for name, part in parts.items():
    if not part["passed"]:
        lines += ["", f"## {name}: how it ended", "", "```", *part["last_lines"], "```"]
Path(f"{stem}.md").write_text("\n".join(lines) + "\n")
Path(f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
print(f"gpu_check: {stem}.md and .json", file=sys.stderr)
sys.exit(not all(part["passed"] for part in parts.values()))
CODE
}

main "$@"
