"""The contestants: what each is, what stands in for the prefix there, and the command of its worker."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from workshop import HERE, Workshop

REAL = "the prefix"
IN_CACHE = "a text prompt in its cache"
IN_REQUEST = "a text prompt in the request"
NONE = "none, the task is in its weights"


@dataclass(frozen=True)
class Contestant:
    """A row of the table.

    Attributes:
        label: for people.
        precision: of the weights: float32, int8 or int4 (block formats of 8 and 4 bits included).
        prefix: what stands in for the prefix: `REAL`, `IN_CACHE`, `IN_REQUEST` or `NONE`.
        command: prepares what the worker needs and names its command.
    """

    label: str
    precision: str
    prefix: str
    command: Callable[[Workshop], list[str]]


def _here(script: str, *arguments: object) -> list[str]:
    return _in(sys.executable, script, *arguments)


def _in(python: str, script: str, *arguments: object) -> list[str]:
    return [python, str(HERE / "peers" / script), *map(str, arguments)]


def _product(label: str, precision: str, *options: str, flags: Sequence[str] = ()) -> Contestant:
    """With `options` of its build and `flags` of its process."""

    def command(shop: Workshop) -> list[str]:
        return _here("product.py", shop.bundle(precision, *options), shop.order.threads, *flags)

    return Contestant(label, precision, REAL, command)


def _in_each_precision(suffix: str, label: str, *flags: str) -> dict[str, Contestant]:
    return {
        f"product-{precision}-{suffix}": _product(f"prefix-export, {precision}, {label}", precision, flags=flags)
        for precision in ("float32", "int8", "int4")
    }


def _graph(label: str, graph: Callable[[Workshop], Path]) -> Contestant:
    def command(shop: Workshop) -> list[str]:
        return _here("graph.py", graph(shop), shop.prefixes, shop.order.threads)

    return Contestant(label, "float32", REAL, command)


def _compiled(label: str, *options: str) -> Contestant:
    def command(shop: Workshop) -> list[str]:
        return _here("torch_compile.py", shop.model, shop.prefixes, shop.order.threads, *options)

    return Contestant(label, "float32", REAL, command)


def _peft(label: str, prefix: str, *options: str) -> Contestant:
    def command(shop: Workshop) -> list[str]:
        return _here("peft_eager.py", shop.model, shop.adapters, shop.order.threads, *options)

    return Contestant(label, "float32", prefix, command)


def _genai(label: str, precision: str, folder: Callable[[Workshop], Path]) -> Contestant:
    def command(shop: Workshop) -> list[str]:
        return _in(shop.python("genai"), "genai.py", folder(shop), shop.order.threads)

    return Contestant(label, precision, IN_CACHE, command)


def _llama_cpp(kind: str, precision: str, *options: str) -> Contestant:
    def command(shop: Workshop) -> list[str]:
        python, file = shop.python("llama"), shop.gguf(kind)
        return _in(python, "llamacpp.py", file, shop.order.threads, shop.order.longest_request, *options)

    return Contestant(f"llama.cpp, {kind}", precision, IN_CACHE, command)


def _text_in_product(shop: Workshop) -> list[str]:
    return _here("product.py", shop.bundle("float32"), shop.order.threads, "--as-text")


REFERENCE = "product-float32"
CONTESTANTS = {
    REFERENCE: _product("prefix-export, float32", "float32"),
    "product-int8": _product("prefix-export, int8", "int8"),
    "product-int4": _product("prefix-export, int4", "int4"),
    "product-int8-cache": _product("prefix-export, int8, keys and values too", "int8", "--cache", "int8"),
    "product-int4-cache": _product("prefix-export, int4, keys and values int8", "int4", "--cache", "int8"),
    "product-int8-64": _product("prefix-export, int8, block 64", "int8", "--block-size", "64"),
    "product-int8-128": _product("prefix-export, int8, block 128", "int8", "--block-size", "128"),
    "product-int8-256": _product("prefix-export, int8, block 256", "int8", "--block-size", "256"),
    "product-int4-128": _product("prefix-export, int4, block 128", "int4", "--block-size", "128"),
    **_in_each_precision("4k", "pages of 4 KiB", "--small-pages"),
    **_in_each_precision("kept", "the graph kept", "--kept"),
    "product-text": Contestant("prefix-export, float32, text as prompt", "float32", IN_REQUEST, _text_in_product),
    "peft-eager": _peft("PEFT, eager torch", REAL),
    "peft-lora": _peft("PEFT, eager torch, LoRA unmerged", NONE, "--lora"),
    "torch-compile": _compiled("torch.compile, static cache"),
    "torch-compile-frozen": _compiled("torch.compile, static cache, frozen weights", "--frozen"),
    "optimum": _graph("optimum's graph on onnxruntime", lambda shop: shop.optimum_graph),
    "transformers-exporter": _graph("transformers' exporter on onnxruntime", lambda shop: shop.transformers_graph),
    "genai-optimum": _genai("onnxruntime-genai, optimum's graph", "float32", lambda shop: shop.genai_graph),
    "genai-float32": _genai("onnxruntime-genai, its float32", "float32", lambda shop: shop.genai("float32")),
    "genai-int8": _genai("onnxruntime-genai, its int8", "int8", lambda shop: shop.genai("int8")),
    "genai-int4": _genai("onnxruntime-genai, its int4", "int4", lambda shop: shop.genai("int4")),
    # Its own default is a float16 cache; with float32 weights nothing is rounded, so that tokens show its conversion.
    "llama-f32": _llama_cpp("F32", "float32", "--float32-cache"),
    "llama-q8_0": _llama_cpp("Q8_0", "int8"),
    "llama-q4_0": _llama_cpp("Q4_0", "int4"),
}
