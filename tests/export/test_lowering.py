"""Programs go to torch.onnx without a second trace, and mean what torch's own decomposition of them means."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.export import ExportedProgram

from prefix_export.graph import lowering
from prefix_export.graph.export import export_graph
from prefix_export.graph.passes.cleaning import clean
from prefix_export.models import load_base_model
from prefix_export.trace.attention import probe
from prefix_export.trace.cuda_decoder import CudaDecoder
from prefix_export.trace.decoder import FastDecoder, PortableDecoder
from tests.workshop import with_families


class Arithmetic(torch.nn.Module):
    """The operators that are replaced, one of each."""

    def forward(self, values):
        halves = values.to(torch.float16).to(values.device).type_as(values)
        both = (values > 0) & (values < 1)
        return 3 - halves, both, values + torch.tensor([0.5]), values.to(torch.float32)


class InPlace(torch.nn.Module):
    def forward(self, values):
        copy = values.clone()
        copy.add_(1)
        return copy


def captured(module):
    rows = torch.export.Dim("rows")
    return torch.export.export(module, (torch.linspace(-2, 2, 12).reshape(3, 4),), dynamic_shapes=({0: rows},))


def ran(program, values):
    graph = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=21, verbose=False)
    clean(graph.model)
    return [np.asarray(output) for output in graph(values)]


def test_a_lowered_program_computes_what_torchs_own_decomposition_does():
    values = torch.linspace(-3, 3, 20).reshape(5, 4)
    program = captured(Arithmetic())
    expected = ran(program, values)
    lowered = lowering.lowered(captured(Arithmetic()))
    assert lowered is not None
    for left, right in zip(ran(lowered, values), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def test_lowering_leaves_the_program_itself_as_it_was():
    program = captured(Arithmetic())
    before = str(program.graph)
    lowering.lowered(program)
    assert str(program.graph) == before


def test_a_program_that_changes_a_tensor_in_place_is_traced_again():
    assert lowering.lowered(captured(InPlace())) is None


@pytest.mark.parametrize("decoder", [FastDecoder, PortableDecoder, CudaDecoder])
@pytest.mark.parametrize("architecture", with_families(["gpt2"], ["llama"]))
def test_decoders_are_exported_without_a_second_trace(workshop, tmp_path, monkeypatch, architecture, decoder):
    def refuse(*_args, **_kwargs):
        raise AssertionError("traced again")

    base = load_base_model(str(workshop.model(architecture)))
    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    made = decoder(base.model, probe(base.model), torch.float32)
    export_graph(made, base.geometry.context_length, tmp_path / "model.onnx", opset=21)
    assert (tmp_path / "model.onnx").is_file()
