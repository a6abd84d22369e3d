#!/usr/bin/env bash
# cluster.sh: a real Slurm cluster (slurmctld, munged, N slurmd) on one machine.
#
# Every "machine" of the cluster is a set of Linux namespaces (net, pid, mount,
# uts, ipc) with its own host name, IP address, /dev/shm and process table, on a
# bridge that lives inside the head's network namespace. The root namespace gets
# no interface, no address, no process with a global name and no file outside
# the state directory, so two boxes can run side by side (two SLURM_BOX_STATE).
#
#   cluster.sh install            only install what is missing
#   cluster.sh up [N]             install what is missing, bring N nodes up (default 3)
#   cluster.sh down               stop everything that "up" started, remove the state
#   cluster.sh status             what is up (exit 0 all up, 1 broken, 3 down)
#   cluster.sh env                shell lines that put sbatch, srun, ... on PATH
#   cluster.sh exec CMD...        run CMD on the head (the submit host)
#   cluster.sh on NODE CMD...     run CMD on one node
#   cluster.sh kill-node NODE     power cut: cable dead, then every process of the node SIGKILLed
#   cluster.sh boot-node NODE     power it on again
#   cluster.sh kill-slurmd NODE   SIGKILL slurmd only (its slurmstepds live on)
#   cluster.sh start-slurmd NODE  start slurmd again on a node that is on
#   cluster.sh net-down NODE / net-up NODE   cut / restore the node's cable
#   cluster.sh kill-ctld [SIG] / start-ctld   stop slurmctld / start it again from its state
#   cluster.sh logs               print the ends of the daemons' logs
#
# Settings (environment, read at "up"):
#   SLURM_BOX_STATE         state directory          (/var/tmp/slurm-box)
#   SLURM_BOX_CPUS          CPUs each node claims    (8, even)
#   SLURM_BOX_MEM_MB        memory each node claims  (64000)
#   SLURM_BOX_GPUS          GPUs each node claims    (4; 0 for none)
#   SLURM_BOX_GPU_TYPE      their type               (h100)
#   SLURM_BOX_PREFIX        node name prefix         (node)
#   SLURM_BOX_NET           first three octets       (10.77.0)
#   SLURM_BOX_SLURMD_TIMEOUT  s until a silent node is DOWN  (15)
#   SLURM_BOX_KILL_WAIT     s from SIGTERM to SIGKILL        (5; Slurm's default is 30)
#   SLURM_BOX_GRACE         GraceTime s of the preemptable partitions (10)
#   SLURM_BOX_PRIVATE_TMP   1: each node has a /tmp of its own (0)
#   SLURM_BOX_SHARE         with PRIVATE_TMP, paths under /tmp that stay shared, a:b:c
#   SLURM_BOX_CGROUP        1: task/cgroup (v1) constrains memory: OUT_OF_MEMORY is real (0);
#                           two such boxes at a time need two prefixes
#   SLURM_BOX_DBD           1: mariadb + slurmdbd, so sacct works in full (0)
#   SLURM_BOX_EXTRA         text appended to slurm.conf (a later line wins)
#   SLURM_BOX_KEEP          at "down", 1: leave the state directory (logs) behind
set -euo pipefail
export LC_ALL=C.UTF-8
STATE=${SLURM_BOX_STATE:-/var/tmp/slurm-box}
[[ $STATE =~ ^(/[A-Za-z0-9._-]+)+$ ]] || { echo "slurm-box: SLURM_BOX_STATE must be a plain absolute path" >&2; exit 2; }
PKGS=(munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins iproute2 util-linux)
DBD_PKGS=(slurmdbd slurm-wlm-mysql-plugin mariadb-server)
CLIENTS=(sbatch srun salloc squeue sinfo scancel scontrol sacct sacctmgr sstat sattach sprio sdiag sreport sbcast strigger sshare)
CLEAN=(env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 HOME=/root)

