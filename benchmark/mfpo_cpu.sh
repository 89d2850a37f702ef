#!/usr/bin/env bash
# MFPO as far as two CPU cores get in a few hours: K1 : K2 = 4 : 8 for the paper's 16 : 32, and learning from step 1,000 for
# its 10,000. Slow start or not (--critic-init-std), beside SAC and SMFP, and the ablations.
#     bash benchmark/mfpo_cpu.sh
# Restarted, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
small="mfpo_continuous --policy-proposals 4 --gaussian-proposals 8"
cheetah="$small --no-clipped-double-q" # as in the paper on HalfCheetah
narrow="--critic-init-std 32"
sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_cpu --seeds 1)
flags=(-- --learning-starts 1000 --eval-frequency 2000)

"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts "mfpo-K4-8: $cheetah" "mfpo-K4-8-init32: $cheetah $narrow" \
    "${flags[@]}" --total-timesteps 13000
"${sweep[@]}" --env-ids InvertedPendulum-v4 --scripts "mfpo-K4-8: $small" "mfpo-K4-8-init32: $small $narrow" \
    "${flags[@]}" --total-timesteps 10000
"${sweep[@]}" --env-ids Hopper-v4 Humanoid-v4 Walker2d-v4 Ant-v4 --scripts "mfpo-K4-8-init32: $small $narrow" \
    "${flags[@]}" --total-timesteps 10000
"${sweep[@]}" --env-ids HalfCheetah-v4 Hopper-v4 Humanoid-v4 Walker2d-v4 Ant-v4 \
    --scripts "sac: sac_continuous" "smfp: smfp_continuous" "${flags[@]}" --total-timesteps 10000
python benchmark/report.py runs/mfpo_cpu/*__{sac,smfp,mfpo-K4-8,mfpo-K4-8-init32}__1__* --normalize sac --until 10000 \
    --out benchmark/results/mfpo_cpu

"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts \
    "mfpo-flow-matching: $cheetah $narrow --no-meanflow" \
    "mfpo-T1: $cheetah $narrow --sampling-steps 1" \
    "mfpo-T4: $cheetah $narrow --sampling-steps 4" \
    "mfpo-policy: $cheetah $narrow --proposals policy" \
    "mfpo-gaussian: $cheetah $narrow --proposals gaussian" \
    "mfpo-no-likelihood: $cheetah $narrow --likelihood none --no-autotune" \
    "mfpo-exact: $cheetah $narrow --likelihood exact" \
    "mfpo-uniform: $cheetah $narrow --time-distribution uniform --data-proportion 0.25" \
    "${flags[@]}" --total-timesteps 6000
