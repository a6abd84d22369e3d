# prepare
sbatch --parsable HERE/runs/llama3.1-8b-full/jobs/prepare.sbatch
# train
sbatch --parsable --signal=B:USR1@300 HERE/runs/llama3.1-8b-full/jobs/train.sbatch
