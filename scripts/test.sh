#!/usr/bin/env bash
# Sets up what is missing, then runs the tests: scripts/test.sh [pytest arguments]
#
#   scripts/test.sh                                       all of them
#   scripts/test.sh tests/unit -k config                  some of them
#
# Paths are relative to the checkout. Tests that need a GPU are skipped where there is none. All of them are three runs
# of pytest: of tests that start several processes or measure time, and then two that share the others.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

setup_environment test
cd "$REPOSITORY"
# Many tests start several processes; with a thread pool each they would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if (($#)); then
    exec "$PYTHON" -m pytest "$@"
fi

beside=""
shared="$(mktemp -d)"
trap 'if [[ -n "$beside" ]]; then kill "$beside" 2>/dev/null; fi; rm -rf "$shared"' EXIT
status=0
"$PYTHON" -m pytest -m "not beside" || status=$?
mkdir "$shared/taken"
set -m # else what runs in the background ignores SIGINT, and so would the processes of its tests
# A cache of its own for compiled code: of one that is shared, a run may load what the other is still writing.
TORCHINDUCTOR_CACHE_DIR="$shared/compiled" \
    "$PYTHON" -m pytest tests/unit -m beside --share="$shared/taken" </dev/null >"$shared/log" 2>&1 &
beside=$!
set +m
"$PYTHON" -m pytest tests/unit -m beside --share="$shared/taken" || status=$?
wait "$beside" || status=$?
beside=""
cat "$shared/log"
exit "$status"
