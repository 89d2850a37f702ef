#!/usr/bin/env bash
# MFPO's variants, SMFP and SAC on the four goals, 3 seeds each at equal updates, then their table and picture.
#     bash benchmark/multigoal.sh
# Restarted, it goes on; a run takes minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
mfpo="mfpo_continuous --learning-rate 1e-3 --policy-proposals 8 --gaussian-proposals 16 --v-min -25 --v-max 5"

python benchmark/sweep.py --env-ids tests.multigoal:MultiGoal-v0 --seeds 1 2 3 --runs-dir runs/multigoal --scripts \
    "sac: sac_continuous" \
    "smfp: smfp_continuous --critic sac" \
    "smfp-M1: smfp_continuous --critic sac --latents 1" \
    "smfp-M16: smfp_continuous --critic sac --latents 16" \
    "mfpo: $mfpo" \
    "mfpo-exact: $mfpo --likelihood exact" \
    "mfpo-gaussian: $mfpo --proposals gaussian" \
    "mfpo-policy: $mfpo --proposals policy" \
    "mfpo-flow-matching: $mfpo --no-meanflow" \
    "mfpo-T1: $mfpo --sampling-steps 1" \
    "mfpo-T4: $mfpo --sampling-steps 4" \
    "mfpo-uniform: $mfpo --time-distribution uniform --data-proportion 0.25" \
    -- --no-autotune --alpha 1 --batch-size 64 --learning-starts 500 --total-timesteps 2500 --policy-frequency 1 \
    --eval-frequency 0 --checkpoint-frequency 0
python benchmark/density.py runs/multigoal/*__{sac,smfp,mfpo}__1__* --out benchmark/results/modes/multigoal
python benchmark/density.py runs/multigoal/* --no-picture --out benchmark/results/modes/multigoal_variants