say() { printf 'slurm-box: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# ---- processes: "pid starttime" files, so that a reused pid is never killed
# (a zombie that the machine's own pid 1 has not reaped yet counts as gone)
start_time() {
  local s f
  s=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra f <<<"${s##*) }" # from the state on: the name before it may hold anything
  [ "${f[0]}" != Z ] && echo "${f[19]}"
}
pid_of() { # NAME -> the host pid of that machine's pid 1, if it is alive
  local pid st
  read -r pid st 2>/dev/null <"$STATE/run/$1.init" || return 1
  [ "$(start_time "$pid")" = "$st" ] || return 1
  echo "$pid"
}
inside() { # NAME CMD...: run in all the namespaces of a machine
  local pid; pid=$(pid_of "$1") || die "$1 is not up"; shift
  nsenter -t "$pid" -n -m -u -i -p -- "$@"
}
innet() { local pid; pid=$(pid_of "$1") || die "$1 is not up"; shift; nsenter -t "$pid" -n -- "$@"; }
client() { # a Slurm client as the head runs it
  local pid; pid=$(pid_of head) || die "the cluster is down"
  nsenter -t "$pid" -n -m -u -- "${CLEAN[@]}" "$@"
}
nodes() { cat "$STATE/nodes.list"; }
node_ip() { awk -v n="$1" '$2==n{print $1}' "$STATE/etc/hosts"; }
need_node() { [ -n "${1:-}" ] || die "which node?"; [ -e "$STATE/nodes.list" ] || die "the cluster is down"; nodes | grep -qx -- "$1" || die "no such node: $1"; }

install_packages() {
  local want=() p
  local all=("${PKGS[@]}"); [ "${SLURM_BOX_DBD:-0}" = 1 ] && all+=("${DBD_PKGS[@]}")
  for p in "${all[@]}"; do
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || want+=("$p")
  done
  [ ${#want[@]} = 0 ] && return
  say "installing ${want[*]}"
  # The packages' own services must not start; a policy-rc.d of ours says so where there is none.
  local mine=
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    mine=1; printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod 755 /usr/sbin/policy-rc.d
  fi
  local rc=0 log; log=$(mktemp)
  { apt-get update -qq; DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${want[@]}"; } \
    </dev/null >"$log" 2>&1 || rc=$?
  [ -z "$mine" ] || rm -f /usr/sbin/policy-rc.d
  [ $rc = 0 ] || tail -20 "$log" >&2
  rm -f "$log"
  [ $rc = 0 ] || die "apt-get failed"
}

write_config() {
  local n=$1 i half=$((CPUS / 2)) gres=""
  : >"$STATE/nodes.list"
  { echo "127.0.0.1 localhost"; echo "$NET.254 head"; } >"$STATE/etc/hosts"
  for ((i = 1; i <= n; i++)); do
    echo "$PREFIX$i" >>"$STATE/nodes.list"; echo "$NET.$i $PREFIX$i" >>"$STATE/etc/hosts"
    mkdir -p "$STATE/nodes/$PREFIX$i/spool"
  done
  printf 'hosts: files\npasswd: files\ngroup: files\nshadow: files\n' >"$STATE/etc/nsswitch.conf"
  if [ "$GPUS" -gt 0 ]; then
    gres="Gres=gpu:$GPU_TYPE:$GPUS Feature=$GPU_TYPE"
    # File= must name character devices: with no File, 22.05's gpu plugin reports 0 GPUs and the
    # node goes INVAL. These are /dev/null by another name (c 1 3).
    for ((i = 0; i < GPUS; i++)); do
      [ -e "$STATE/dev/nvidia$i" ] || mknod -m 666 "$STATE/dev/nvidia$i" c 1 3
    done
    echo "AutoDetect=off" >"$STATE/etc/gres.conf"
    local last=$((GPUS - 1))
    if [ $last = 0 ]; then echo "Name=gpu Type=$GPU_TYPE File=$STATE/dev/nvidia0" >>"$STATE/etc/gres.conf"
    else echo "Name=gpu Type=$GPU_TYPE File=$STATE/dev/nvidia[0-$last]" >>"$STATE/etc/gres.conf"; fi
  fi
  if [ "$CGROUP" = 1 ]; then
    cat >"$STATE/etc/cgroup.conf" <<EOF
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainDevices=no
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
EOF
  else
    printf 'CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n' >"$STATE/etc/cgroup.conf"
  fi
  cat >"$STATE/etc/slurm.conf" <<EOF
ClusterName=box
SlurmctldHost=head($NET.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/socket
CredType=cred/munge
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/nodes/%n/spool
SlurmctldPidFile=$STATE/run/slurmctld.pid
SlurmdPidFile=$STATE/run/slurmd-%n.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=$([ "$CGROUP" = 1 ] && echo task/cgroup || echo task/none)
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
ReturnToService=2
$([ "$GPUS" -gt 0 ] && echo "GresTypes=gpu")
# quick clocks
SlurmdTimeout=$SLURMD_TIMEOUT
SlurmctldTimeout=30
KillWait=$KILL_WAIT
UnkillableStepTimeout=30
MessageTimeout=10
TCPTimeout=2
BatchStartTimeout=10
MinJobAge=86400
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,sched_min_interval=100000,bf_interval=5,batch_sched_delay=0
# preemption
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# records of ended jobs: "sacct -c" reads the file; full sacct needs slurmdbd
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobcomp.txt
$(if [ "$DBD" = 1 ]; then
    echo "AccountingStorageType=accounting_storage/slurmdbd"; echo "AccountingStorageHost=$NET.254"
    echo "AccountingStoragePass=$STATE/munge/socket" # munge's socket for this connection: AuthInfo does not apply
    echo "AccountingStorageTRES=gres/gpu" # fatal without slurmdbd
  else echo "AccountingStorageType=accounting_storage/none"; fi)
$(awk -v c="$half" -v m="$MEM" -v g="$gres" '$2!="localhost"&&$2!="head"{
    print "NodeName="$2" NodeAddr="$1" Boards=1 Sockets=2 CoresPerSocket="c" ThreadsPerCore=1 RealMemory="m" "g" State=UNKNOWN"}' "$STATE/etc/hosts")
PartitionName=main Nodes=ALL Default=YES PriorityTier=50  PreemptMode=OFF MaxTime=INFINITE DefaultTime=30 State=UP
PartitionName=high Nodes=ALL             PriorityTier=100 PreemptMode=OFF MaxTime=INFINITE DefaultTime=30 State=UP
PartitionName=low  Nodes=ALL             PriorityTier=10  PreemptMode=REQUEUE GraceTime=$GRACE MaxTime=INFINITE DefaultTime=30 State=UP
PartitionName=spot Nodes=ALL             PriorityTier=10  PreemptMode=CANCEL  GraceTime=$GRACE MaxTime=INFINITE DefaultTime=30 State=UP
$EXTRA
EOF
  # pid 1 of every machine: sets up the mounts, then reaps orphans until it is killed
  cat >"$STATE/libexec/init" <<EOF
#!/bin/bash
STATE='$STATE'; name=\$1
set -e
hostname "\$name"
echo "\$name" >"\$STATE/nodes/\$name/hostname"
[ -e /etc/hostname ] && mount --bind "\$STATE/nodes/\$name/hostname" /etc/hostname
mount --bind "\$STATE/etc/hosts" /etc/hosts
mount --bind "\$STATE/etc/nsswitch.conf" /etc/nsswitch.conf
mount --bind "\$STATE/etc" /etc/slurm          # so that no one needs SLURM_CONF
mount --bind "\$STATE/empty" "\$STATE/bin"     # the wrappers are for outside only
mount -t tmpfs -o mode=1777,size=50% shm /dev/shm
# a sysfs that shows this network namespace's interfaces, with the cgroups back in their place
if mkdir -p "\$STATE/nodes/\$name/cg" && mount --rbind /sys/fs/cgroup "\$STATE/nodes/\$name/cg"; then
  mount -t sysfs sysfs /sys && mount --rbind "\$STATE/nodes/\$name/cg" /sys/fs/cgroup || true
  umount -R -l "\$STATE/nodes/\$name/cg" || true
fi
if [ '$PRIVATE_TMP' = 1 ] && [ "\$name" != head ]; then
  t=\$STATE/nodes/\$name/tmp; mkdir -p -m 1777 "\$t"; chmod 1777 "\$t"
  IFS=: read -ra share <<<'$SHARE:$STATE'
  for p in "\${share[@]}"; do
    case \$p in /tmp/?*) [ -d "\$p" ] && mkdir -p "\$t\${p#/tmp}" && mount --rbind "\$p" "\$t\${p#/tmp}";; esac
  done
  mount --rbind "\$t" /tmp
fi
set +e
: >"\$STATE/run/\$name.ready"
trap : TERM INT HUP
# A machine that "up" did not live to record, or whose state directory is gone, ends by itself.
mine() { local t; read -r t <"\$STATE/.slurm-box" && [ "\$t" = '$TOKEN' ] && [ -e "\$STATE/run/\$name.init" ]; } 2>/dev/null
for i in {1..50}; do mine && break; sleep 0.2; done
while mine; do sleep 5 & wait \$!; done
EOF
}

make_machine() { # NAME IP: the namespaces and the cable; no daemon yet
  local name=$1 ip=$2 outer pid="" i own_proc=(--mount-proc)
  mkdir -p "$STATE/nodes/$name"
  rm -f "$STATE/run/$name.ready"
  # the head keeps the root's /proc, so that clients, which stay out of its pid namespace, have a /proc/self
  if [ "$name" = head ]; then own_proc=(); fi
  setsid "${CLEAN[@]}" unshare --net --uts --ipc --pid --mount --fork --kill-child "${own_proc[@]}" \
    /bin/bash "$STATE/libexec/init" "$name" </dev/null >>"$STATE/log/init-$name.log" 2>&1 9>&- &
  outer=$!
  disown "$outer" 2>/dev/null || true
  echo "$outer $(start_time "$outer")" >"$STATE/run/$name.outer"
  for ((i = 0; i < 250; i++)); do
    [ -n "$pid" ] || pid=$(cat "/proc/$outer/task/$outer/children" 2>/dev/null) || true
    pid=${pid%% *}
    [ -n "$pid" ] && [ -e "$STATE/run/$name.ready" ] && break
    [ -e "/proc/$outer" ] || break
    sleep 0.02
  done
  if [ -z "$pid" ] || [ ! -e "$STATE/run/$name.ready" ]; then
    cat "$STATE/log/init-$name.log" >&2
    die "machine $name did not start"
  fi
  echo "$pid $(start_time "$pid")" >"$STATE/run/$name.init"
  nsenter -t "$pid" -n -- ip link set lo up
  if [ "$name" = head ]; then
    nsenter -t "$pid" -n -- ip -b - <<EOF
link add br0 type bridge
addr add $ip/24 dev br0
link set br0 up
EOF
  else
    # orphaned TCP sockets can keep a dead node's network namespace, and so its cable, alive for minutes
    innet head ip link del "v-$name" 2>/dev/null || true
    innet head ip link add "v-$name" type veth peer name eth0 netns "$pid"
    innet head ip -b - <<EOF
link set v-$name master br0
link set v-$name up
EOF
    nsenter -t "$pid" -n -- ip -b - <<EOF
addr add $ip/24 dev eth0
link set eth0 up
EOF
  fi
}

kill_machine() { # NAME: SIGKILL its pid 1; the kernel then ends every process in its pid namespace
  local f pid st i
  for f in init outer; do
    [ -e "$STATE/run/$1.$f" ] || continue
    read -r pid st <"$STATE/run/$1.$f" || continue
    if [ "$(start_time "$pid")" = "$st" ]; then
      kill -KILL "$pid" 2>/dev/null || true
      for ((i = 0; i < 500; i++)); do [ "$(start_time "$pid")" = "$st" ] || break; sleep 0.02; done
      [ "$(start_time "$pid")" != "$st" ] || say "pid $pid of $1 will not die"
    fi
    rm -f "$STATE/run/$1.$f"
  done
  rm -f "$STATE/run/$1.ready" "$STATE/run/slurmd-$1.pid"
  # what task/cgroup made for this node, now empty (rmdir refuses anything else)
  if [ -e "$STATE/run/cgroup" ] && [ -d "/sys/fs/cgroup/memory/slurm_$1" ]; then
    find "/sys/fs/cgroup/memory/slurm_$1" -depth -type d -exec rmdir {} + 2>/dev/null || true
  fi
}

start_slurmd() { inside "$1" "${CLEAN[@]}" slurmd </dev/null >>"$STATE/log/init-$1.log" 2>&1 9>&-; }
ctld_alive() { # its pid file holds a pid of the head's pid namespace
  local p; p=$(cat "$STATE/run/slurmctld.pid" 2>/dev/null) || return 1
  inside head kill -0 "$p" 2>/dev/null
}
start_ctld() { rm -f "$STATE/run/slurmctld.pid"; inside head "${CLEAN[@]}" slurmctld </dev/null >>"$STATE/log/init-head.log" 2>&1 9>&-; }

start_dbd() {
  cat >"$STATE/etc/slurmdbd.conf" <<EOF
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/socket
DbdHost=head
DbdAddr=$NET.254
SlurmUser=root
LogFile=$STATE/log/slurmdbd.log
PidFile=$STATE/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
EOF
  chmod 600 "$STATE/etc/slurmdbd.conf"
  mkdir -p "$STATE/db"
  local sock=$STATE/db/mysqld.sock i
  if [ ! -d "$STATE/db/data/mysql" ]; then
    "${CLEAN[@]}" mariadb-install-db --no-defaults --user=root --datadir="$STATE/db/data" --skip-test-db \
      --auth-root-authentication-method=normal </dev/null >"$STATE/log/mariadb-install.log" 2>&1
  fi
  # libmariadb looks for the socket of StorageHost=localhost at its compiled-in place
  inside head "${CLEAN[@]}" setsid bash -c "mkdir -p /run/mysqld && mount -t tmpfs tmpfs /run/mysqld && ln -s '$sock' /run/mysqld/mysqld.sock
    exec mariadbd --no-defaults --user=root --datadir='$STATE/db/data' --socket='$sock' --pid-file='$STATE/run/mariadb.pid' \
      --skip-networking --innodb-buffer-pool-size=32M --innodb-log-file-size=16M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF" </dev/null >"$STATE/log/mariadb.log" 2>&1 9>&- &
  disown $! 2>/dev/null || true
  for ((i = 0; i < 300; i++)); do inside head mariadb-admin --no-defaults -S "$sock" ping >/dev/null 2>&1 && break; sleep 0.1; done
  inside head "${CLEAN[@]}" slurmdbd </dev/null >>"$STATE/log/init-head.log" 2>&1 9>&-
  for ((i = 0; i < 20; i++)); do client timeout 5 sacctmgr -n show cluster >/dev/null 2>&1 && break; sleep 0.2; done
  client timeout 10 sacctmgr -i add cluster box >>"$STATE/log/init-head.log" 2>&1 || true
}

wait_idle() { # until every node answers, 30 s at most
  local n want end=$((SECONDS + 30))
  want=$(nodes | wc -l)
  while [ $SECONDS -lt $end ]; do
    ctld_alive || { sleep 1; ctld_alive; } || { say "slurmctld is not running:"; grep -E 'fatal|error' "$STATE/log/slurmctld.log" | tail -3 >&2 || true; return 1; }
    n=$(client timeout 5 sinfo -h -N -p main -o '%T' 2>/dev/null | grep -c -x -E 'idle|mixed|allocated' || true)
    [ "$n" = "$want" ] && return 0
    sleep 0.1
  done
  client timeout 5 sinfo -N -R >&2 || true
  tail -5 "$STATE"/log/slurmctld.log >&2 || true
  return 1
}

is_up() { [ -e "$STATE/.slurm-box" ] && pid_of head >/dev/null; }

up() {
  local n=${1:-3} t0 c node
  t0=$(date +%s.%N)
  [[ $n =~ ^[1-9][0-9]?$ ]] || die "up N: N is 1 to 99"
  [ "$(id -u)" = 0 ] || die "needs root (namespaces)"
  if is_up; then
    [ "$(nodes | wc -l)" = "$n" ] || die "already up with $(nodes | wc -l) nodes; 'down' first"
    if wait_idle; then say "already up"; return 0; else die "already up, but not healthy; 'down' first"; fi
  fi
  down_quietly
  [ -z "$(ls -A "$STATE" 2>/dev/null)" ] || die "$STATE is not empty and not ours"
  CPUS=${SLURM_BOX_CPUS:-8} MEM=${SLURM_BOX_MEM_MB:-64000} GPUS=${SLURM_BOX_GPUS:-4} GPU_TYPE=${SLURM_BOX_GPU_TYPE:-h100}
  PREFIX=${SLURM_BOX_PREFIX:-node} NET=${SLURM_BOX_NET:-10.77.0} SLURMD_TIMEOUT=${SLURM_BOX_SLURMD_TIMEOUT:-15}
  KILL_WAIT=${SLURM_BOX_KILL_WAIT:-5} GRACE=${SLURM_BOX_GRACE:-10} PRIVATE_TMP=${SLURM_BOX_PRIVATE_TMP:-0}
  SHARE=${SLURM_BOX_SHARE:-} CGROUP=${SLURM_BOX_CGROUP:-0} DBD=${SLURM_BOX_DBD:-0} EXTRA=${SLURM_BOX_EXTRA:-}
  mkdir -p "$STATE"/{etc,run,log,munge,ctld,nodes,dev,bin,empty,libexec}
  chmod 755 "$STATE" "$STATE/munge"
  TOKEN=$$-$(date +%s%N); echo "$TOKEN" >"$STATE/.slurm-box"
  if [ "$CGROUP" = 1 ]; then : >"$STATE/run/cgroup"; fi
  install_packages
  write_config "$n"
  # from here on a failure takes down what was started
  trap 'say "up failed; logs kept in $STATE/log"; tail -n 4 "$STATE"/log/init-*.log >&2; SLURM_BOX_KEEP=1 down_quietly' EXIT
  make_machine head "$NET.254"
  local head; head=$(pid_of head)
  ( umask 077; head -c 128 /dev/urandom >"$STATE/munge/key" )
  inside head "${CLEAN[@]}" munged --key-file="$STATE/munge/key" --socket="$STATE/munge/socket" \
    --pid-file="$STATE/run/munged.pid" --log-file="$STATE/log/munged.log" --seed-file="$STATE/munge/seed" \
    --num-threads=2 </dev/null >>"$STATE/log/init-head.log" 2>&1 9>&-
  if [ "$DBD" = 1 ]; then start_dbd; fi
  start_ctld
  for node in $(nodes); do
    make_machine "$node" "$(node_ip "$node")"
    start_slurmd "$node"
  done
  for c in "${CLIENTS[@]}"; do
    [ -x "/usr/bin/$c" ] || continue
    # shellcheck disable=SC2016 # the wrapper's own shell expands PWD and the arguments
    printf '#!/bin/sh\nexec nsenter -t %s -n -m -u --wdns="$PWD" -- /usr/bin/%s "$@"\n' "$head" "$c" >"$STATE/bin/$c"
    chmod 755 "$STATE/bin/$c"
  done
  wait_idle || die "the nodes did not come up; see $STATE/log"
  trap - EXIT
  say "up: $n nodes in $(awk -v a="$t0" -v b="$(date +%s.%N)" 'BEGIN{printf "%.1f", b-a}') s; eval \"\$($0 env)\""
}

down_quietly() {
  [ -e "$STATE/.slurm-box" ] || return 0
  local f
  for f in "$STATE"/run/*.outer; do
    [ -e "$f" ] || continue
    f=${f##*/}; f=${f%.outer}; [ "$f" = head ] || kill_machine "$f"
  done
  kill_machine head
  [ "${SLURM_BOX_KEEP:-0}" = 1 ] || rm -rf --one-file-system "$STATE"
}

status() {
  is_up || { echo "down"; return 3; }
  local bad=0 node pid
  echo "state $STATE"
  echo "head   $(node_ip head)  pid $(pid_of head)  slurmctld $(ctld_alive && echo up || echo DOWN)"
  ctld_alive || bad=1
  for node in $(nodes); do
    if pid=$(pid_of "$node"); then echo "$node  $(node_ip "$node")  pid $pid  $(client timeout 5 sinfo -h -N -p main -n "$node" -o '%T' 2>&1)"
    else echo "$node  $(node_ip "$node")  off"; bad=1; fi
  done
  return $bad
}

lock() { # one up/down at a time per state directory; "down" removes the lock file, hence the loop
  mkdir -p "$(dirname "$STATE")"
  while :; do exec 9>"$STATE.lock"; flock 9; [ "$STATE.lock" -ef "/proc/$$/fd/9" ] && return; done
}

cmd=${1:-}; [ $# -gt 0 ] && shift
case $cmd in
  install) [ "$(id -u)" = 0 ] || die "needs root"; install_packages ;;
  up) lock; up "$@" ;;
  down) lock; down_quietly; rm -f "$STATE.lock"; say "down" ;;
  status) status ;;
  env) is_up || die "the cluster is down"; echo "export PATH='$STATE/bin':\"\$PATH\" SLURM_BOX_STATE='$STATE'" ;;
  exec) pid=$(pid_of head) || die "the cluster is down"; exec nsenter -t "$pid" -n -m -u --wdns="$PWD" -- "$@" ;;
  on) need_node "${1:-}"; inside "$@" ;;
  kill-node) # the cable first: a dying process's FIN would tell its peers, which a power cut does not
    need_node "${1:-}"; lock; innet head ip link set "v-$1" down; kill_machine "$1" ;;
  boot-node) need_node "${1:-}"; lock; pid_of "$1" >/dev/null && die "$1 is on"; make_machine "$1" "$(node_ip "$1")"; start_slurmd "$1" ;;
  kill-slurmd) need_node "${1:-}"; inside "$1" kill -KILL "$(cat "$STATE/run/slurmd-$1.pid")" ;;
  start-slurmd) need_node "${1:-}"; start_slurmd "$1" ;;
  net-down) need_node "${1:-}"; innet head ip link set "v-$1" down ;;
  net-up) need_node "${1:-}"; innet head ip link set "v-$1" up ;;
  kill-ctld) # SIGTERM (the default) saves the state; KILL loses up to the last 5 s of it
    inside head kill "-${1:-TERM}" "$(cat "$STATE/run/slurmctld.pid")"; rm -f "$STATE/run/slurmctld.pid" ;;
  start-ctld) start_ctld; for _ in {1..100}; do ctld_alive && client timeout 5 scontrol ping >/dev/null 2>&1 && break; sleep 0.1; done ;;
  logs) tail -n 30 "$STATE"/log/slurmctld.log "$STATE"/log/slurmd-*.log ;;
  *) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 2 ;;
esac
