#!/usr/bin/env bash
# MFPO's variants, SMFP and SAC on the multi-goal task, 3 seeds each at equal updates, then their table and picture.
#     bash benchmark/multigoal.sh              JOBS=8 for eight runs at a time; they take minutes each
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
common="--env-id tests.multigoal:MultiGoal-v0 --no-autotune --alpha 1 --batch-size 64 --learning-starts 500
    --total-timesteps 2500 --policy-frequency 1 --eval-frequency 0 --checkpoint-frequency 0"
mfpo="mfpo_continuous.py --learning-rate 1e-3 --policy-proposals 8 --gaussian-proposals 16 --v-min -25 --v-max 5"
for seed in 1 2 3; do
    while read -r name script flags; do
        # shellcheck disable=SC2086
        echo $script $common $flags --seed $seed --exp-name "$name"
    done <<EOF
sac sac_continuous.py
smfp smfp_continuous.py
smfp-M1 smfp_continuous.py --latents 1
smfp-M16 smfp_continuous.py --latents 16
mfpo $mfpo
mfpo-exact $mfpo --likelihood exact
mfpo-gaussian $mfpo --proposals gaussian
mfpo-policy $mfpo --proposals policy
mfpo-flow-matching $mfpo --no-meanflow
mfpo-T1 $mfpo --sampling-steps 1
mfpo-T4 $mfpo --sampling-steps 4
mfpo-uniform $mfpo --time-distribution uniform --data-proportion 0.25
EOF
done | xargs -P "${JOBS:-2}" -L 1 python 2> /dev/null
python benchmark/density.py runs/tests.multigoal-*__{sac,smfp,mfpo}__1__* --out benchmark/results/multigoal
python benchmark/density.py runs/tests.multigoal-* --no-picture --out benchmark/results/multigoal_variants
