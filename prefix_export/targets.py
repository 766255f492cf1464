"""The targets of a build: the graph's flavour, opset, precisions and path for each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import ExportError

MODES = ("feed", "bake")
ADAPTERS = ("onnx",)


@dataclass(frozen=True)
class Target:
    """The kind of program that will run the graph.

    Attributes:
        flavour: "fast" or "portable".
        opset: the default opset of ONNX's own operators.
        caches: for each precision, the possible types of cached keys and values, the default first.
        modes: "feed", "bake", or both.
        graphs: the graph's path in the bundle for each precision of the weights, the default first.
        has_weights_apart: whether the weights are in a separate file beside the graph.
        is_for_gpu: whether CUDA kernels run the graph.
        has_output_scales: whether a quantized weight has one scale for each output instead of one for each block of
            inputs.
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
        """The precisions of the weights, the default first."""
        return tuple(self.graphs)


_FAST_CACHES = ("fp32", "fp16", "int8")
_CUDA_CACHES = MappingProxyType({"fp16": ("fp16",), "bf16": ("bf16",), "int4": ("fp16",), "int8": ("fp16",)})
_PORTABLE_CACHES = MappingProxyType({"fp32": ("fp32",), "fp16": ("fp16",), "int8": ("fp32",)})

# Opset 21 has the blockwise DequantizeLinear that 8-bit weights need. optimum, onnxruntime-genai and transformers.js
# also ran 22 and 23, but these have no advantage for these graphs and exclude older versions of onnxruntime.
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
        # Opset 21 again: onnxruntime 1.32 lacks some CUDA kernels for newer ones.
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
        # Folder and names that transformers.js expects for its `dtype` fp32, fp16, and q8, its default on a CPU.
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
        # TensorRT's parser takes only positive scales for blocks, which the quantizers here do not guarantee, and
        # TensorRT for RTX would store blockwise weights in 16 bits. So each output has one scale.
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
"""Opsets that torch.onnx 2.13 can write and onnxruntime 1.32 can run."""


@dataclass(frozen=True)
class GraphPlan:
    """A target with the chosen options; see `build.BuildRequest`."""

    name: str
    target: Target
    mode: str
    precision: str
    cache: str
    opset: int
    has_adapters: bool = False

    @property
    def activations(self) -> str:
        """The type in which the graph computes: "fp32", "fp16" or "bf16"."""
        if self.precision in ("fp16", "bf16"):
            return self.precision
        # If a target computes quantized weights in 16 bits, float16 is the only type of its keys and values.
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
    """Check the options of a graph and fill in the defaults.

    Args:
        target: one of `TARGETS`; None takes "cpu", or "portable" with baked prefixes or adapters.
        mode: "feed" or "bake".
        precision: the precision of the weights; None takes the target's default.
        cache: the type of cached keys and values; None takes the target's default.
        opset: the opset of ONNX's own operators; None takes the target's.
        adapters: "onnx", or None.

    Raises:
        ExportError: an option is unknown, or the target does not offer it; the message lists the choices.
    """
    _expect("mode", mode, MODES)
    if adapters is not None:
        _expect("adapters", adapters, ADAPTERS)
        _expect("adapters: mode", mode, ("feed",))
    name = target if target is not None else ("portable" if mode == "bake" or adapters else "cpu")
    _expect("target", name, TARGETS)
    chosen = TARGETS[name]
    if mode not in chosen.modes:
        fitting = ", ".join(other for other, each in TARGETS.items() if mode in each.modes)
        offered = ", ".join(chosen.modes)
        raise ExportError(f"target {name}: mode: expected {offered}, found {mode!r}; targets with it: {fitting}")
    precision = precision if precision is not None else chosen.precisions[0]
    _expect(f"target {name}: precision", precision, chosen.precisions)
    caches = chosen.caches[precision]
    cache = cache if cache is not None else caches[0]
    _expect(f"target {name}, precision {precision}: cache", cache, caches)
    opset = chosen.opset if opset is None else opset
    least = 21 if precision == "int8" and chosen.flavour == "portable" else _OPSETS[0]
    if not least <= opset <= _OPSETS[-1]:
        why = " for int8 in standard operators" if least > _OPSETS[0] else ""
        raise ExportError(f"opset: expected {least} to {_OPSETS[-1]}{why}, found {opset}")
    if adapters is not None and (chosen.flavour != "portable" or name == "tensorrt"):
        raise ExportError(f"adapters: expected target portable or web, found {name!r}")
    return GraphPlan(name, chosen, mode, precision, cache, opset, adapters is not None)


def _expect(option: str, actual: str, choices: Collection[str]) -> None:
    if actual not in choices:
        raise ExportError(f"{option}: expected one of {', '.join(choices)}, found {actual!r}")
