# prepare
sbatch --parsable HERE/runs/qwen3-4b-qlora/jobs/prepare.sbatch
# train
sbatch --parsable --signal=B:USR1@300 HERE/runs/qwen3-4b-qlora/jobs/train.sbatch
