#!/bin/bash
# What runs once on each node of a job, below srun: one stage of the run that $GALLEY_RUN names.
#   node.sh prepare | preflight | train | export
set -uo pipefail
stage=$1 node=${SLURMD_NODENAME:-$(hostname)}
[[ -n ${GALLEY_RUN:-} ]] || { echo "galley: export: the job's variables do not reach its steps on $node; take --export out of cluster.srun and of the site's settings for srun" >&2; exit 78; }
umask o-w # no stranger may write to what the user's umask leaves open
ulimit -c 0
ulimit -n "$(ulimit -Hn)" 2>/dev/null
ulimit -l unlimited 2>/dev/null # RDMA registers memory

# Caches of compilers are this node's and this job's own: on a shared disk they race (DeepSpeed#5205).
rest=${GALLEY_SCRATCH_PATTERN:-} # names variables of the job or of the node: /local/$SLURM_JOB_ID
while [[ $rest =~ ^([^$]*)\$\{?([A-Za-z_][A-Za-z0-9_]*)\}?(.*)$ ]]; do
  name=${BASH_REMATCH[2]}
  [[ -n ${!name:-} ]] || { echo "galley: scratch: \$$name is not set on $node; cluster.scratch names it" >&2; exit 78; }
  GALLEY_SCRATCH=${GALLEY_SCRATCH:-}${BASH_REMATCH[1]}${!name} rest=${BASH_REMATCH[3]}
done
scratch=${GALLEY_SCRATCH:-}$rest
scratch=${scratch:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}
local=$scratch/galley-$UID-${SLURM_JOB_ID:-0}.${SLURM_RESTART_COUNT:-0}-$node
(umask 077 && mkdir -p "$local/tmp" "$local/heartbeats" "$local/operators") || { echo "galley: scratch: $scratch cannot be written to on $node; set cluster.scratch" >&2; exit 78; }
[[ -O $local ]] || { echo "galley: scratch: $local is somebody else's" >&2; exit 78; }
beats=$local/heartbeats shm=/dev/shm/${local##*/} # in memory where that can be: each rank writes there at every step
(umask 077 && mkdir -p "$shm") 2>/dev/null && [[ -O $shm ]] && beats=$shm
trap 'rm -rf "$local" "$beats"' EXIT
for old in "$scratch/galley-$UID"-*-"$node"; do # what jobs left that were killed
  [[ -O $old && -s $old/pid ]] && ! kill -0 "$(<"$old/pid")" 2>/dev/null && rm -rf "$old" "/dev/shm/${old##*/}"
done
echo $$ >"$local/pid"
export TMPDIR=$local/tmp TRITON_CACHE_DIR=$local/triton TORCHINDUCTOR_CACHE_DIR=$local/inductor \
  CUDA_CACHE_PATH=$local/nv GALLEY_HEARTBEATS=$beats GALLEY_SCRATCH=$scratch
# Nodes often lack a compiler: take along what prepare compiled.
if [[ $stage == train && -d ${TORCH_EXTENSIONS_DIR:-} ]]; then
  (cd "$TORCH_EXTENSIONS_DIR" && cp --parents ./*/*.so "$local/operators") 2>/dev/null
  export GALLEY_OPERATORS=$local/operators TORCH_EXTENSIONS_DIR=$local/operators
fi
# What was submitted, not what a checkout has become since; and no folder of the user's shadows a library.
export PYTHONPATH=$GALLEY_RUN/code${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1

command -v "$GALLEY_PYTHON" >/dev/null || { echo "galley: environment: no Python at $GALLEY_PYTHON on $node; see venv, conda and container of the cluster's profile" >&2; exit 78; }
if [[ $stage == preflight ]]; then
  "$GALLEY_PYTHON" -m galley_launch.job.node.preflight "$GALLEY_ATTEMPT_DIR"
  exit $?
fi
if [[ $stage != train ]]; then
  OMP_NUM_THREADS=$GALLEY_THREADS "$GALLEY_PYTHON" -m "galley.$stage" "$GALLEY_RUN/run.json"
  exit $?
fi

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=$GALLEY_THREADS
# Ranks find each other in a file that is the user's alone: no port, and its locks must hold between nodes.
meeting=$local/meeting
[[ $GALLEY_NODES == 1 ]] || meeting=${GALLEY_MEETING:-$GALLEY_ATTEMPT_DIR}/meeting-$GALLEY_RENDEZVOUS
# Slurm's SIGTERM may reach every process of the step. Only this shell acts on it: it asks all ranks to save.
asked() { [[ -e $GALLEY_ATTEMPT_DIR/ctl/stop ]] || { printf '{"reason": "signal"}' >"$local/stop" && cp "$local/stop" "$GALLEY_ATTEMPT_DIR/ctl/stop"; }; }
trap '' TERM USR1
"$GALLEY_PYTHON" -m galley.launch_ranks \
  --nnodes "$GALLEY_NODES" --nproc-per-node "$GALLEY_RANKS" --max-restarts 0 \
  --rdzv-backend file --rdzv-id "$GALLEY_RENDEZVOUS" --rdzv-endpoint "$meeting" --rdzv-conf "rank=${SLURM_NODEID:-0}" \
  --signals-to-handle SIGQUIT \
  -m galley.train "$GALLEY_RUN/run.json" &
ranks=$!
trap asked TERM USR1
"$GALLEY_PYTHON" -m galley_launch.job.node.watch --parent "$ranks" --heartbeats "$GALLEY_HEARTBEATS" \
  --attempt "$GALLEY_ATTEMPT_DIR" --limits "$GALLEY_PATIENCE" --ranks "$GALLEY_RANKS" &
watch=$!
{ while kill -0 "$watch" 2>/dev/null; do wait "$watch"; done; wait "$watch"; } && hang=0 || hang=$?
# After a hang its ranks are dead; torchrun may wait for other nodes' all the same.
if [[ $hang == 3 ]]; then sleep 5; kill -KILL "$ranks" 2>/dev/null; fi
while kill -0 "$ranks" 2>/dev/null; do wait "$ranks"; done
wait "$ranks"
status=$?
exit $status
