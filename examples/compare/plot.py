"""Inter-token latency against prefix length, drawn from a report of `peft_eager.py`.

python examples/compare/plot.py examples/compare/peft_eager.json examples/compare/latency.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"eager": "#b3541e", "product": "#1f6f8b"}
LABELS = {"eager": "PEFT, eager torch", "product": "prefix-export on onnxruntime"}


def draw(report: Path, picture: Path) -> None:
    """Write the picture: medians with their quartiles."""
    content = json.loads(report.read_text())
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=160)
    for who, colour in COLOURS.items():
        rows = {
            int(name.rsplit(" ", 1)[1]): row["inter_token"]
            for name, row in content["seconds"].items()
            if name.startswith(who)
        }
        lengths = sorted(rows)
        medians = [rows[length]["median"] * 1e3 for length in lengths]
        spread = [
            [(rows[length]["median"] - rows[length]["first"]) * 1e3 for length in lengths],
            [(rows[length]["third"] - rows[length]["median"]) * 1e3 for length in lengths],
        ]
        axes.errorbar(lengths, medians, spread, color=colour, marker="o", capsize=3, label=LABELS[who])
        axes.annotate(
            f"{medians[-1]:.0f} ms", (lengths[-1], medians[-1]), (6, 0), textcoords="offset points", va="center"
        )
    floor = content["floor, seconds"] * 1e3
    axes.axhline(floor, color="#888888", linestyle="--", label="reading the weights once")
    axes.set(
        xlabel="prefix length (positions)",
        ylabel="ms a token",
        ylim=(0, None),
        title="GPT-2-medium, float32, 2 threads",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(picture)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
