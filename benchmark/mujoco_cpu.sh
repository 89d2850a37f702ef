#!/usr/bin/env bash
# What two CPU cores reach of mujoco.sh in a day: SAC and SMFP for 100,000 steps on the five MuJoCo tasks of MFPO's paper,
# and both with CrossQ's critics, which are SMFP's default.
#     bash benchmark/mujoco_cpu.sh          SEEDS="1 2 3" for more; restarted, it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1}"
sweep=(python benchmark/sweep.py --runs-dir runs/mujoco_cpu --seeds "${seeds[@]}"
    --env-ids HalfCheetah-v4 Ant-v4 Humanoid-v4 Hopper-v4 Walker2d-v4 --scripts)
flags=(-- --total-timesteps 100000)

"${sweep[@]}" "sac: sac_continuous" "smfp: smfp_continuous --critic sac" "${flags[@]}"
"${sweep[@]}" "smfp-crossq: smfp_continuous" "sac-crossq: sac_continuous --critic crossq --policy-frequency 2" \
    "${flags[@]}"
python benchmark/report.py runs/mujoco_cpu/* --normalize sac --also diagnostics/latent_spread diagnostics/sigma \
    diagnostics/entropy_gap diagnostics/entropy diagnostics/ess losses/alpha \
    --published benchmark/results/published.csv --out benchmark/results/learning_curves/mujoco_cpu
