# prepare
sbatch --parsable HERE/runs/demo/jobs/prepare.sbatch
# train
sbatch --parsable --signal=B:USR1@300 HERE/runs/demo/jobs/train.sbatch
