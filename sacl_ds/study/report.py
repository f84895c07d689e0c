"""Summary of a study as files."""

from __future__ import annotations

from pathlib import Path

from sacl_ds.study.plan import Plan
from sacl_ds.study.plots import plot_arms, plot_sweeps
from sacl_ds.study.summary import Results, rows, save_csv, table, verdict


def write_summary(plan: Plan, results: Results, out: Path) -> str:
    """Write table.md, trials.csv, arms.png and sweeps.png into `out`; returns the table with the verdict."""
    found = rows(plan, results)
    if not found:
        return "no arm has all its seeds yet"
    text = "\n\n".join([table(found), *verdict(found)])
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text + "\n")
    save_csv(plan, results, out / "trials.csv")
    plot_arms(found, out / "arms.png")
    plot_sweeps(plan, found, out / "sweeps.png")
    return text
