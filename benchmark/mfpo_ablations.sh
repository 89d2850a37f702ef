#!/usr/bin/env bash
# The paper's ablations of MFPO on HalfCheetah-v4, and what its authors leave open: K1 : K2 on another task, 1 to 8
# sampling steps, the exact likelihood, and whether the average divergence network drifts over a long run.
#     bash benchmark/mfpo_ablations.sh      STEPS=300000 SEEDS="1 2 3" for less; restarted, it goes on
# FLAGS go to every run, but a variant's own win; K1 and K2 are the numbers of proposals. The conditions of mfpo_cpu.sh are
#     K1=4 K2=8 STEPS=10000 SEEDS=1 FLAGS="--learning-starts 1000 --eval-frequency 2000 --critic-init-std 32"
# Without them meant for a GPU, as benchmark/mujoco.sh is.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1 2 3 4 5}"
sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_ablations --seeds "${seeds[@]}")
read -ra common <<< "${FLAGS:-}"
flags=(-- --total-timesteps "${STEPS:-1000000}" "${common[@]}")
K1=${K1:-16} K2=${K2:-32}
base="mfpo_continuous --policy-proposals $K1 --gaussian-proposals $K2"
mfpo="$base --no-clipped-double-q" # the paper's setting on HalfCheetah

# Other shares of the same number of proposals.
fewer="--policy-proposals $((K1 / 2)) --gaussian-proposals $((K2 + K1 - K1 / 2))"
more="--policy-proposals $((2 * K1)) --gaussian-proposals $((K2 - K1))"

"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts \
    "mfpo: $mfpo" \
    "mfpo-flow-matching: $mfpo --no-meanflow" \
    "mfpo-no-likelihood: $mfpo --likelihood none --no-autotune" \
    "mfpo-fixed-alpha: $mfpo --no-autotune" \
    "mfpo-exact: $mfpo --likelihood exact" \
    "mfpo-gaussian: $mfpo --proposals gaussian --gaussian-proposals $((K1 + K2))" \
    "mfpo-policy: $mfpo --proposals policy --policy-proposals $((K1 + K2)) --gaussian-proposals 1" \
    "mfpo-rho0.25: $mfpo --rho 0.25" \
    "mfpo-rho1: $mfpo --rho 1" \
    "mfpo-T1: $mfpo --sampling-steps 1" \
    "mfpo-T4: $mfpo --sampling-steps 4" \
    "mfpo-T8: $mfpo --sampling-steps 8" \
    "mfpo-uniform: $mfpo --time-distribution uniform --data-proportion 0.25" \
    "mfpo-fewer-policy: $mfpo $fewer" \
    "mfpo-more-policy: $mfpo $more" \
    "${flags[@]}"
"${sweep[@]}" --env-ids Walker2d-v4 --scripts \
    "mfpo: $base" \
    "mfpo-fewer-policy: $base $fewer" \
    "mfpo-more-policy: $base $more" \
    "${flags[@]}"
python benchmark/report.py runs/mfpo_ablations/* --normalize mfpo --also diagnostics/entropy diagnostics/adn_log_prob_bias \
    losses/alpha --out benchmark/results/ablations/mfpo_ablations
python benchmark/report.py runs/mfpo_ablations/HalfCheetah-v4__mfpo__* --metric diagnostics/adn_log_prob_bias \
    --normalize mfpo --out benchmark/results/likelihood/mfpo_drift
python benchmark/likelihood.py runs/mfpo_ablations/* --out benchmark/results/likelihood/likelihood
