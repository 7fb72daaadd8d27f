#!/usr/bin/env bash
# A real SLURM on this machine, for development and tests: two nodes, no accounting.
#
#   eval "$(slurm/dev_cluster.sh up)"     # now sbatch, squeue and launcher=slurm speak to it
#   slurm/dev_cluster.sh status
#   slurm/dev_cluster.sh down
#
# A second word names its folder (configuration, key, logs, process ids), else it is a fixed one in
# TMPDIR. It needs Debian's packages slurm-wlm and munge but not root, and leaves any other SLURM of
# this machine alone. Both nodes are this machine; CPUS=N says how many cores each claims to have.
# Without GPUs each claims eight, so that SLURM accepts a request for them.
set -euo pipefail

usage() {
    sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" >&2
    exit 2
}
[ $# -ge 1 ] && [ $# -le 2 ] || usage
folder=${2:-${TMPDIR:-/tmp}/routerlab-slurm-$(id -u)}
[[ $folder = /* ]] || folder=$PWD/$folder
export SLURM_CONF=$folder/slurm.conf
export PATH=$PATH:/usr/sbin:/sbin
daemons=(munged slurmctld node1 node2)

check_installed() {
    local missing=()
    command -v munged >/dev/null || missing+=(munge)
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
    [ ${#missing[@]} = 0 ] && return
    echo "error: not installed: ${missing[*]} (as root: apt-get install ${missing[*]})" >&2
    exit 1
}

alive() { # whether a daemon of ours runs
    [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null
}

all_alive() {
    local name
    for name in "${daemons[@]}"; do alive "$name" || return 1; done
    [ -z "$(sinfo -h -o %T 2>&1 | grep -Ev '^(idle|mixed|allocated|completing)$')" ]
}

start() { # NAME COMMAND...: a daemon that outlives the shell that asked for it
    local name=$1
    shift
    setsid nohup "$@" >>"$folder/$name.out" 2>&1 </dev/null 9>&- &
    echo $! >"$folder/$name.pid"
}

free_ports() { # the first of three ports in a row that nobody listens to
    local first port free
    for _ in $(seq 100); do
        first=$((20000 + RANDOM % 12000)) free=yes
        for port in "$first" $((first + 1)) $((first + 2)); do
            (: >"/dev/tcp/127.0.0.1/$port") 2>/dev/null && free=no
        done
        [ $free = no ] || break
    done
    echo "$first"
}

write_config() {
    local port cpus memory gpus
    port=$(free_ports)
    cpus=${CPUS:-$(nproc)}
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    gpus=$(find /dev -maxdepth 1 -name 'nvidia[0-9]*' 2>/dev/null | wc -l)
    if [ "$gpus" -gt 0 ]; then
        echo "Name=gpu File=/dev/nvidia[0-$((gpus - 1))]" >"$folder/gres.conf"
    else
        gpus=8
        for i in $(seq 0 7); do : >"$folder/gpu$i"; done
        echo "Name=gpu File=$folder/gpu[0-7]" >"$folder/gres.conf"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=routerlab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
# A requeued job waits until its credential has expired: 5 seconds here, 2 minutes by default.
AuthInfo=socket=$folder/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.daemon
SlurmdPidFile=$folder/%n.daemon
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=5,batch_sched_delay=0
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobRequeue=1
KillWait=5
GresTypes=gpu
NodeName=node[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=$cpus RealMemory=$memory Gres=gpu:$gpus State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

up() {
    check_installed
    if [ ${#folder} -gt 80 ]; then
        echo "error: $folder: too long a name for the socket inside it" >&2
        exit 1
    fi
    mkdir -p "$folder"
    chmod 700 "$folder"
    exec 9>"$folder/.lock"
    flock 9 # two calls at once bring up one
    if all_alive; then
        echo "export SLURM_CONF=$SLURM_CONF"
        return
    fi
    take_down
    rm -rf "$folder"/state "$folder"/spool-* "$folder"/*.log "$folder"/*.out
    mkdir "$folder/state"
    [ -s "$folder/munge.key" ] || (umask 377 && head -c 1024 /dev/urandom >"$folder/munge.key")
    write_config
    start munged munged --foreground --force --key-file="$folder/munge.key" \
        --socket="$folder/munge.sock" --pid-file="$folder/munged.daemon" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    for _ in $(seq 50); do
        [ -S "$folder/munge.sock" ] && break
        sleep 0.1
    done
    start slurmctld slurmctld -D -f "$SLURM_CONF"
    start node1 slurmd -D -N node1 -f "$SLURM_CONF"
    start node2 slurmd -D -N node2 -f "$SLURM_CONF"
    for _ in $(seq 150); do
        if all_alive; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    echo "error: SLURM did not come up; its logs are in $folder:" >&2
    tail -q -n 3 "$folder"/*.log "$folder"/*.out >&2 || true
    take_down
    exit 1
}

take_down() { # ends the jobs, then the daemons
    local name
    if alive slurmctld && alive munged; then
        timeout 5 scancel --user="$(id -un)" --full --signal=KILL 2>/dev/null || true
        timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
        for _ in $(seq 80); do
            [ -n "$(timeout 5 squeue -h 2>/dev/null)" ] || break
            sleep 0.1
        done
    fi
    signal_all TERM || true
    for _ in $(seq 50); do
        signal_all 0 || break
        sleep 0.1
    done
    signal_all KILL || true
    for name in "${daemons[@]}"; do rm -f "$folder/$name.pid"; done
}

signal_all() { # fails if none of our daemons runs
    local name some=1
    for name in "${daemons[@]}"; do
        alive "$name" && kill "-$1" "$(cat "$folder/$name.pid")" 2>/dev/null && some=0
    done
    return $some
}

status() {
    if ! all_alive; then
        echo "down ($folder)"
        exit 1
    fi
    echo "up ($folder)"
    sinfo
    squeue
}

case $1 in
    up) up ;;
    down) take_down ;;
    status) status ;;
    *) usage ;;
esac
