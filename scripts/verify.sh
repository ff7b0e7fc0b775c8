#!/usr/bin/env bash
# Sets up what is missing, then compares training with plain Transformers: scripts/verify.sh MODEL ... [options]
#
#   scripts/verify.sh llama qwen3 --fsdp 2                loss and every gradient of two model types
#   scripts/verify.sh --all-dense --fsdp 2 --compile      of every dense model type
#   scripts/verify.sh llama phi3 --fsdp 2 --tp 2          on 2 x 2 processes; how much of each model is split
#   scripts/verify.sh llama --pp 2 --schedule GPipe       on the 2 ranks of a pipeline, by this schedule
#   scripts/verify.sh llama gemma2 --cp 2                 on 2 ranks that share every sequence; packed documents, too
#   scripts/verify.sh llama --cp 4 --cp-ulysses 2         on 4, of which pairs exchange tokens for heads
#   scripts/verify.sh --help                              the options
#
# MODEL is a model type, a hub id or a folder; a relative folder starts at the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_environment.sh"

setup_environment run
cd "$REPOSITORY"
exec "$PYTHON" -m transformers_backend.verify "$@"
