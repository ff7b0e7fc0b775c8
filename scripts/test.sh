#!/usr/bin/env bash
# Sets up what is missing, then runs the tests: scripts/test.sh [pytest arguments]
#
#   scripts/test.sh                                       all of them
#   scripts/test.sh tests/unit -k config                  some of them
#
# Paths are relative to the checkout. Tests that need a GPU are skipped where there is none.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

setup_environment test
cd "$REPOSITORY"
# Many tests start several processes; with a thread pool each they would fight for the cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest "$@"
