"""The table of MFPO's paper, from what benchmark/speed.py measured: steps, ms per action, updates per second.

    bash benchmark/paper_table.sh PEERS                                  # measures, then calls this
    python benchmark/paper_table.py benchmark/results/speed/paper_table.csv    # prints it again

For each size it prints a Markdown table, the fastest action first, and beside it what the paper has on its own machine
(arXiv 2604.14698). Ratios are to our SAC, eager, in the same run; the paper's are to its SAC. Draws <csv>.png.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmark.speed import MODES

PAPER = {  # ms per action
    "SAC": 0.15,
    "TD3": 0.14,
    "FlowRL": 0.42,
    "MFPO": 0.46,
    "SAC-Flow": 0.96,
    "DIME": 0.97,
    "DACER": 1.06,
    "MaxEntDP": 1.56,
    "QVPO": 1.68,
}


def method(script: str, mode: str) -> str:
    """What a row of the CSV is called in the table: a peer by its name, ours by its algorithm and mode."""
    kind, *variant = mode.split()
    if kind not in MODES:
        return mode
    words = [script.removesuffix("_continuous").upper(), *variant]
    return f"{' '.join(words)}, ours, {kind}"


def published(name: str) -> float | None:
    """The paper's milliseconds for a peer, which may have whose code it is in brackets."""
    return PAPER.get(name.split(" (")[0])


def read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by size, method and quantity."""
    sizes: dict = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            rows = sizes.setdefault(row["place"], {}).setdefault(method(row["script"], row["mode"]), {})
            rows[row["quantity"]] = float(row["median"])
    return {size: rows for size, rows in sizes.items() if any("ms per action" in row for row in rows.values())}


def table(rows: dict[str, dict[str, float]]) -> str:
    """Markdown of one size, the fastest action first."""
    sac = rows["SAC, ours, eager"]
    lines = [
        "| method | steps | ms per action | x SAC | updates/s | SAC's / its | paper: ms | x its SAC |",
        "|-" * 8 + "|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["ms per action"]):
        rate = row.get("updates/s")
        paper = published(name)
        cells = [name, f"{row.get('steps', 0):.0f}", f"{row['ms per action']:.3f}"]
        cells += [f"{row['ms per action'] / sac['ms per action']:.1f}"]
        cells += [f"{rate:.3g}", f"{sac['updates/s'] / rate:.1f}"] if rate else ["", ""]
        cells += [f"{paper}", f"{paper / PAPER['SAC']:.1f}"] if paper else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(sizes: dict, path: Path) -> None:
    """A panel for each size: ms per action, ours in blue, with the paper's figures as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1 + 0.22 * max(len(rows) for rows in sizes.values())
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.2 * len(sizes), height), layout="constrained", squeeze=False)
    for axis, (size, rows) in zip(axes[0], sizes.items(), strict=True):
        ordered = sorted(rows.items(), key=lambda item: -item[1]["ms per action"])
        names = [name for name, _ in ordered]
        colors = ["#0072B2" if "ours" in name else "#999999" for name in names]
        axis.barh(names, [row["ms per action"] for _, row in ordered], color=colors)
        crosses = [(published(name), i) for i, name in enumerate(names) if published(name)]
        if crosses:
            axis.plot(*zip(*crosses, strict=True), "x", color="#D55E00", label="paper, its machine")
            axis.legend(fontsize=7)
        axis.set(xscale="log", xlabel="ms per action", title=f"{size}'s sizes")
        axis.tick_params(labelsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python benchmark/paper_table.py CSV, a file that benchmark/speed.py wrote")
    sizes = read(Path(sys.argv[1]))
    for size, rows in sizes.items():
        print(f"{size}'s sizes\n\n{table(rows)}\n")
    draw(sizes, Path(sys.argv[1]).with_suffix(".png"))
