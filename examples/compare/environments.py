"""Environments of their own, for peers whose packages do not go with the product's; made on demand and kept."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LISTED_SWITCHES = {
    "avx_vnni": "GGML_AVX_VNNI",
    "avx512f": "GGML_AVX512",
    "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI",
    "avx512_bf16": "GGML_AVX512_BF16",
}


class PreparationError(Exception):
    """Something that a peer needs could not be had; the message goes into the table."""


@dataclass(frozen=True)
class Environment:
    """What pip installs, and the variables that it builds under."""

    requirements: tuple[str, ...]
    options: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


def run(command: list[str], log: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run a command, its output in a log.

    Raises:
        PreparationError: it failed; with the last line that it printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            command, stdout=output, stderr=output, env=os.environ | dict(variables or {}), check=False
        )
    if done.returncode:
        raise PreparationError(last_line(log) or f"{command[0]}: exit code {done.returncode}")


def last_line(log: Path) -> str:
    """The last line of a log, where Python names its error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def python_of(name: str, folder: Path, given: Path | None) -> str:
    """The interpreter of an environment: the one that is given, or that of `folder/name`, made where it is not there.

    Raises:
        PreparationError: it could not be made.
    """
    if given:
        if not given.is_file():
            raise PreparationError(f"--{name}-python: expected an interpreter, found none at {given}")
        return str(given)
    home = folder / name
    python, installed = str(home / "bin" / "python"), home / ".installed"
    if not installed.exists():
        print(f"making the environment {home}", file=sys.stderr)
        run([sys.executable, "-m", "venv", "--clear", str(home)], folder / "logs" / f"venv-{name}.log")
        environment = ENVIRONMENTS[name]
        command = [python, "-m", "pip", "install", "--quiet", *environment.options, *environment.requirements]
        run(command, folder / "logs" / f"install-{name}.log", environment.variables)
        installed.touch()
    return python


def _llama_cpp_variables() -> dict[str, str]:
    """How llama.cpp is compiled: for this processor, without AMX.

    On a machine that has AMX but does not permit it to user processes, a build by `-march=native` alone dies in
    `llama_decode` at its first tile instruction. Without ggml's own GGML_NATIVE its other switches are off until they
    are named.
    """
    if platform.machine() != "x86_64":
        return {}
    flags = "-march=native -mno-amx-int8 -mno-amx-tile -mno-amx-bf16"
    listed = Path("/proc/cpuinfo").read_text().split()
    switches = ["GGML_AVX", "GGML_AVX2", "GGML_FMA", "GGML_F16C", "GGML_BMI2"]
    switches += [switch for feature, switch in _LISTED_SWITCHES.items() if feature in listed]
    on = " ".join(f"-D{switch}=ON" for switch in switches)
    return {"CMAKE_ARGS": f"-DGGML_NATIVE=OFF -DCMAKE_C_FLAGS='{flags}' -DCMAKE_CXX_FLAGS='{flags}' {on}"}


ENVIRONMENTS = {
    "optimum": Environment(("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.6")),
    "genai": Environment(
        (
            "torch==2.13.0",
            "transformers==5.23.0",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            "onnxruntime==1.32.0",
            "onnxruntime-genai==0.18.0",
        )
    ),
    "llama": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy", "safetensors"),
        # A wheel that pip kept may have been compiled with other switches.
        options=("--no-cache-dir", "--no-binary", "llama-cpp-python"),
        variables=_llama_cpp_variables(),
    ),
}
