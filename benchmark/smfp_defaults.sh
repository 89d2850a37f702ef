#!/usr/bin/env bash
# What SMFP's defaults rest on: each against its alternatives, on the four goals and on two MuJoCo tasks; then SMFP with
# its defaults against SAC on three tasks.
#     bash benchmark/smfp_defaults.sh
# Restarted, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
alternatives=(
    "smfp-M1: smfp_continuous --critic sac --latents 1"
    "smfp-lambda0: smfp_continuous --critic sac --kl-coef 0"
    "smfp-lambda1: smfp_continuous --critic sac --kl-coef 1"
    "smfp-c0: smfp_continuous --critic sac --meanflow-coef 0"
    "smfp-unweighted: smfp_continuous --critic sac --no-mirror-descent-weights"
    "smfp-Kb4-Kt2: smfp_continuous --critic sac --behavior-candidates 4 --target-candidates 2"
    "smfp-crossq: smfp_continuous --critic crossq"
)
more=(
    "smfp-M16: smfp_continuous --critic sac --latents 16"
    "smfp-c0.1: smfp_continuous --critic sac --meanflow-coef 0.1"
    "smfp-c10: smfp_continuous --critic sac --meanflow-coef 10"
    "smfp-policy2: smfp_continuous --critic sac --policy-frequency 2"
)

# Here with a policy that learns in every update, as MFPO's and SAC's do.
python benchmark/sweep.py --env-ids tests.multigoal:MultiGoal-v0 --seeds 1 2 3 --runs-dir runs/smfp_multigoal \
    --scripts "smfp: smfp_continuous --critic sac" "${alternatives[@]}" "${more[@]}" \
    -- --no-autotune --alpha 1 --batch-size 64 --learning-starts 500 --total-timesteps 2500 --policy-frequency 1 \
    --eval-frequency 0 --checkpoint-frequency 0
python benchmark/density.py runs/smfp_multigoal/* --no-picture --out benchmark/results/modes/smfp_multigoal

# Two tasks that show something early: 12,000 and 8,000 updates, minutes on a CPU core. How fast each takes off, no more.
sweep=(python benchmark/sweep.py --seeds 1 2 --runs-dir runs/smfp_alternatives)
"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts "smfp: smfp_continuous --critic sac" "${alternatives[@]}" \
    -- --learning-starts 1000 --total-timesteps 13000 --eval-frequency 6500
"${sweep[@]}" --env-ids Pusher-v5 --scripts "smfp: smfp_continuous --critic sac" "${alternatives[@]}" \
    -- --learning-starts 1000 --total-timesteps 9000 --eval-frequency 3000
python benchmark/report.py runs/smfp_alternatives/* --normalize smfp --out benchmark/results/smfp_flags/smfp_alternatives

python benchmark/sweep.py --env-ids HalfCheetah-v4 Hopper-v4 Walker2d-v4 --seeds 1 2 --runs-dir runs/smfp_sac \
    --scripts "sac: sac_continuous" "smfp: smfp_continuous --critic sac" -- --total-timesteps 50000 --eval-frequency 10000
python benchmark/report.py runs/smfp_sac/* --normalize sac --out benchmark/results/learning_curves/smfp_sac

# CrossQ's critics, which the second block found ahead on HalfCheetah, under the conditions of the third.
python benchmark/sweep.py --env-ids HalfCheetah-v4 --seeds 1 2 --runs-dir runs/smfp_crossq \
    --scripts "smfp-crossq: smfp_continuous --critic crossq" -- --total-timesteps 20000 --eval-frequency 10000
python benchmark/report.py runs/smfp_crossq/* --normalize smfp-crossq --out benchmark/results/learning_curves/smfp_crossq
