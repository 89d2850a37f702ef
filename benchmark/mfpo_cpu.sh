#!/usr/bin/env bash
# MFPO as far as two CPU cores get in three hours: with K1 : K2 = 4 : 8 for the paper's 16 : 32, learning from step 1,000
# (paper: 10,000). The same beside SAC and SMFP, on one task with and without --critic-init-std, and the ablations.
#     bash benchmark/mfpo_cpu.sh
# Restarted, it goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
small="mfpo_continuous --policy-proposals 4 --gaussian-proposals 8"
cheetah="$small --no-clipped-double-q" # the paper's setting on HalfCheetah
sweep=(python benchmark/sweep.py --runs-dir runs/mfpo_cpu --seeds 1)
flags=(-- --learning-starts 1000 --eval-frequency 2000)

"${sweep[@]}" --env-ids HalfCheetah-v4 "${flags[@]}" --total-timesteps 13000 \
    --scripts "mfpo: $cheetah" "mfpo-init32: $cheetah --critic-init-std 32"
