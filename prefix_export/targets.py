"""What each target needs: the flavour of the graph, its opset, what it may hold, and where it lies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import ExportError

MODES = ("feed", "bake")
ADAPTERS = ("onnx",)


@dataclass(frozen=True)
class Target:
    """What a graph is made for.

    Attributes:
        flavour: "fast" or "portable".
        opset: of ONNX' own operators, by default.
        caches: what keys and values may be kept in, by precision, the default first.
        modes: whether prefixes are fed, baked, or either.
        graphs: the graph's path in the bundle, by precision of the weights, the default first.
        has_weights_apart: whether the weights lie in a file of their own, beside the graph.
        is_for_gpu: whether CUDA kernels run the graph.
        has_output_scales: whether a rounded weight has one scale for each output, not one for each block of its inputs.
    """

    flavour: str
    opset: int
    caches: Mapping[str, tuple[str, ...]]
    modes: tuple[str, ...]
    graphs: Mapping[str, str]
    has_weights_apart: bool
    is_for_gpu: bool = False
    has_output_scales: bool = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """Of the weights, the default first."""
        return tuple(self.graphs)


_FAST_CACHES = ("fp32", "fp16", "int8")
_CUDA_CACHES = MappingProxyType({"fp16": ("fp16",), "bf16": ("bf16",), "int4": ("fp16",), "int8": ("fp16",)})
_PORTABLE_CACHES = MappingProxyType({"fp32": ("fp32",), "fp16": ("fp16",), "int8": ("fp32",)})

# Opset 21 has the blockwise DequantizeLinear that 8-bit weights need. optimum, onnxruntime-genai and transformers.js
# ran 22 and 23 too, which bring these graphs nothing and would leave older onnxruntimes out.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "cpu": Target(
            flavour="fast",
            opset=21,
            caches=MappingProxyType(dict.fromkeys(("fp32", "int8", "int4"), _FAST_CACHES)),
            modes=("feed",),
            graphs=MappingProxyType(dict.fromkeys(("fp32", "int8", "int4"), "model.onnx")),
            has_weights_apart=True,
        ),
        # Opset 21 again: of no newer one has onnxruntime 1.32 every CUDA kernel.
        "cuda": Target(
            flavour="fast",
            opset=21,
            caches=_CUDA_CACHES,
            modes=("feed",),
            graphs=MappingProxyType(dict.fromkeys(_CUDA_CACHES, "model.onnx")),
            has_weights_apart=True,
            is_for_gpu=True,
        ),
        "portable": Target(
            flavour="portable",
            opset=21,
            caches=_PORTABLE_CACHES,
            modes=MODES,
            graphs=MappingProxyType(dict.fromkeys(("fp32", "fp16", "int8"), "model.onnx")),
            has_weights_apart=True,
        ),
        # Folder and names as transformers.js expects them: `dtype` fp32, fp16, and q8, its default on a CPU.
        "web": Target(
            flavour="portable",
            opset=21,
            caches=_PORTABLE_CACHES,
            modes=MODES,
            graphs=MappingProxyType(
                {"int8": "onnx/model_quantized.onnx", "fp32": "onnx/model.onnx", "fp16": "onnx/model_fp16.onnx"}
            ),
            has_weights_apart=False,
        ),
        # A parser of TensorRT's takes it. Of blocks it takes scales above 0 alone, which the quantisers here do not
        # give, and TensorRT for RTX keeps their weights in 16 bits.
        "tensorrt": Target(
            flavour="portable",
            opset=21,
            caches=MappingProxyType({"fp32": ("fp32",), "fp16": ("fp16",), "int8": ("fp16",)}),
            modes=MODES,
            graphs=MappingProxyType(dict.fromkeys(("fp32", "fp16", "int8"), "model.onnx")),
            has_weights_apart=True,
            has_output_scales=True,
        ),
    }
)

_OPSETS = range(18, 24)
"""That torch.onnx 2.13 writes and onnxruntime 1.32 runs."""


@dataclass(frozen=True)
class GraphPlan:
    """A target with what was chosen of what it offers; see `build.BuildRequest`."""

    name: str
    target: Target
    mode: str
    precision: str
    cache: str
    opset: int
    has_adapters: bool = False

    @property
    def activations(self) -> str:
        """What the graph computes in: "fp32", "fp16" or "bf16"."""
        if self.precision in ("fp16", "bf16"):
            return self.precision
        # Where weights are rounded for what computes in 16 bits, keys and values are of these alone.
        return "fp16" if self.target.caches[self.precision] == ("fp16",) else "fp32"

    @property
    def graph(self) -> str:
        """The graph's path in the bundle."""
        return self.target.graphs[self.precision]


def plan(
    target: str | None,
    mode: str,
    precision: str | None,
    cache: str | None,
    opset: int | None,
    *,
    adapters: str | None = None,
) -> GraphPlan:
    """What is to be made, defaults filled in.

    Args:
        target: one of `TARGETS`; None stands for "cpu", or for "portable" where prefixes are baked or come as adapters.
        mode: "feed" or "bake".
        precision: of the weights; None takes the target's first.
        cache: what keys and values are kept in; None takes the target's first.
        opset: of ONNX' own operators; None takes the target's.
        adapters: "onnx", or None.

    Raises:
        ExportError: there is no such target, or it does not offer what was chosen.
    """
    _expect("mode", mode, MODES)
    if adapters is not None:
        _expect("adapters", adapters, ADAPTERS)
        _expect("adapters: mode", mode, ("feed",))
    name = target if target is not None else ("portable" if mode == "bake" or adapters else "cpu")
    _expect("target", name, TARGETS)
    wanted_target = TARGETS[name]
    if mode not in wanted_target.modes:
        fitting = ", ".join(other for other, each in TARGETS.items() if mode in each.modes)
        offered = ", ".join(wanted_target.modes)
        raise ExportError(f"target {name}: mode: expected {offered}, found {mode!r}; for it take {fitting}")
    precision = precision if precision is not None else wanted_target.precisions[0]
    _expect(f"target {name}: precision", precision, wanted_target.precisions)
    caches = wanted_target.caches[precision]
    cache = cache if cache is not None else caches[0]
    _expect(f"target {name}, precision {precision}: cache", cache, caches)
    chosen = wanted_target.opset if opset is None else opset
    least = 21 if precision == "int8" and wanted_target.flavour == "portable" else _OPSETS[0]
    if not least <= chosen <= _OPSETS[-1]:
        why = " for int8 in standard operators" if least > _OPSETS[0] else ""
        raise ExportError(f"opset: expected {least} to {_OPSETS[-1]}{why}, found {chosen}")
    if adapters is not None and (wanted_target.flavour != "portable" or name == "tensorrt"):
        raise ExportError(f"adapters: expected target portable or web, found {name!r}")
    return GraphPlan(name, wanted_target, mode, precision, cache, chosen, adapters is not None)


def _expect(what: str, actual: str, choices: Collection[str]) -> None:
    if actual not in choices:
        raise ExportError(f"{what}: expected one of {', '.join(choices)}, found {actual!r}")
