"""A chart of the results: CPU per request relative to the bare relay."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

CLIENTS = 64
TITLES = {"plain": "plain response", "stream": "100 chunks at once", "paced": "100 chunks, 5 ms apart"}
COLOURS = {"gptutor": "#1f6feb", "bare relay": "#8b949e", "nginx": "#3fb950", "litellm": "#d29922"}


def draw(report: dict[str, Any], file: Path) -> None:
    rows = [row for row in report["results"] if row["clients"] == CLIENTS and row["ratio"] is not None]
    kinds = [kind for kind in TITLES if any(row["kind"] == kind for row in rows)]
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 2.6), constrained_layout=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        bars = sorted((row for row in rows if row["kind"] == kind), key=lambda row: -row["ratio"])
        names = [row["subject"] for row in bars]
        container = axis.barh(names, [row["ratio"] for row in bars], color=[COLOURS.get(name, "#8b949e") for name in names])
        axis.bar_label(container, [f"{row['ratio']:.2f} × ({row['cpu_us']} µs)" for row in bars], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(0.05, max(row["ratio"] for row in bars) * 12)
        axis.axvline(1, color="#8b949e", linewidth=0.8, linestyle=":")
        axis.set_title(TITLES[kind], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.suptitle(f"CPU per request against a bare relay, {CLIENTS} clients (logarithmic)", fontsize=10)
    figure.savefig(file, dpi=150)
