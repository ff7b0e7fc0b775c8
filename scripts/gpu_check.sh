#!/usr/bin/env bash
# Everything that needs a CUDA device, in one go within 8 minutes: scripts/gpu_check.sh [FOLDER]
#
#   scripts/gpu_check.sh                                  results in docs/benchmarks
#   scripts/gpu_check.sh /tmp/results                     results elsewhere
#
# It runs the GPU tests, the benchmark on the shape of Llama-3.2-1B, and the default job shortened, and writes
# FOLDER/<date>_<device>.md and .json. Nothing is downloaded where torch and Transformers are installed; pytest,
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

    # Together these limits stay below 8 minutes.
    if "$PYTHON" -c 'import pytest' 2>/dev/null; then
        run_part tests 120 "$PYTHON" -m pytest tests/gpu
    else
        run_part tests 120 "$PYTHON" -m unittest discover --verbose --start-directory tests/gpu
    fi
    run_part benchmark 240 "$PYTHON" scripts/benchmark.py --preset llama3.2-1b --steps 8 --blocks 4 \
        --json "$WORK/benchmark.json" --markdown "$WORK/benchmark.md"
    run_part default_job 100 scripts/train.sh --training.steps 100 --job.dump_folder "$WORK/default_job"
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
import sys
from pathlib import Path

import torch

work, folder = Path(sys.argv[1]), Path(sys.argv[2])
parts = {}
for name in ("tests", "benchmark", "default_job"):
    status, seconds = map(int, (work / f"{name}.outcome").read_text().split())
    log = (work / f"{name}.log").read_text(errors="replace").splitlines()
    parts[name] = {"passed": status == 0, "status": status, "seconds": seconds, "last_lines": log[-8:]}
metrics = work / "default_job" / "metrics.jsonl"
job = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
benchmark = work / "benchmark.json"
results = {
    "device": torch.cuda.get_device_name(),
    "devices": torch.cuda.device_count(),
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "parts": parts,
    "benchmark": json.loads(benchmark.read_text()) if benchmark.exists() else None,
    "default_job": job,
}
slug = re.sub(r"[^a-z0-9]+", "-", results["device"].lower()).strip("-")
stem = folder / f"{datetime.date.today().isoformat()}_{slug}"
lines = [f"# {results['devices']} x {results['device']}, torch {results['torch']}, CUDA {results['cuda']}", ""]
lines += ["| part | outcome | seconds |", "| --- | --- | ---: |"]
for name, part in parts.items():
    outcome = "passed" if part["passed"] else f"failed (status {part['status']})"
    lines.append(f"| {name} | {outcome} | {part['seconds']} |")
if (work / "benchmark.md").exists():
    lines += ["", "## Benchmark", "", (work / "benchmark.md").read_text().rstrip()]
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
