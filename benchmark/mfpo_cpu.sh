#!/usr/bin/env bash
# MFPO as far as two CPU cores get in a few hours: K1 : K2 = 4 : 8 for the paper's 16 : 32, and learning from step 1,000 for
# its 10,000. Its slow start and the end of that (--critic-init-std), beside SAC and SMFP. The ablations
# under the same conditions: see mfpo_ablations.sh.
#     bash benchmark/mfpo_cpu.sh            SEEDS="1 2 3" for more; restarted, it goes on
set -euo pipefail
cd "$(dirname "$0")/.."
read -ra seeds <<< "${SEEDS:-1}"
mfpo="mfpo_continuous --policy-proposals 4 --gaussian-proposals 8"
cheetah="$mfpo --no-clipped-double-q" # as in the paper on HalfCheetah
init="--critic-init-std 32"
sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_cpu --seeds "${seeds[@]}")
flags=(-- --learning-starts 1000 --total-timesteps 10000 --eval-frequency 2000)

"${sweep[@]}" --env-ids HalfCheetah-v4 --scripts "mfpo-K4-8: $cheetah" "mfpo-K4-8-init32: $cheetah $init" "${flags[@]}"
"${sweep[@]}" --env-ids InvertedPendulum-v4 --scripts "mfpo-K4-8: $mfpo" "mfpo-K4-8-init32: $mfpo $init" "${flags[@]}"
"${sweep[@]}" --env-ids Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4 --scripts "mfpo-K4-8-init32: $mfpo $init" "${flags[@]}"
"${sweep[@]}" --env-ids HalfCheetah-v4 Hopper-v4 Walker2d-v4 Ant-v4 Humanoid-v4 \
    --scripts "sac: sac_continuous" "smfp: smfp_continuous" "${flags[@]}"
