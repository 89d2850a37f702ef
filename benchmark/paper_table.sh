#!/usr/bin/env bash
# The table of MFPO's paper, measured on one machine in one run: ours and the peers that are at hand.
#     bash benchmark/paper_table.sh PEERS
# PEERS has a folder for each peer that is to be timed, named as its adapter in benchmark/peers/, with a clone of its
# repository, PEERS/<name>/checkout, and an environment, PEERS/<name>/venv; the adapters' docstrings say how to make them.
# Stop everything else first. It takes half an hour: an update of some peers takes seconds.
set -euo pipefail
peers=$(realpath "$1")
cd "$(dirname "$0")/.."
declare -A names=([mfpo]="MFPO (authors)" [maxentdp]=MaxEntDP [dacer]=DACER [qvpo]=QVPO [flowrl]=FlowRL [dime]=DIME
    [sac_flow]=SAC-Flow [cleanrl_sac]="SAC (CleanRL)" [cleanrl_td3]="TD3 (CleanRL)")
flags=()
for name in "${!names[@]}"; do
    if [ -x "$peers/$name/venv/bin/python" ]; then
        command="$peers/$name/venv/bin/python benchmark/peers/$name.py $peers/$name/checkout"
        flags+=(--peer "sac_continuous:${names[$name]}=$command")
    fi
done
for steps in 1 4 8 16; do
    flags+=(--variant "mfpo_continuous:T$steps=--sampling-steps $steps")
done
python benchmark/speed.py --compile --rounds 3 --shapes Hopper Humanoid --tasks --threads 1 "${flags[@]}" \
    --out benchmark/results/speed/paper_table
python benchmark/paper_table.py benchmark/results/speed/paper_table.csv | tee -a benchmark/results/speed/paper_table.md
