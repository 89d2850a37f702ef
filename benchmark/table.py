"""Tables on disk."""

import csv
from pathlib import Path


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows, with the columns in the order in which they first appear; `path` has no ending, or any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
