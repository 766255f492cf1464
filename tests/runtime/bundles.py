"""The bundles of the runtime's tests, made before they run where neither torch nor the exporter is installed.

python -m tests.runtime.bundles FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.workshop import Workshop

BUNDLES = (
    {},
    {"tokenizer": False},
    {"precision": "int8"},
    {"precision": "int4"},
    {"precision": "fp32"},
    {"precision": "int4", "cache": "int8"},
    {"cache": "fp32"},
    {"cache": "int8"},
    {"cache": "fp16"},
    {"target": "portable"},
    {"target": "cuda"},
    {"mode": "bake"},
    {"tokenizer": False, "target": "tensorrt", "mode": "feed", "verify": False},
    {"tokenizer": False, "target": "tensorrt", "mode": "bake", "verify": False},
)
"""Arguments of `Workshop.bundle`."""


def main() -> None:
    """Make them."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(folder)
    for options in BUNDLES:
        workshop.bundle(**options)


if __name__ == "__main__":
    main()