python benchmark/report.py runs/mfpo_cpu/* --normalize sac --also diagnostics/q_std diagnostics/q_action_std \
    diagnostics/adn_log_prob_bias diagnostics/flow_gap --published benchmark/results/published.csv \
    --out benchmark/results/taking_off/mfpo_cpu

# For longer: does it go on learning, does its divergence network drift? With the paper's 16 : 32 as well; and with narrower
# atoms, 3.2 apart instead of 32, from a narrow distribution or from the paper's broad one.
more=(python benchmark/sweep.py --runs-dir runs/mfpo_long --env-ids HalfCheetah-v4)
flags=(-- --learning-starts 1000 --eval-frequency 2000 --total-timesteps)
narrow="--v-min -160 --v-max 160"
"${more[@]}" --seeds 1 2 --scripts "mfpo-K4-8-init32: $cheetah $init" "${flags[@]}" 50000
"${more[@]}" --seeds 1 --scripts "mfpo-init32: mfpo_continuous --no-clipped-double-q $init" \
    "${flags[@]}" 50000 --checkpoint-frequency 5000
"${more[@]}" --seeds 1 --scripts "mfpo-support160: $cheetah $narrow --critic-init-std 3.2" "${flags[@]}" 20000
"${more[@]}" --seeds 1 2 --scripts "mfpo-v160: $cheetah $narrow" "${flags[@]}" 20000
python benchmark/report.py runs/mfpo_long/* --normalize mfpo-K4-8-init32 --also diagnostics/q_std diagnostics/edge_mass \
    diagnostics/adn_log_prob_bias diagnostics/adn_log_prob_error diagnostics/entropy losses/alpha diagnostics/ess_policy \
    diagnostics/ess_gaussian diagnostics/clipped_fraction --out benchmark/results/taking_off/mfpo_long
python benchmark/posture.py runs/mfpo_long/* --out benchmark/results/taking_off/posture

# How fast the spread of the paper's critics falls.
python benchmark/sweep.py --runs-dir runs/mfpo_spread --seeds 2 --env-ids HalfCheetah-v4 --scripts "mfpo-K4-8: $cheetah" \
    -- --learning-starts 1000 --total-timesteps 3000 --eval-frequency 0
python benchmark/report.py runs/mfpo_spread/* --normalize mfpo-K4-8 --metric diagnostics/q_std --also diagnostics/q_action_std \
    --out benchmark/results/taking_off/mfpo_spread

# To 100,000 steps under the conditions of mujoco_cpu.sh, whose curves are drawn beside.
more=(python benchmark/sweep.py --runs-dir runs/mfpo_100k --seeds "${seeds[@]}")
flags=(-- --learning-starts 5000 --eval-frequency 5000 --total-timesteps 100000 --compile)
"${more[@]}" --env-ids HalfCheetah-v4 --scripts "mfpo-K4-8-init32: $cheetah $init" "${flags[@]}"
"${more[@]}" --env-ids Hopper-v4 --scripts "mfpo-K4-8-init32: $mfpo $init" "${flags[@]}"
python benchmark/report.py runs/mfpo_100k/* --normalize mfpo-K4-8-init32 --every 1000 --also diagnostics/q_std \
    diagnostics/edge_mass diagnostics/adn_log_prob_bias diagnostics/adn_log_prob_error diagnostics/flow_gap \
    diagnostics/q_action_std diagnostics/entropy losses/alpha diagnostics/ess_policy diagnostics/ess_gaussian \
    --beside benchmark/results/learning_curves/mujoco_cpu.csv benchmark/results/learning_curves/mujoco_cpu2.csv --out benchmark/results/learning_curves/mfpo_100k
python benchmark/likelihood.py runs/mfpo_100k/* --out benchmark/results/likelihood/likelihood_100k

# The same on Ant; and on Hopper with atoms 6 apart instead of 32.
more=(python benchmark/sweep.py --runs-dir runs/mfpo_100k2 --seeds "${seeds[@]}")
"${more[@]}" --env-ids Ant-v4 --scripts "mfpo-K4-8-init32: $mfpo $init" "${flags[@]}"
"${more[@]}" --env-ids Hopper-v4 --scripts "mfpo-K4-8-init32-support500: $mfpo $init --v-min -100 --v-max 500" "${flags[@]}"
python benchmark/report.py runs/mfpo_100k2/* --normalize mfpo-K4-8-init32 --every 1000 --also diagnostics/q_std \
    diagnostics/edge_mass diagnostics/adn_log_prob_bias diagnostics/entropy losses/alpha diagnostics/ess_policy \
    diagnostics/q_action_std --beside benchmark/results/learning_curves/{mfpo_100k,mujoco_cpu,mujoco_cpu2}.csv \
    --out benchmark/results/learning_curves/mfpo_100k2

# The same on the two tasks that are left.
more=(python benchmark/sweep.py --runs-dir runs/mfpo_100k3 --seeds "${seeds[@]}")
"${more[@]}" --env-ids Walker2d-v4 Humanoid-v4 --scripts "mfpo-K4-8-init32: $mfpo $init" "${flags[@]}"
python benchmark/report.py runs/mfpo_100k3/* --normalize mfpo-K4-8-init32 --every 1000 --also diagnostics/q_std \
    diagnostics/edge_mass diagnostics/adn_log_prob_bias diagnostics/entropy losses/alpha diagnostics/ess_policy \
    diagnostics/q_action_std --beside benchmark/results/learning_curves/{mujoco_cpu,mujoco_cpu2}.csv --out benchmark/results/learning_curves/mfpo_100k3

# What keeps the temperature up on Walker2d: the paper's number of proposals, or a higher target of the entropy.
more=(python benchmark/sweep.py --runs-dir runs/mfpo_temperature --seeds "${seeds[@]}" --env-ids Walker2d-v4)
"${more[@]}" --scripts "mfpo-K16-32-init32: mfpo_continuous $init" "mfpo-K4-8-init32-rho0.25: $mfpo $init --rho 0.25" \
    "${flags[@]}"
python benchmark/report.py runs/mfpo_temperature/* --normalize mfpo-K16-32-init32 --every 1000 --also diagnostics/q_std \
    diagnostics/edge_mass diagnostics/adn_log_prob_bias diagnostics/entropy losses/alpha diagnostics/ess_policy \
    diagnostics/ess_gaussian diagnostics/q_action_std --beside benchmark/results/learning_curves/mfpo_100k3.csv \
    --out benchmark/results/proposals/mfpo_temperature
