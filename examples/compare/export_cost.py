"""What an export costs, in seconds and peak memory, and how fast the commands answer; each in a process of its own.

    python examples/compare/export_cost.py

GPT-2-medium geometry with random weights and a PEFT adapter of prefix length 200: `build` without and with its
comparison. The peak is the process' resident memory over the size of the weights. Then, medians of nine: `--help` of
both commands and the import of the runtime.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_model import save_random_adapter, save_random_model
from transformers import AutoModelForCausalLM


def run(*command: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of a Python process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{command}: failed")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random_model("gpt2-medium", folder / "model")
        save_random_adapter(AutoModelForCausalLM.from_pretrained(folder / "model"), 200, folder / "adapter")
        weights = (folder / "model" / "model.safetensors").stat().st_size
        build = ["-m", "prefix_export", "build", "--model", str(folder / "model"), "--prefix", str(folder / "adapter")]
        for comparison in ("--no-verify", "--verify"):
            seconds, peak = run(*build, "--output", str(folder / comparison), comparison)
            print(f"build {comparison}: {seconds:.1f} s, peak {peak / 1e9:.2f} GB, {peak / weights:.2f} of the weights")
    for command in (
        ["-m", "prefix_export", "--help"],
        ["-m", "prefix_runtime", "--help"],
        ["-c", "import prefix_runtime"],
    ):
        print(f"python {' '.join(command)}: {statistics.median(run(*command)[0] for _ in range(9)):.2f} s")


if __name__ == "__main__":
    main()
