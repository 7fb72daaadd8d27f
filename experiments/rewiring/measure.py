"""Finished runs under changed routing: results.csv, a row for each run and change.

python experiments/rewiring/measure.py RUN ... [--changes rewiring oracle] [--words max_items=150]

Each row is one `routerlab eval run=RUN test_time=...`: the same held-out data without and with the
change, and what it cost. Rows of the same run and change are replaced.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHANGES = {
    "rewiring": ["test_time=rewiring"],
    "rewiring_eta_1": ["test_time=rewiring", "test_time.eta=1"],
    "rewiring_eta_10": ["test_time=rewiring", "test_time.eta=10"],
    "rewiring_all_layers": ["test_time=rewiring", "test_time.eta=1", "test_time.selection=all"],
    "c3po": ["test_time=c3po"],
    "oracle": ["test_time=oracle", "test_time.eta=10"],
}
NUMBERS = ("val/accuracy", "val/loss", "val/bits_per_byte")
COLUMNS = (
    "run", "seed", "change", "items", "accuracy", "accuracy_changed", "loss", "loss_changed",
    "bits_per_byte", "bits_per_byte_changed", "seconds", "seconds_changed", "preparation_seconds",
    "forward_passes", "backward_passes", "tokens",
)  # fmt: skip


def main() -> int:
    """Measures, one evaluation after the other; prints each row as it is done."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--words", nargs="*", default=[], help="more words for routerlab eval")
    arguments = parser.parse_args()
    for run in arguments.runs:
        for change in arguments.changes:
            row = measure(run.resolve(), change, arguments.words)
            print(row, flush=True)
            keep(row)
    return 0


def measure(run: Path, change: str, words: list[str]) -> dict[str, Any]:
    """One evaluation, in a process of its own."""
    command = [sys.executable, "-m", "routerlab.cli.main", "eval", f"run={run}"]
    subprocess.run([*command, *CHANGES[change], *words], check=True, stdout=subprocess.DEVNULL)
    found = json.loads((run / "evaluation.json").read_text())
    changed = found["test_time"]
    row: dict[str, Any] = {"run": run.parent.name, "change": change}
    row["seed"] = run.name.removeprefix("seed_")
    row["items"] = found["metrics"].get("val/items")
    for number in NUMBERS:
        name = number.removeprefix("val/")
        row[name] = found["metrics"].get(number)
        row[f"{name}_changed"] = changed["metrics"].get(number)
    row |= {"seconds": found["seconds"], "seconds_changed": changed["seconds"]}
    row["preparation_seconds"] = changed["preparation_seconds"]
    return row | {k: changed["cost"][k] for k in ("forward_passes", "backward_passes", "tokens")}


def keep(row: dict[str, Any]) -> None:
    """Writes the row into results.csv, in the place of an older one."""
    path = HERE / "results.csv"
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    same = ("run", "seed", "change")
    rows = [old for old in rows if any(str(old[key]) != str(row[key]) for key in same)]
    rows = sorted([*rows, row], key=lambda r: (r["run"], r["change"], str(r["seed"])))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
