"""What each target offers, what it takes by default, and what is refused by name."""

from __future__ import annotations

import pytest

from prefix_export.errors import ExportError
from prefix_export.targets import TARGETS, plan


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, "feed", None, None, None), ("cpu", "fast", "fp32", "fp32", 21, "model.onnx")),
        ((None, "bake", None, None, None), ("portable", "portable", "fp32", "fp32", 21, "model.onnx")),
        (("portable", "feed", "fp16", None, 18), ("portable", "portable", "fp16", "fp16", 18, "model.onnx")),
        (("web", "feed", None, None, None), ("web", "portable", "int8", "fp32", 21, "onnx/model_quantized.onnx")),
        (("web", "bake", "fp32", None, 23), ("web", "portable", "fp32", "fp32", 23, "onnx/model.onnx")),
        (("cuda", "feed", None, None, None), ("cuda", "fast", "fp16", "fp16", 21, "model.onnx")),
        (("cuda", "feed", "bf16", None, None), ("cuda", "fast", "bf16", "bf16", 21, "model.onnx")),
        (("tensorrt", "bake", None, None, None), ("tensorrt", "portable", "fp32", "fp32", 21, "model.onnx")),
        (("tensorrt", "feed", "int8", None, None), ("tensorrt", "portable", "int8", "fp16", 21, "model.onnx")),
        (("cpu", "feed", "int4", "int8", None), ("cpu", "fast", "int4", "int8", 21, "model.onnx")),
    ],
)
def test_what_is_not_given_is_the_targets(given, expected):
    found = plan(*given)
    assert (found.name, found.target.flavour, found.precision, found.cache, found.opset, found.graph) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("tpu", "feed", None, None, None), "target: expected one of cpu, cuda, portable, web, tensorrt, found 'tpu'"),
        ((None, "melt", None, None, None), "mode: expected one of feed, bake, found 'melt'"),
        (
            ("cpu", "bake", None, None, None),
            "target cpu: mode: expected feed, found 'bake'; targets with it: portable, web, tensorrt",
        ),
        (("cpu", "feed", "fp16", None, None), "target cpu: precision: expected one of fp32, int8, int4, found 'fp16'"),
        (("cuda", "feed", "int4", "int8", None), "cuda, precision int4: cache: expected one of fp16, found 'int8'"),
        (("web", "feed", "int4", None, None), "target web: precision: expected one of int8, fp32, fp16, found 'int4'"),
        (("web", "bake", "fp32", "int8", None), "precision fp32: cache: expected one of fp32, found 'int8'"),
        (
            ("tensorrt", "feed", "int4", None, None),
            "target tensorrt: precision: expected one of fp32, fp16, int8, found 'int4'",
        ),
        (("tensorrt", "feed", "int8", "fp32", None), "tensorrt, precision int8: cache: expected one of fp16, found"),
        (("portable", "feed", None, None, 17), "opset: expected 18 to 23, found 17"),
        (("portable", "feed", None, None, 24), "opset: expected 18 to 23, found 24"),
        (("portable", "feed", "int8", None, 20), "opset: expected 21 to 23 for int8 in standard operators, found 20"),
    ],
)
def test_what_a_target_does_not_offer_is_refused_by_name(given, message):
    with pytest.raises(ExportError, match=message):
        plan(*given)


@pytest.mark.parametrize("name", TARGETS)
def test_every_precision_has_a_cache_and_a_path(name):
    target = TARGETS[name]
    assert set(target.precisions) == set(target.caches) == set(target.graphs)
