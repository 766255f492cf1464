"""A prefix baked beside `GroupQueryAttention`, measured against how `--mode bake` does it: interleaved in one run.

    python examples/compare/baking_fast.py [--model gpt2-medium] [--lengths 10 200] [--rounds 9]

The operator attends to one array, and a client that knows nothing of prefixes gives a past without one. So the graph
has to join prefix and past, the operator copies both into its present, and the prefix is cut off again. Prints, by
prefix length, the median decode step in milliseconds with its quartiles, and the ratio to the prefix fed to the fast
flavour, taken within a round. All graphs must give the same greedy tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from figures import markdown_table, quartiles, show
from random_model import CONFIGS, save_random_adapter, save_random_model
from transformers import AutoModelForCausalLM

from prefix_export.build import BuildRequest, build
from prefix_runtime import Bundle, Engine, Prefix, load
from prefix_runtime.backends.onnxruntime.backend import OnnxRuntime
from prefix_runtime.backends.onnxruntime.session import Session
from prefix_runtime.machine import processor_name

TASK = "task"
PROMPT = list(range(5, 37))
FED, BESIDE, JOINED = "fed, fast", "baked, as `--mode bake` does", "baked, GroupQueryAttention"
PAST, PRESENT, LENGTHS, TOTAL = 3, 1, 5, 6
"""Places among the operator's inputs and outputs."""


def bake_joined(source: Path, prefix: Prefix, target: Path) -> None:
    """Write a fast graph that holds a prefix: joined with the past before each operator, cut off behind it."""
    model = ir.load(source)
    inputs = {value.name: value for value in model.graph.inputs}
    operators = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    length = prefix.prefix_length
    first = operators[0]
    # Positions, lengths and total are the same for every layer: each is moved once, where it arises.
    moved = [
        (inputs["position_ids"], np.array(prefix.position_base, np.int64)),
        (first.inputs[LENGTHS], np.array(length, np.int32)),
        (first.inputs[TOTAL], np.array(length, np.int32)),
    ]
    for value, count in moved:
        assert value is not None
        users = list(value.uses())
        node = ir.node("Add", [value, _constant(model.graph, f"{value.name}.moved_by", count)])
        _insert_behind(model.graph, value, node)
        for use in users:
            use.node.replace_input_with(use.idx, node.outputs[0])
    bounds = [
        _constant(model.graph, f"prefix.{name}", np.array([number], np.int64))
        for name, number in (("start", length), ("end", np.iinfo(np.int64).max), ("axis", 2))
    ]
    for operator, layer in zip(operators, prefix.sites["decoder"], strict=True):
        for part, array in enumerate((layer.key, layer.value)):
            past, present = operator.inputs[PAST + part], operator.outputs[PRESENT + part]
            assert past is not None
            held = _constant(model.graph, f"prefix.{past.name}", array[None].astype(np.float32))
            join = ir.node("Concat", [held, past], {"axis": 2})
            model.graph.insert_before(operator, join)
            operator.replace_input_with(PAST + part, join.outputs[0])
            cut = ir.node("Slice", [present, *bounds])
            model.graph.insert_after(operator, cut)
            model.graph.outputs[model.graph.outputs.index(present)] = cut.outputs[0]
            cut.outputs[0].name, present.name = present.name, f"joined.{present.name}"
            cut.outputs[0].dtype, present.shape = present.dtype, None
    ir.save(model, target, external_data=f"{target.name}.data")


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _insert_behind(graph: ir.Graph, value: ir.Value, node: ir.Node) -> None:
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)


def engines(source: Path, length: int, folder: Path, threads: int) -> dict[str, Engine]:
    """An engine for each way; what all are compared with comes first."""
    adapter = folder / f"adapter-{length}"
    save_random_adapter(AutoModelForCausalLM.from_pretrained(source), length, adapter)
    made = {}
    for name, options in ((FED, {}), (BESIDE, {"mode": "bake"})):
        print(f"building: {name}, prefix {length}", file=sys.stderr)
        output = folder / f"bundle-{length}-{len(made)}"
        build(BuildRequest(str(source), {TASK: adapter}, output, verify=False, **options))  # type: ignore[arg-type]
        made[name] = load(output, threads=threads, prepare=False)
    baked: Bundle = made[BESIDE].bundle
    graph = folder / f"joined-{length}" / "model.onnx"
    graph.parent.mkdir()
    bake_joined(made[FED].bundle.graph_path, baked.prefix(TASK), graph)
    made[JOINED] = Engine(baked, OnnxRuntime(baked, Session(graph, threads=threads)), baked.manifest.max_length)
    return made


def step_seconds(engine: Engine, new_tokens: int) -> tuple[float, tuple[int, ...]]:
    """The median decode step of a generation, and its tokens."""
    result = engine.generate(token_ids=PROMPT, task=TASK, max_new_tokens=new_tokens, ignore_end=True)
    return float(np.median(result.metrics.inter_token_latencies)), tuple(result.token_ids)


def measure(made: dict[str, Engine], rounds: int, new_tokens: int) -> dict[str, list[float]]:
    """Seconds a step of each, a figure a round; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in made}
    expected = step_seconds(made[FED], new_tokens)[1]
    random = np.random.default_rng(0)
    for number in range(rounds + 1):
        for name in random.permutation(list(made)):
            seconds, tokens = step_seconds(made[name], new_tokens)
            if tokens != expected:
                sys.exit(f"{name}: expected the tokens of the prefix as it is fed, found others")
            if number:
                found[name].append(seconds)
    return found


def main() -> None:
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="gpt2-medium")
    parser.add_argument("--lengths", type=int, nargs="+", default=[10, 200])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model"
        save_random_model(arguments.model, source)
        for length in arguments.lengths:
            made = engines(source, length, Path(folder), arguments.threads)
            found = measure(made, arguments.rounds, arguments.new_tokens)
            for name, seconds in found.items():
                ratios = [own / other for own, other in zip(seconds, found[FED], strict=True)]
                rows.append((name, length, show(quartiles(seconds), 1e3), show(quartiles(ratios))))
    command = f"python examples/compare/baking_fast.py {' '.join(sys.argv[1:])}".strip()
    print(f"`{command}`: {processor_name()}, {arguments.threads} threads\n")
    print("\n".join(markdown_table(("graph", "prefix", "ms a token", f"/ {FED}"), rows)))


if __name__ == "__main__":
    main()
