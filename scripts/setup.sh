#!/usr/bin/env bash
# Make .venv in this checkout, with everything at the tested versions and the package itself editable. Called by demo.sh and
# test.sh; does nothing when it is all there already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What an environment must match to be taken as it is: the lock, the package's metadata, and where the checkout lies (its
# console scripts name their interpreter by its full path). Written last, so that an interrupted installation is done again.
stamp=.venv/sae-transfer.stamp
wanted="$(pwd -P; cksum requirements.lock pyproject.toml)"
if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]] && .venv/bin/python -c "" 2>/dev/null; then
    exit 0
fi

is_recent() { "$1" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }

# Make an environment where there is none that runs; what is left of one whose Python has gone is cleared. Debian and Ubuntu
# ship Python without ensurepip, which venv needs.
if ! .venv/bin/python -c "" 2>/dev/null; then
    python="" without_venv=""
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_recent "$candidate"; then
            if "$candidate" -c "import ensurepip, venv" 2>/dev/null; then
                python=$candidate
                break
            fi
            without_venv=${without_venv:-$candidate}
        fi
    done
    if [[ -z $python && -n $without_venv ]]; then
        echo "$without_venv cannot make virtual environments: its module ensurepip is not installed." >&2
        echo "  try, as root: apt-get install ${without_venv}-venv" >&2
        exit 2
    elif [[ -z $python ]]; then
        echo "sae-transfer needs Python 3.11 or newer; none of python3, python3.13, python3.12, python3.11 is." >&2
        echo "  try, as root: apt-get install python3 python3-venv   (3.11 or newer in Debian 12 and Ubuntu 24.04)" >&2
        exit 2
    fi
    echo "Making .venv with $("$python" --version)."
    "$python" -m venv --clear .venv
elif ! is_recent .venv/bin/python; then
    echo ".venv has $(.venv/bin/python --version); sae-transfer needs Python 3.11 or newer." >&2
    echo "  try: move .venv away, and run this again" >&2
    exit 2
fi

# An environment made by another tool, or whose making was interrupted, may lack pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip

# Install the locked versions, then the package on top of them. setuptools is in the lock, so that building the package
# needs nothing else.
echo "Installing into .venv: a few minutes, and 2 GB (more where torch comes with CUDA)."
rm -f "$stamp"
.venv/bin/python -m pip install --disable-pip-version-check -r requirements.lock
.venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
echo "$wanted" >"$stamp"
