#!/usr/bin/env bash
# What each optimisation of the scripts gains on a CPU: updates per second with it over those without.
#     bash benchmark/gains.sh            THREADS="1 2" for more than one thread, ROUNDS=5 for more rounds
set -euo pipefail
cd "$(dirname "$0")/.."
peers=()
without() { # SCRIPT CHANGE: a script without an optimisation that it has
    peers+=(--peer "$1_continuous:without $2=python benchmark/changed.py $1_continuous $2")
}
with() { # SCRIPT CHANGE: a script with one that was tried and not kept
    peers+=(--peer "$1_continuous:with $2=python benchmark/changed.py $1_continuous $2")
}
for script in mfpo smfp; do
    for change in concat_linear keep_freed_memory fused_adam unfilled_memory onednn; do without $script $change; done
done
for change in fused_adam unfilled_memory onednn; do without sac $change; done
with mfpo states_by_parts
with mfpo elementary_layer_norm
eager=("${peers[@]}") peers=()
for change in fused_bias two_pass_variance; do without mfpo $change; done

for threads in ${THREADS:-1}; do
    # SAC last: its updates are the shortest, and what is timed first in a round has been seen to come out slow.
    python benchmark/speed.py --scripts mfpo_continuous smfp_continuous sac_continuous --threads "$threads" \
        --rounds "${ROUNDS:-3}" --shapes Hopper Humanoid --tasks \
        "${eager[@]}" --out "benchmark/results/speed/gains_threads$threads"
    rm "benchmark/results/speed/gains_threads$threads.png" # too many bars to read
    python benchmark/speed.py --scripts mfpo_continuous --compile --threads "$threads" --rounds "${ROUNDS:-3}" \
        --shapes Hopper Humanoid --tasks "${peers[@]}" --out "benchmark/results/speed/gains_compiled_threads$threads"
    rm "benchmark/results/speed/gains_compiled_threads$threads.png"
done
