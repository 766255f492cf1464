"""What silently goes wrong: numbers that training hardly moved, heads of another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import (
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoConfig, AutoModelForCausalLM

from prefix_export.models import load_base_model
from prefix_export.models.model_shape import BOTH, DECODER, ENCODER, ModelShape
from prefix_export.prefixes.fold import fold
from prefix_export.prefixes.lint import lint, lint_prompt
from prefix_export.prefixes.task_heads import lint_head
from prefix_runtime import LayerGeometry

ROOT = Path(__file__).parents[2]
LAYERS, HEADS, HEAD_DIM = 4, 4, 16
HIDDEN, WIDTH = HEADS * HEAD_DIM, 2 * LAYERS * HEADS * HEAD_DIM
LENGTH, MIDDLE = 40, 256
GEOMETRY = (LayerGeometry(HEADS, HEAD_DIM),) * LAYERS
GPT2 = ModelShape("gpt2", DECODER, {"decoder": GEOMETRY}, HIDDEN)
BART = ModelShape("bart", BOTH, dict.fromkeys(("decoder", "cross", "encoder"), GEOMETRY), HIDDEN)
BERT = ModelShape("bert", ENCODER, {"encoder": GEOMETRY}, HIDDEN)
UNTRAINED = "it may be untrained"


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
    assert warnings_of(ROOT / "examples" / "demo" / "prefixes" / task, ModelShape.of_config("demo", config), base) == []


class TestPeft:
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
            (PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"), "still equal embeddings"),
            (MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=2, num_ranks=20), "prefix_task_rows: "),
            (CPTConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, cpt_token_ids=[5, 6], cpt_mask=[1, 1],
                       cpt_tokens_type_mask=[1, 2]), "still equal embeddings"),
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


ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification),
}


class TestHeads:
    def config(self, name, **options):
        return ENCODERS[name][0](vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                                 intermediate_size=32, max_position_embeddings=128, **options)  # fmt: skip

    def lines(self, prefix, name, **options):
        return list(lint_head(prefix, ModelShape.of_config(name, self.config(name, **options))))

    def peft(self, name, folder):
        torch.manual_seed(0)
        config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
        get_peft_model(ENCODERS[name][1](self.config(name, num_labels=3)), config).save_pretrained(folder)
        return fold(folder, ModelShape.of_config(name, self.config(name)), pytest.fail).prefixes[""]

    def p_tuning_v2(self, name, folder):
        torch.manual_seed(0)
        state = {
            "prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH),
            "classifier.weight": torch.randn(3, HIDDEN),
            "classifier.bias": torch.randn(3),
            f"{name}.pooler.dense.weight": torch.randn(HIDDEN, HIDDEN),
            f"{name}.pooler.dense.bias": torch.randn(HIDDEN),
        }
        torch.save(state, folder / "pytorch_model.bin")
        return fold(folder, BERT, pytest.fail).prefixes[""]

    @pytest.mark.parametrize(("own", "other"), [("bert", "roberta"), ("roberta", "bert")])
    def test_pefts_head_of_another_architecture_is_noticed(self, tmp_path, own, other):
        prefix = self.peft(own, tmp_path / "adapter")
        assert self.lines(prefix, own) == []
        (line,) = self.lines(prefix, other)
        expected = {"bert": "classifier.weight, classifier.bias", "roberta": "classifier.dense.weight"}[other]
        assert f"head: expected {expected}" in line
        assert f"as a {other!r} has for SEQ_CLS" in line

    @pytest.mark.parametrize(("own", "other"), [("bert", "roberta"), ("roberta", "bert")])
    def test_p_tuning_v2s_pooler_of_another_architecture_is_noticed(self, tmp_path, own, other):
        prefix = self.p_tuning_v2(own, tmp_path)
        assert self.lines(prefix, own) == []
        (line,) = self.lines(prefix, other)
        assert f"trained on a model of kind {own!r}, but this one is {other!r}" in line

    def test_labels_that_the_base_names_are_counted(self, tmp_path):
        prefix = self.peft("roberta", tmp_path / "adapter")
        assert self.lines(prefix, "roberta", num_labels=3) == []
        (line,) = self.lines(prefix, "roberta", num_labels=5)
        assert "classifier.out_proj.weight: has 3 labels, but the model's configuration names 5" in line

    def test_a_bias_of_another_size_is_noticed(self, tmp_path):
        prefix = self.peft("bert", tmp_path / "adapter")
        head = {**prefix.head, "classifier.bias": np.zeros(4, np.float32)}
        (line,) = self.lines(replace(prefix, head=head), "bert")
        assert line == "head classifier.weight: has 3 outputs, its bias has shape [4]: they do not belong together"

    def test_a_head_of_another_width_is_noticed(self, tmp_path):
        prefix = self.peft("bert", tmp_path / "adapter")
        head = {**prefix.head, "classifier.weight": np.zeros((3, 32), np.float32)}
        (line,) = self.lines(replace(prefix, head=head), "bert")
        assert "head classifier.weight: takes 32 numbers, but 'bert' has a hidden size of 64" in line
