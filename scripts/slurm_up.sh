#!/usr/bin/env bash
# A SLURM of one node on this machine, for tests: loopback only, as root, without systemd. State goes to $SAE_TRANSFER_SLURM
# (default: a directory below the temporary one). SLURM's packages are installed where they are missing (Debian, Ubuntu).
# With SAE_TRANSFER_SLURM_ACCOUNTING=1 it keeps accounts, in a MariaDB of its own, so that sacct answers; squeue then forgets
# a job within seconds of its end. Called again while it is up, it does nothing. Use it with the line it prints; stop it with
# scripts/slurm_down.sh.
set -euo pipefail
home="${SAE_TRANSFER_SLURM:-${TMPDIR:-/tmp}/sae-transfer-slurm}"
accounting="${SAE_TRANSFER_SLURM_ACCOUNTING:-0}"
export SLURM_CONF="$home/slurm.conf"
node="$(hostname -s)"

runs() { [[ -s "$home/run/$1.pid" ]] && kill -0 "$(cat "$home/run/$1.pid")" 2>/dev/null; }

if [[ $EUID -ne 0 ]]; then
    echo "A SLURM for tests needs root: its daemons start jobs as other users." >&2
    exit 2
fi

# Packages.
commands=(slurmctld slurmd sbatch munged)
packages=(slurmctld slurmd slurm-client munge)
if [[ $accounting == 1 ]]; then
    commands+=(slurmdbd mariadbd)
    packages+=(slurmdbd mariadb-server)
fi
if ! command -v "${commands[@]}" >/dev/null || (($(command -v "${commands[@]}" | wc -l) < ${#commands[@]})); then
    if ! command -v apt-get >/dev/null; then
        echo "SLURM is not installed, and there is no apt-get: it takes ${packages[*]}." >&2
        exit 2
    fi
    export DEBIAN_FRONTEND=noninteractive
    if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; }; then
        echo "SLURM cannot be installed: ${packages[*]}." >&2
        exit 2
    fi
fi

# Containers may not resolve their own name.
getent hosts "$node" >/dev/null || echo "127.0.0.1 $node" >>/etc/hosts

# Who keeps accounts.
if [[ $accounting == 1 ]]; then
    keeper="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=26819
AccountingStoragePass=$home/run/munge.sock
MinJobAge=2"
else
    keeper="AccountingStorageType=accounting_storage/none"
fi

# Two partitions: a job in `high` sends those in `low` back into the queue, after ten seconds to write a checkpoint. Memory and
# cores are counted, nothing is confined. Ports are unusual ones, so that a real SLURM is not met.
mkdir -p "$home"/{state,spool,log,run}
chmod 755 "$home"
cat >"$SLURM_CONF.new" <<CONF
ClusterName=sae-transfer-tests
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
# a job goes back into the queue only once its credential has expired
AuthInfo=socket=$home/run/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPort=26817
SlurmdPort=26818
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
$keeper
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
ReturnToService=2
InactiveLimit=0
KillWait=5
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(getconf _NPROCESSORS_ONLN) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo) State=UNKNOWN
PartitionName=low Nodes=$node Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=$node MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
mv "$SLURM_CONF.new" "$SLURM_CONF"

# Daemons: who is who (munge, with a key of its own), the accounts if they are kept, the controller, the node.
if ! runs munged; then
    [[ -s "$home/run/munge.key" ]] || (umask 077 && head -c 1024 /dev/urandom >"$home/run/munge.key")
    munged --force --key-file="$home/run/munge.key" --socket="$home/run/munge.sock" --pid-file="$home/run/munged.pid" \
        --log-file="$home/log/munged.log" --seed-file="$home/run/munge.seed"
fi
if [[ $accounting == 1 ]]; then
    if ! runs mariadbd; then
        [[ -d $home/database/mysql ]] || mariadb-install-db --no-defaults --user=root --skip-test-db \
            --auth-root-authentication-method=normal --datadir="$home/database" >"$home/log/mariadb-install.log" 2>&1
        setsid mariadbd --no-defaults --user=root --datadir="$home/database" --socket="$home/run/database.sock" \
            --port=26820 --bind-address=127.0.0.1 --pid-file="$home/run/mariadbd.pid" \
            --innodb-lock-wait-timeout=900 >"$home/log/mariadbd.log" 2>&1 &
        for _ in $(seq 100); do
            mariadb-admin --no-defaults --socket="$home/run/database.sock" ping >/dev/null 2>&1 && break
            sleep 0.1
        done
        mariadb --no-defaults --socket="$home/run/database.sock" --execute "create database if not exists accounts;
            create user if not exists slurm@'127.0.0.1' identified by 'tests'; grant all on accounts.* to slurm@'127.0.0.1';
            create user if not exists slurm@localhost identified by 'tests'; grant all on accounts.* to slurm@localhost;"
    fi
    (
        umask 077
        cat >"$home/slurmdbd.conf" <<CONF
AuthType=auth/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthInfo=$home/run/munge.sock
DbdHost=$node
DbdAddr=127.0.0.1
DbdPort=26819
SlurmUser=root
LogFile=$home/log/slurmdbd.log
PidFile=$home/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=26820
StorageUser=slurm
StoragePass=tests
StorageLoc=accounts
CONF
    )
    runs slurmdbd || slurmdbd
    for _ in $(seq 100); do
        sacctmgr --noheader list cluster >/dev/null 2>&1 && break
        sleep 0.1
    done
    sacctmgr --noheader list cluster format=cluster%40 | grep -qw sae-transfer-tests ||
        sacctmgr --immediate add cluster sae-transfer-tests >/dev/null
fi
runs slurmctld || slurmctld -f "$SLURM_CONF"
runs slurmd || slurmd -f "$SLURM_CONF" -N "$node"

# Wait until the node takes jobs; one that a former controller knew may come back as down.
for _ in $(seq 150); do
    state="$(sinfo --noheader --partition=low --format=%T 2>/dev/null || true)"
    case "$state" in
        idle | mixed | allocated | completing)
            echo "export SLURM_CONF=$SLURM_CONF"
            exit 0
            ;;
        down* | drain* | unknown*) scontrol update NodeName="$node" State=RESUME 2>/dev/null || true ;;
    esac
    sleep 0.2
done
echo "SLURM did not come up; its logs are in $home/log:" >&2
tail -n 5 "$home"/log/*.log >&2
exit 1
