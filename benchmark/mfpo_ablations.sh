#!/usr/bin/env bash
# The paper's ablations of MFPO on HalfCheetah-v4, and what its authors leave open: K1 : K2 on another task, 1 to 8
# sampling steps, the exact likelihood, and whether the average divergence network drifts over a long run.
#     bash benchmark/mfpo_ablations.sh      STEPS=300000 SEEDS="1 2 3" for less; restarted, it goes on
# FLAGS go to every run, but a variant's own win: FLAGS="--learning-starts 1000 --policy-proposals 4 --gaussian-proposals 8"
# and STEPS=10000 are the conditions of mfpo_cpu.sh. Without them meant for a GPU, as benchmark/mujoco.sh is.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1 2 3 4 5}"
sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_ablations --seeds "${seeds[@]}")
read -ra more <<< "${FLAGS:-}"
flags=(-- --total-timesteps "${STEPS:-1000000}" "${more[@]}")
mfpo="mfpo_continuous --no-clipped-double-q" # the paper's setting on HalfCheetah

ratios=("--policy-proposals 8 --gaussian-proposals 40" "--policy-proposals 32 --gaussian-proposals 16")

"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts \
    "mfpo: $mfpo" \
    "mfpo-flow-matching: $mfpo --no-meanflow" \
    "mfpo-no-likelihood: $mfpo --likelihood none --no-autotune" \
    "mfpo-fixed-alpha: $mfpo --no-autotune" \
    "mfpo-exact: $mfpo --likelihood exact" \
    "mfpo-init32: $mfpo --critic-init-std 32" \
    "mfpo-gaussian: $mfpo --proposals gaussian" \
    "mfpo-policy: $mfpo --proposals policy" \
    "mfpo-rho0.25: $mfpo --rho 0.25" \
    "mfpo-rho1: $mfpo --rho 1" \
    "mfpo-T1: $mfpo --sampling-steps 1" \
    "mfpo-T4: $mfpo --sampling-steps 4" \
    "mfpo-T8: $mfpo --sampling-steps 8" \
    "mfpo-uniform: $mfpo --time-distribution uniform --data-proportion 0.25" \
    "mfpo-K8-40: $mfpo ${ratios[0]}" \
    "mfpo-K32-16: $mfpo ${ratios[1]}" \
    "${flags[@]}"
"${sweep[@]}" --env-ids Walker2d-v4 --scripts \
    "mfpo: mfpo_continuous" \
    "mfpo-K8-40: mfpo_continuous ${ratios[0]}" \
    "mfpo-K32-16: mfpo_continuous ${ratios[1]}" \
    "${flags[@]}"
python benchmark/report.py runs/mfpo_ablations/* --normalize mfpo --out benchmark/results/mfpo_ablations
python benchmark/report.py runs/mfpo_ablations/HalfCheetah-v4__mfpo__* --metric diagnostics/adn_log_prob_bias \
    --normalize mfpo --out benchmark/results/mfpo_drift
