#!/usr/bin/env bash
# The whole study on the embedded pair of toy models: train a base and a chat SAE, evaluate both on both models, print the
# table. CPU, a few minutes. Options go to `sae-transfer demo`; results go to results/demo below the working directory.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Install on the first call.
"$root/scripts/setup.sh"

# Run the study.
"$root/.venv/bin/sae-transfer" demo "$@"
