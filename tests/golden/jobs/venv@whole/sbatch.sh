# prepare
sbatch --parsable HERE/runs/qwen3-32b-qlora/jobs/prepare.sbatch
# train
sbatch --parsable --signal=B:USR1@300 HERE/runs/qwen3-32b-qlora/jobs/train.sbatch
