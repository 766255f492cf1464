"""What silently goes wrong: numbers that training hardly moved, heads of another model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_export.fold import fold
from prefix_export.lint import lint, lint_prompt
from prefix_export.models import load_base_model
from prefix_export.shape import BOTH, DECODER, ENCODER, Shape
from prefix_runtime import LayerGeometry

ROOT = Path(__file__).parents[2]
LAYERS, HEADS, HEAD_DIM = 4, 4, 16
HIDDEN, WIDTH = HEADS * HEAD_DIM, 2 * LAYERS * HEADS * HEAD_DIM
LENGTH, MIDDLE = 40, 256
GEOMETRY = (LayerGeometry(HEADS, HEAD_DIM),) * LAYERS
GPT2 = Shape("gpt2", DECODER, {"decoder": GEOMETRY}, HIDDEN)
BART = Shape("bart", BOTH, dict.fromkeys(("decoder", "cross", "encoder"), GEOMETRY), HIDDEN)
BERT = Shape("bert", ENCODER, {"encoder": GEOMETRY}, HIDDEN)
UNTRAINED = "it may have been trained hardly or not"


def warnings_of(path, shape, load=pytest.fail):
    """Everything that `inspect` would say of numbers that were not trained."""
    folded = fold(path, shape, load)
    lines = [*folded.warnings, *(line for prefix in folded.prefixes.values() for line in lint(prefix, shape))]
    return [line for line in lines if UNTRAINED in line]


class Reparameterised(torch.nn.Module):
    """Tables and MLPs as Li and Liang's code and those behind it make them: torch's own initial values."""

    def __init__(self, lead="", ends=("",), mlp="control_trans"):
        super().__init__()
        for end in ends:
            self.add_module(f"{lead}wte{end}", torch.nn.Embedding(LENGTH, HIDDEN))
            layers = torch.nn.Linear(HIDDEN, MIDDLE), torch.nn.Tanh(), torch.nn.Linear(MIDDLE, WIDTH)
            self.add_module(f"{lead}{mlp}{end}", torch.nn.Sequential(*layers))


def control_prefixes():
    state = Reparameterised(ends=("", "2", "_enc")).state_dict()
    return state | {f"M_Prefixes.wte_{each}cats.weight": torch.randn(4, HIDDEN) for each in ("", "2_", "enc_")}


def adapterhub():
    start = "gpt2.prefix_tuning.prefix_tunings.a.self_prefix."
    return {f"{start}{name}": tensor for name, tensor in Reparameterised().state_dict().items()}


def p_tuning_v2(deviation):
    """With an MLP, as torch begins or as transformers does with what a base model lacks."""
    trans = torch.nn.Sequential(torch.nn.Linear(HIDDEN, MIDDLE), torch.nn.Tanh(), torch.nn.Linear(MIDDLE, WIDTH))
    if deviation:
        for layer in (trans[0], trans[2]):
            torch.nn.init.normal_(layer.weight, std=deviation)
            torch.nn.init.zeros_(layer.bias)
    state = {f"prefix_encoder.trans.{name}": tensor for name, tensor in trans.state_dict().items()}
    return state | {"prefix_encoder.embedding.weight": torch.randn(LENGTH, HIDDEN)}


FRESH = {
    "Li & Liang, GPT-2": (lambda: Reparameterised().state_dict(), GPT2),
    "Li & Liang, flat": (lambda: {"control_trans": torch.randn(LENGTH * WIDTH)}, GPT2),
    "Li & Liang, BART": (lambda: Reparameterised(ends=("", "2", "_enc")).state_dict(), BART),
    "UnifiedSKG": (lambda: Reparameterised(ends=("", "_dec", "_enc")).state_dict(), BART),
    "OpenPrompt": (lambda: Reparameterised("decoder_").state_dict(), GPT2),
    "Control Prefixes": (control_prefixes, BART),
    "AdapterHub": (adapterhub, GPT2),
    "P-tuning v2": (lambda: {"prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH) * 0.02}, BERT),
    "P-tuning v2, torch's MLP": (lambda: p_tuning_v2(None), BERT),
    "P-tuning v2, transformers' MLP": (lambda: p_tuning_v2(0.02), BERT),
}


def saved(folder, state):
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"m_prefix_len": 2}))
    (folder / "adapter_config.json").write_text(json.dumps({"config": {"prefix_length": LENGTH}}))
    return folder


@pytest.mark.parametrize("name", FRESH)
def test_initial_numbers_are_noticed_and_moved_ones_are_not(tmp_path, name):
    make, shape = FRESH[name]
    torch.manual_seed(0)
    state = make()
    assert warnings_of(saved(tmp_path, state), shape)
    for tensor in state.values():
        tensor.add_(0.3 * tensor.std() * torch.randn(tensor.shape))
    assert not warnings_of(saved(tmp_path, state), shape)


def test_a_few_steps_of_training_are_enough(tmp_path):
    """Embeddings hardly move in them; the MLP does."""
    torch.manual_seed(0)
    prefix = Reparameterised()
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=5e-5)
    wanted = torch.randn(LENGTH, WIDTH)
    for _ in range(20):
        optimizer.zero_grad()
        loss = (prefix.control_trans(prefix.wte.weight) - wanted).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert not warnings_of(saved(tmp_path, prefix.state_dict()), GPT2)


@pytest.mark.parametrize("task", ["describe", "headline", "json"])
def test_the_demos_prefixes_are_trained(task):
    config = AutoConfig.from_pretrained(ROOT / "examples" / "demo" / "model")
    base = lambda: load_base_model(str(ROOT / "examples" / "demo" / "model"))  # noqa: E731
    assert warnings_of(ROOT / "examples" / "demo" / "prefixes" / task, Shape.of_config("demo", config), base) == []


class TestPeft:
    @pytest.fixture(scope="class")
    def base(self, workshop):
        return load_base_model(str(workshop.model("gpt2")))

    def adapter(self, workshop, folder, config):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(workshop.model("gpt2")), config)
        model.save_pretrained(folder)
        return folder

    @pytest.mark.parametrize(
        ("config", "found"),
        [
            (PrefixTuningConfig(num_virtual_tokens=40), "torch.nn.Embedding"),
            (PrefixTuningConfig(num_virtual_tokens=40, init_weights="zero"), "almost 0"),
            (PromptTuningConfig(num_virtual_tokens=160), "torch.nn.Embedding"),
            (PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"), "still those of words"),
            (MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=20), "prefix_task_rows: "),
            (CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
             "still those of words"),
        ],
        ids=["prefix", "zero", "prompt", "prompt of words", "multitask", "CPT"],
    )  # fmt: skip
    def test_a_new_adapter_is_noticed(self, workshop, base, tmp_path, config, found):
        config.task_type = "CAUSAL_LM"
        lines = warnings_of(self.adapter(workshop, tmp_path / "new", config), base.shape, lambda: base)
        assert any(found in line for line in lines), lines

    def test_behind_an_mlp_it_cannot_be_told(self, workshop, base, tmp_path):
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=40, prefix_projection=True)
        assert warnings_of(self.adapter(workshop, tmp_path / "new", config), base.shape) == []


def test_lesters_uniform_prompt_is_noticed():
    random = np.random.default_rng(0)
    prompt = random.uniform(-0.5, 0.5, (200, 64)).astype(np.float32)
    assert any(UNTRAINED in line for line in lint_prompt(prompt))
    assert not list(lint_prompt(prompt + random.normal(0, 0.05, prompt.shape).astype(np.float32)))
