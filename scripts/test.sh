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

# Tests. Last, so that the output ends with pytest's summary.
.venv/bin/python -m pytest "$@"
