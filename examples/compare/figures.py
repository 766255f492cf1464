"""Figures with their spread, and what the machine could do at best."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

PASSES = ("first request", "later requests")
"""Over tasks asked for in turn, as workers name them."""
BITS = {"float32": 32, "int8": 8, "int4": 4}


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """The `first` quartile, the `median` and the `third`."""
    found = np.percentile(values, (25, 50, 75))
    return dict(zip(("first", "median", "third"), map(float, found), strict=True))


def show(figure: dict[str, float] | None, scale: float = 1.0, digits: int = 2) -> str:
    """`median [first, third]`, scaled; a dash where there is none."""
    if figure is None:
        return "—"
    median, first, third = (f"{figure[key] * scale:.{digits}f}" for key in ("median", "first", "third"))
    return f"{median} [{first}, {third}]"


def read_bandwidth() -> float:
    """Bytes a second that torch reads when it sums 1.6 GB, the best of some runs."""
    numbers = torch.ones(400_000_000)

    def seconds() -> float:
        started = time.perf_counter()
        numbers.sum()
        return time.perf_counter() - started

    return numbers.nbytes / min(seconds() for _ in range(8))


def step_bytes(model: PreTrainedModel, precision: str, prefix_length: int) -> float:
    """What a decode step has to read: weights without scales and without the table of positions, and the prefix."""
    positions = sum(p.numel() for name, p in model.named_parameters() if name.endswith("wpe.weight"))
    weights = sum(parameter.numel() for parameter in model.parameters()) - positions
    return weights * BITS[precision] / 8 + prefix_bytes(model.config, prefix_length)


def prefix_bytes(config: PreTrainedConfig, length: int) -> int:
    """Bytes of a float32 prefix."""
    head_dim = config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return 2 * config.num_hidden_layers * heads * length * head_dim * 4


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Its lines."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]
