#!/usr/bin/env bash
# Lint, types and tests. Options go to pytest: `scripts/test.sh -m gpu`, `scripts/test.sh tests/report -k latex`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Install on the first call.
scripts/setup.sh

# Lint.
.venv/bin/ruff check .

# Layout of the code.
.venv/bin/ruff format --check .

# Types.
.venv/bin/python -m pyright

# One thread in each of several processes is faster than several threads in one.
export OMP_NUM_THREADS=1

# Tests. Last, so that the output ends with pytest's summary.
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# In the order of names: by number of tests, files of one long test would run last, and alone.
.venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# By themselves, since they watch the time that real jobs take.
.venv/bin/python -m pytest -m slurm
