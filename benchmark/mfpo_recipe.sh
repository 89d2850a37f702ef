#!/usr/bin/env bash
# MFPO where two cores must do. Fewer states instead of fewer proposals, a likelihood of the sampler's own steps, and times
# that are uniform. The quantile recipe has quantile critics, too. The recipe has CrossQ's critics, a higher learning rate,
# a moving average of the policy, 8 noised actions per state and a fixed temperature. First what each part of the quantile
# recipe does; then both on five tasks, and the recipe without the moving average, with fixed and learned temperature.
#     bash benchmark/mfpo_recipe.sh         SEEDS="1 2" for more in the second part; restarted, it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1}"
mfpo="mfpo_continuous --policy-frequency 2 --time-distribution uniform --data-proportion 0.25"
few="$mfpo --policy-batch-size 64"
quantile="--critic quantile --num-atoms 25" # 101 quantiles cost as much as the networks
quantile_recipe="$few --likelihood map $quantile"
noised8="--noised-actions 8 --gaussian-proposals 4 --combination pooled" # as many actions in an update
learned_alpha="$few --likelihood map --critic crossq --learning-rate 1e-3 $noised8"
no_average="$learned_alpha --no-autotune --alpha 0.1"
recipe="$no_average --policy-tau 0.05"
flags=(-- --learning-starts 5000 --eval-frequency 5000 --compile --total-timesteps)
also=(diagnostics/q_std diagnostics/adn_log_prob_bias diagnostics/adn_log_prob_error diagnostics/entropy losses/alpha
    diagnostics/ess_policy diagnostics/ess_gaussian)

sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_parts)
"${sweep[@]}" --seeds 1 2 --env-ids HalfCheetah-v4 Walker2d-v4 --scripts "mfpo-quantile-recipe: $quantile_recipe" \
    "mfpo-c51: $few --likelihood map --critic-init-std 32" "mfpo-mean: $few --likelihood map --critic mean" \
    "mfpo-paper-times: $quantile_recipe --time-distribution logit_normal --data-proportion 0.75" \
    "mfpo-rate-1e-3: $quantile_recipe --learning-rate 1e-3" \
    "mfpo-noised8: $quantile_recipe $noised8" "mfpo-noised8-rate-1e-3: $quantile_recipe $noised8 --learning-rate 1e-3" \
    "${flags[@]}" 20000
"${sweep[@]}" --seeds 1 --env-ids Walker2d-v4 --scripts "mfpo-adn: $few $quantile" \
    "mfpo-256x4-8: $mfpo --policy-proposals 4 --gaussian-proposals 8 --likelihood map $quantile" \
    "mfpo-quantile-frequency1: $quantile_recipe --policy-frequency 1" \
    "${flags[@]}" 20000
python benchmark/report.py runs/mfpo_parts/* --normalize mfpo-quantile-recipe --every 1000 --also "${also[@]}" \
    --out benchmark/results/ablations/mfpo_parts

sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_recipes --seeds "${seeds[@]}")
"${sweep[@]}" --scripts "mfpo-recipe: $recipe" "mfpo-no-average: $no_average" \
    --env-ids HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4 "${flags[@]}" 100000
sweep+=(--scripts "mfpo-quantile-recipe: $quantile_recipe" "mfpo-learned-alpha: $learned_alpha")
"${sweep[@]}" --env-ids Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4 "${flags[@]}" 100000
"${sweep[@]}" --env-ids HalfCheetah-v4 "${flags[@]}" 100000 --no-clipped-double-q # as in the paper
python benchmark/report.py runs/mfpo_recipes/* --normalize mfpo-recipe --every 1000 --also "${also[@]}" \
    --out benchmark/results/learning_curves/mfpo_recipes
