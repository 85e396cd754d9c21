#!/usr/bin/env bash
# Compares NT, ST&SF and FT&SF with floors and boosted trees by stage, data and model files alone (docs/results.md):
#   benchmarks/comparison.sh grocery 0,1,2 l4h64a4,din        # data in data/grocery, runs in runs/comparison/grocery
# First argument: a file of configs/data. Then seeds and models, with commas. FOLDER=... instead of runs/comparison.
# Every seed has a pretraining of its own, or, with PRETRAINING=0, all take that of seed 0. DIN takes the tables of L4H64A4.
# Finished runs are kept, so more seeds or models may be asked for later.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 seeds=$2 models=$3
runs=${FOLDER:-runs/comparison}/$data
for seed in ${PRETRAINING:-${seeds//,/ }}; do
  python -m gpsd_dist.train --gin_file configs/stage/pretrain.gin --gin_file "configs/data/$data.gin" \
    --gin_file configs/model/l4h64a4.gin --gin.SEED="$seed" --gin.OUTPUT_DIR="$runs/pretrain/s$seed"
done
from="$runs/pretrain/s${PRETRAINING:-{seed\}}"
counted=()
if [[ $data == grocery ]]; then counted=(--min_item_count 5); fi # 5-core data: see gpsd_dist/baselines/frequent_items.py
python -m benchmarks.model_table --gin_file configs/stage/finetune.gin --gin_file "configs/data/$data.gin" \
  --models "$models" --seeds "$seeds" --rates default --baselines popularity,rates,gbdt,gbdt_refit "${counted[@]}" \
  --tables_from "$from" --tower_from "$from" --out_dir "$runs"
