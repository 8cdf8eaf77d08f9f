#!/usr/bin/env bash
# Stop what scripts/slurm_up.sh started, by the pids it wrote, and remove its state.
set -uo pipefail
home="${SAE_TRANSFER_SLURM:-${TMPDIR:-/tmp}/sae-transfer-slurm}"
export SLURM_CONF="$home/slurm.conf"

# Where it never was, there is nothing to stop or to remove.
[[ -e $SLURM_CONF ]] || exit 0

# Jobs first, while there is someone to end them.
timeout 10 scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 40); do
    [[ -z "$(timeout 5 squeue --noheader 2>/dev/null)" ]] && break
    sleep 0.25
done

for daemon in slurmd slurmctld slurmdbd mariadbd munged; do
    file="$home/run/$daemon.pid"
    [[ -s $file ]] || continue
    pid="$(cat "$file")"
    kill "$pid" 2>/dev/null
    for _ in $(seq 50); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -9 "$pid" 2>/dev/null
    rm -f "$file"
done
rm -rf "$home"
