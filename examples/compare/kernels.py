"""The projections of a decode step alone, by operator and block: how near onnxruntime's kernels come to reading.

    python examples/compare/kernels.py --rounds 9 --threads 2 [--rows 8]

A chain of products of one row, or of a batch, with the sizes of GPT-2-medium's, random weights. They take turns, with
memory's bandwidth read before each; what is counted is the weights with the scales of their blocks, as in `bench`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from figures import markdown_table, quartiles, show
from onnx import TensorProto, helper, numpy_helper

from prefix_runtime.backends.onnxruntime.huge_pages import on_huge_pages
from prefix_runtime.bench.bandwidth import BandwidthProbe
from prefix_runtime.machine import processor_name

WIDTH, LAYERS, VOCABULARY, STEPS = 1024, 24, 50257, 12
OUTPUTS = (3 * WIDTH, WIDTH, 4 * WIDTH, WIDTH)
"""Of a layer's projections: query, key and value; attention's; up; down, which reads what up gives."""
CONTESTANTS = {
    **{
        f"MatMulNBits, {bits} bits, blocks of {block}": (bits, block) for bits in (8, 4) for block in (32, 64, 128, 256)
    },
    "DynamicQuantizeMatMul, 8 bits, a scale a column": (8, None),
    "MatMul, float32": (32, None),
}


@dataclass
class Chain:
    """A session of the chain, the bytes that it reads, and for each turn its seconds and the bandwidth before."""

    session: ort.InferenceSession
    nbytes: float
    turns: list[tuple[float, float]] = field(default_factory=list)

    def take_turn(self, probe: BandwidthProbe, rows: np.ndarray) -> None:
        """Note the median of some runs."""
        bandwidth, times = probe.measure(), [time.perf_counter()]
        for _ in range(STEPS):
            self.session.run(None, {"x": rows})
            times.append(time.perf_counter())
        self.turns.append((float(np.median(np.diff(times))), bandwidth))


class Graph:
    """A chain of products, as it grows."""

    def __init__(self, bits: int, block: int | None) -> None:
        self._bits, self._block, self._random = bits, block, np.random.default_rng(0)
        self._nodes: list[onnx.NodeProto] = []
        self._constants = [numpy_helper.from_array(np.array(each), f"c{each}") for each in ([0], [1], [WIDTH])]
        self.nbytes = 0.0

    def add(self, source: str, inputs: int, outputs: int) -> str:
        """Multiply with a weight [inputs, outputs]; returns the product's name."""
        name = f"y{len(self._nodes)}"
        self.nbytes += inputs * outputs * (self._bits / 8 + (4 / self._block if self._block else 0))
        if self._block:
            shape = (outputs, inputs // self._block, self._block * self._bits // 8)
            # Of whole numbers around the middle, so large that a product is about as large as what it is of.
            scales = np.full(outputs * shape[1], _scale(self._bits, inputs), np.float32)
            given = [self._numbers(shape), scales]
            options = {"K": inputs, "N": outputs, "bits": self._bits, "block_size": self._block, "accuracy_level": 4}
            self._emit("MatMulNBits", source, given, name, domain="com.microsoft", **options)
        elif self._bits == 8:
            values = self._random.integers(-127, 128, size=(inputs, outputs), dtype=np.int8)
            given = [values, np.full(outputs, _scale(self._bits, inputs), np.float32)]
            self._emit("DynamicQuantizeMatMul", source, given, name, domain="com.microsoft")
        else:
            weight = self._random.standard_normal((inputs, outputs), np.float32) / np.float32(inputs**0.5)
            self._emit("MatMul", source, [weight], name)
        return name

    def first(self, source: str) -> str:
        """The first numbers of each row."""
        name = f"y{len(self._nodes)}"
        self._nodes.append(helper.make_node("Slice", [source, "c[0]", f"c[{WIDTH}]", "c[1]"], [name]))  # axis 1
        return name

    def opened(self, output: str, threads: int) -> ort.InferenceSession:
        """A session, on huge pages as the runtime's."""
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
            for name, size in (("x", WIDTH), (output, VOCABULARY))
        ]
        graph = helper.make_graph(self._nodes, "chain", ends[:1], ends[1:], self._constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        with on_huge_pages():
            model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
            return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def _numbers(self, shape: tuple[int, ...]) -> np.ndarray:
        """Bytes of one number or two, which lie evenly around the middle."""
        if self._bits == 8:
            return self._random.integers(1, 256, size=shape, dtype=np.uint8)
        low, high = self._random.integers(1, 16, size=(2, *shape), dtype=np.uint8)
        return low | high << 4

    def _emit(self, operator: str, source: str, given: Sequence[np.ndarray], name: str, **options: Any) -> None:
        names = [f"{name}.{index}" for index in range(len(given))]
        self._constants += [numpy_helper.from_array(array, each) for array, each in zip(given, names, strict=True)]
        self._nodes.append(helper.make_node(operator, [source, *names], [name], **options))


def _scale(bits: int, inputs: int) -> float:
    """With which evenly distributed whole numbers multiply a row to one as long."""
    return float((12 / inputs) ** 0.5 / 2**bits)


def chain(bits: int, block: int | None, threads: int) -> Chain:
    """All projections of a step, the output's included."""
    graph, row = Graph(bits, block), "x"
    for _ in range(LAYERS):
        wide = graph.add(row, WIDTH, OUTPUTS[0])
        up = graph.add(graph.add(graph.first(wide), WIDTH, OUTPUTS[1]), WIDTH, OUTPUTS[2])
        row = graph.add(up, OUTPUTS[2], OUTPUTS[3])
    return Chain(graph.opened(graph.add(row, WIDTH, VOCABULARY), threads), graph.nbytes)


def check(name: str, product: np.ndarray) -> None:
    """Refuse a chain that ends in nothing: zeros and infinities may be multiplied at another speed."""
    size = float(np.abs(product).mean())
    if not 1e-3 < size < 1e3:
        raise ArithmeticError(f"{name}: expected products about as large as what they are of, found {size}")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    given = parser.parse_args()
    chains = {name: chain(*settings, given.threads) for name, settings in CONTESTANTS.items()}
    probe, random = BandwidthProbe(given.threads), np.random.default_rng(0)
    batch = random.standard_normal((given.rows, WIDTH), np.float32)
    for name, found in chains.items():
        check(name, found.session.run(None, {"x": batch})[0])
    for _ in range(given.rounds + 1):
        for index in random.permutation(len(chains)):
            list(chains.values())[index].take_turn(probe, batch)
    rows = []
    for name, found in chains.items():
        seconds, bandwidths = map(np.array, zip(*found.turns[1:], strict=True))  # the first round warms up
        over_floor = show(quartiles(seconds * bandwidths / found.nbytes))
        speed = f"{found.nbytes / np.median(seconds) / 1e9:.1f}"
        rows.append((name, f"{found.nbytes / 1e6:.0f}", show(quartiles(seconds), 1e3), speed, over_floor))
    everywhere = np.median([bandwidth for found in chains.values() for _, bandwidth in found.turns])
    where = f"{processor_name()}, {given.threads} threads, rows: {given.rows}"
    print(f"{where}, memory read at {everywhere / 1e9:.1f} GB/s\n")
    print("\n".join(markdown_table(("", "MB", "ms", "GB/s", "/ reading them"), rows)))


if __name__ == "__main__":
    main()
