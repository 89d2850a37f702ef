#!/usr/bin/env bash
# SAC, SMFP and MFPO where the optimum is known: four equal goals and three unequal ones, 20,000 updates, batch 256; then
# their tables and pictures.
#     bash benchmark/multigoal.sh           SEEDS="1 2 3" for more; restarted, it goes on
# Every state is the same, so MFPO's policy learns from 64 of a batch's states as from 256. M = 16 and MFPO take an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1}"
mfpo="mfpo_continuous --policy-batch-size 64 --v-min -50 --v-max 5"
recipe="mfpo_continuous --policy-batch-size 64 --policy-frequency 2 --likelihood map --critic crossq --learning-rate 1e-3 \
    --policy-tau 0.05 --noised-actions 8 --gaussian-proposals 4 --combination pooled --time-distribution uniform \
    --data-proportion 0.25"
python benchmark/sweep.py --env-ids tests.multigoal:MultiGoal-v0 tests.multigoal:UnequalGoals-v0 \
    --seeds "${seeds[@]}" --runs-dir runs/multigoal --scripts \
    "sac: sac_continuous" \
    "smfp: smfp_continuous" \
    "smfp-lambda1: smfp_continuous --kl-coef 1" \
    "smfp-lambda1-M1: smfp_continuous --kl-coef 1 --latents 1" \
    "smfp-lambda1-M16: smfp_continuous --kl-coef 1 --latents 16" \
    "mfpo: $mfpo" \
    "mfpo-map: $mfpo --likelihood map" \
    "mfpo-exact: $mfpo --likelihood exact" \
    "mfpo-exact-pooled: $mfpo --likelihood exact --combination pooled" \
    "mfpo-recipe-alpha1: $recipe" \
    -- --no-autotune --alpha 1 --learning-starts 500 --total-timesteps 20500 --eval-frequency 0 --checkpoint-frequency 0 \
    --compile
for task in MultiGoal UnequalGoals; do
    python benchmark/density.py runs/multigoal/*"$task"* --out "benchmark/results/modes/learned_$task"
done
