#!/usr/bin/env bash
# Learning curves: the three scripts on the five MuJoCo tasks of MFPO's paper, and SAC and SMFP on two more of SMFP's.
#     bash benchmark/mujoco.sh              STEPS=300000 SEEDS="1 2 3" for less; restarted, it goes on
# Meant for a GPU: on one CPU core a million steps of MFPO take four days, of SMFP ten hours, of SAC four.
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1 2 3 4 5}"
sweep=(python benchmark/sweep.py --runs-dir runs/mujoco --seeds "${seeds[@]}")
flags=(-- --total-timesteps "${STEPS:-1000000}")

"${sweep[@]}" --env-ids Hopper-v4 Walker2d-v4 HalfCheetah-v4 Ant-v4 Humanoid-v4 Swimmer-v4 HumanoidStandup-v4 \
    --scripts "sac: sac_continuous" "sac-crossq: sac_continuous --critic crossq --policy-frequency 2" \
    "smfp: smfp_continuous" "${flags[@]}"
"${sweep[@]}" --env-ids Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4 --scripts \
    "mfpo: mfpo_continuous" "mfpo-init32: mfpo_continuous --critic-init-std 32" "${flags[@]}"
cheetah="mfpo_continuous --no-clipped-double-q" # as in the paper
"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts "mfpo: $cheetah" "mfpo-init32: $cheetah --critic-init-std 32" "${flags[@]}"
python benchmark/report.py runs/mujoco/* --normalize sac --published benchmark/results/published.csv \
    --out benchmark/results/learning_curves/mujoco
