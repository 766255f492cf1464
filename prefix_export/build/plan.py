"""A base model to the graph that a plan asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from prefix_export.graph.export import export_graph
from prefix_export.models import BaseModel, cast_weights
from prefix_export.models.experts import traceable_experts
from prefix_export.progress import SILENT, Progress
from prefix_export.quantize.modules import QuantizedModel
from prefix_export.targets import GraphPlan
from prefix_export.trace.cuda_decoder import CudaDecoder
from prefix_export.trace.decoder import Decoder, FastDecoder, PortableDecoder
from prefix_export.trace.prefix_bank import PrefixBank
from prefix_export.verify.yardstick import Arithmetic
from prefix_runtime import LayerPrefix, Prefix

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def arithmetic(plan: GraphPlan, scales: Sequence[LayerPrefix] | None) -> Arithmetic:
    """What the graph of a plan computes with; `scales` as of `export_plan`."""
    activations, cache = _TYPES[plan.activations], _TYPES[plan.cache]
    return Arithmetic(activations, None if cache == activations else cache, scales)


def export_plan(
    base: BaseModel,
    plan: GraphPlan,
    prefixes: Mapping[str, Prefix],
    folder: Path,
    *,
    quantized: QuantizedModel | None,
    scales: tuple[LayerPrefix, ...] | None,
    progress: Progress = SILENT,
) -> int:
    """Write a graph into a bundle's folder; the model's weights are cast to what it computes in.

    Args:
        base: the frozen model.
        plan: what for.
        prefixes: by task, for a graph that holds them.
        folder: the bundle's.
        quantized: the model's weights in 8 or 4 bits, where the plan asks for them.
        scales: of keys and values, where the plan keeps them in int8.
        progress: told of the layers that are traced, and of what follows.

    Returns:
        The bytes of weights that a decode step reads.

    Raises:
        ExportError, OSError: as `export_graph` does.
    """
    cast_weights(base.model, _TYPES[plan.activations])
    decoder: Decoder
    if plan.target.flavour == "portable":
        bank = PrefixBank.of(prefixes) if plan.mode == "bake" else None
        decoder = PortableDecoder(base.model, base.layers, _TYPES[plan.cache], bank, takes_prefix=plan.has_adapters)
    elif plan.target.is_for_gpu:
        decoder = CudaDecoder(base.model, base.layers, _TYPES[plan.cache])
    else:
        decoder = FastDecoder(base.model, base.layers, _TYPES[plan.cache], scales)
    path = folder / plan.graph
    path.parent.mkdir(exist_ok=True)
    with traceable_experts(base.model), quantized.packed(plan.target) if quantized else nullcontext():
        return export_graph(
            decoder,
            base.geometry.context_length,
            path,
            opset=plan.opset,
            has_weights_apart=plan.target.has_weights_apart,
            progress=progress,
        )
