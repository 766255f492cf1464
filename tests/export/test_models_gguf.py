"""Base models in GGUF files: the numbers of the model that they were made of, or one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGMLQuantizationType as Kind
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prefix_export.build.recipe import BuildRequest, build, verify_against
from prefix_export.cli import main as cli
from prefix_export.errors import ModelError, UnsupportedArchitectureError
from prefix_export.models import load_base_model, load_config
from prefix_runtime import Bundle

# Names of llama.cpp for the tensors of transformers' Llama, in a layer and outside.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
KINDS = {"ffn_up": Kind.Q8_0, "ffn_down": Kind.Q4_1, "attn_v": Kind.F16, "token_embd": Kind.Q8_0}
"""All others are float32."""


def tensors_of(config):
    """Pairs of llama.cpp's and transformers' names."""
    for layer in range(config.num_hidden_layers):
        for short, name in LAYER.items():
            yield f"blk.{layer}.{short}", f"model.layers.{layer}.{name}"
    yield from OUTSIDE.items()


def kind_of(name, kinds):
    return kinds.get(name.rpartition(".")[2], Kind.F32)


def interleaved(weight, heads):
    """A projection's rows as llama.cpp rotates them: pairs lie side by side."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, folder, kinds=KINDS, architecture="llama", leave_out=(), values=(), tensors=()):
    """A Llama's folder as a GGUF file, its tokenizer included if it has one; numpy holds the file's truth."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for add, *arguments in values:
        getattr(writer, add)(*arguments)
    if (folder / "tokenizer.json").exists():
        add_tokenizer(writer, folder)
    for name, source in tensors_of(config):
        weight = state[f"{source}.weight"].numpy()
        if name.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
            weight = interleaved(weight, heads)
        if name not in leave_out:
            kind = kind_of(name, kinds)
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    for name, array in tensors:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    special = set(tokenizer.all_special_tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")


@pytest.fixture(scope="module")
def source(workshop):
    return workshop.model("llama", tokenizer=True)


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", source)


@pytest.fixture(scope="module")
def original(source):
    """The model with the numbers that the file can hold."""
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    for name, place in tensors_of(model.config):
        kind = kind_of(name, KINDS)
        weight = model.get_submodule(place).weight
        rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
        weight.data = torch.from_numpy(np.array(rounded, np.float32))
    return model


@pytest.fixture(scope="module")
def base(file):
    return load_base_model(str(file))


def refusal(path, kind=ModelError):
    with pytest.raises(kind) as caught:
        load_base_model(str(path))
    message = str(caught.value)
    assert message.startswith(f"model {str(path)!r}: expected ")
    assert "\n" not in message
    return message


def test_logits_are_those_of_the_model_that_the_file_was_made_of(base, original):
    ids = torch.tensor([[3, 99, 200, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(base.model(ids).logits, original(ids).logits, atol=1e-5, rtol=0)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}


def test_it_is_called_by_the_files_stem(base):
    assert (base.name, base.shape.name, base.revision) == ("tiny.Q8_0", "tiny.Q8_0", None)


def test_the_tokenizer_is_the_files(base, source):
    text = "the quick brown fox, naïve: 12 <|end|>"
    expected = AutoTokenizer.from_pretrained(source)
    assert base.tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert base.tokenizer.eos_token == "<|end|>"
    assert base.tokenizer.chat_template.startswith("{% for")


def test_what_was_loaded_is_a_plain_model_that_can_be_saved(base, tmp_path):
    base.model.save_pretrained(tmp_path / "saved")
    base.tokenizer.save_pretrained(tmp_path / "saved")
    written = "".join(path.read_text() for path in (tmp_path / "saved").glob("*.json"))
    assert "gguf" not in written.lower()
    assert "quantization_config" not in written
    assert load_base_model(str(tmp_path / "saved")).fingerprint == base.fingerprint


def test_a_bundle_of_it_agrees_with_peft(workshop, file, source, tmp_path):
    adapter = workshop.adapter(source, 5)
    result = build(BuildRequest(str(file), {"p": adapter}, tmp_path / "bundle"))
    assert result.bundle.manifest.model.name == "tiny.Q8_0"
    assert result.parity["p"].reference.startswith("peft")
    assert {parity.error < 1e-4 for parity in result.parity.values()} == {True}
    verify_against(Bundle.open(tmp_path / "bundle"), str(file))


def test_fold_and_inspect_take_it(workshop, file, source, tmp_path):
    adapter = workshop.adapter(source, 5)
    for command in (["inspect", adapter], ["fold", adapter, "--output", tmp_path / "p.safetensors"],
                    ["fold", "--text", "the fox", "--output", tmp_path / "t.safetensors"]):  # fmt: skip
        result = CliRunner().invoke(cli.main, [str(part) for part in (*command, "--model", file)])
        assert result.exit_code == 0, result.output
    assert "prefix of length 5 for decoder (3 layers)" in CliRunner().invoke(
        cli.main, ["inspect", str(adapter), "--model", str(file)]
    ).output  # fmt: skip


def test_a_folder_with_one_file_is_taken(base, file):
    assert load_base_model(str(file.parent)).fingerprint == base.fingerprint


def test_a_folder_with_several_files_lists_them(file, tmp_path):
    for name in ("b.gguf", "a.gguf"):
        shutil.copy(file, tmp_path / name)
    assert "found 2 (a.gguf, b.gguf); name one of them" in refusal(tmp_path)


def test_files_beside_it_are_not_looked_at(base, file, tmp_path):
    copy = Path(shutil.copy(file, tmp_path / "tiny.gguf"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"):
        (tmp_path / name).write_text("{")
    found = load_base_model(str(copy))
    assert found.fingerprint == base.fingerprint
    assert found.tokenizer("fox")["input_ids"] == base.tokenizer("fox")["input_ids"]


def test_weights_in_a_folder_go_before_a_file_beside_them(file, source, tmp_path, base):
    folder = Path(shutil.copytree(source, tmp_path / "both"))
    shutil.copy(file, folder)
    assert load_base_model(str(folder)).fingerprint != base.fingerprint


def test_a_file_without_a_tokenizer_has_none(workshop, tmp_path):
    assert load_base_model(str(write_gguf(tmp_path / "m.gguf", workshop.model("llama")))).tokenizer is None


def test_a_file_of_a_repository_on_the_hub_is_found_in_the_cache(file, tmp_path, monkeypatch, base):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("0123abc")
    shutil.copy(file, snapshot / "tiny.gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load_base_model("org/tiny/tiny.gguf")
    assert (found.fingerprint, found.name, found.revision) == (base.fingerprint, "tiny", "0123abc")


@pytest.mark.parametrize("kept", [0, 3, 20, 300, 3000, -10, -5000])
def test_a_file_that_is_cut_off_is_refused(file, tmp_path, kept):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:kept])
    assert "GGUF file" in refusal(path)


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"PK\x03\x04\x03\0\0\0", r"begins with b'PK"),
        (b"GGUF\x01\0\0\0", "found version 1"),
        (b"GGUF\x09\0\0\0", "found version 9"),
        (b"GGUF\0\0\0\x03", "found one in big-endian"),
        (b"GGUF\x03\0\0\0" + struct.pack("<QQ", 1 << 60, 1 << 60), "damaged in its header"),
    ],
    ids=["zip", "version 1", "version 9", "big-endian", "absurd counts"],
)
def test_a_file_that_begins_in_another_way_is_refused(file, tmp_path, start, found):
    path = tmp_path / "other.gguf"
    path.write_bytes(start + file.read_bytes()[len(start) :])
    assert found in refusal(path)


def test_random_damage_is_refused_or_changes_numbers_alone(file, tmp_path):
    random, content = np.random.default_rng(0), file.read_bytes()
    path = tmp_path / "damaged.gguf"
    for _ in range(20):
        damaged = bytearray(content)
        for place in random.integers(4, 2000, size=4):
            damaged[place] = random.integers(256)
        path.write_bytes(damaged)
        try:
            load_config(str(path))
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017  # most damage is refused, some is not seen


def test_tensors_that_are_missing_are_named(source, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", source, leave_out={"blk.1.ffn_up"})
    assert "found 1 missing: model.layers.1.mlp.up_proj.weight" in refusal(path)


def test_an_architecture_that_transformers_cannot_load_is_named_with_those_that_it_can(source, tmp_path):
    message = refusal(write_gguf(tmp_path / "m.gguf", source, architecture="rwkv7"), UnsupportedArchitectureError)
    assert "llama, " in message
    assert message.endswith("found 'rwkv7'")


def test_experts_under_the_name_of_a_dense_architecture_are_refused(source, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", source, values=[("add_expert_count", 8)])
    assert "found one with 8 experts" in refusal(path, UnsupportedArchitectureError)


def test_a_part_of_several_files_is_refused(file, source, tmp_path):
    named = Path(shutil.copy(file, tmp_path / "tiny-00001-of-00003.gguf"))
    counted = write_gguf(tmp_path / "m.gguf", source, values=[("add_uint16", "split.count", 3)])
    for path in (named, counted):
        assert "found one part of several; merge them: llama-gguf-split --merge" in refusal(path)


@pytest.mark.parametrize("name", ["none.gguf", "org/none.gguf", "org/none/none.gguf", "folder/none.GGUF"])
def test_a_file_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refusal(name).endswith("expected a GGUF file, found no such file")


def test_the_package_gguf_is_asked_for(file, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert "pip install 'prefix-export[gguf]'" in refusal(file)


def test_nothing_is_written_for_a_file_that_is_refused(file, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:-5000])
    result = CliRunner().invoke(cli.main, ["build", "--model", str(path), "--output", str(tmp_path / "bundle")])
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["cut.gguf"]


SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}  # fmt: skip


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    """A Llama with the rotary scaling of Llama 3.1, and the factors that llama.cpp stores for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=131072, rope_parameters={"rope_theta": 500000.0, **SCALING},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("llama3")
    model.save_pretrained(folder)
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    return folder, (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)


def test_the_rotary_scaling_of_llama_3_is_kept(llama_3, tmp_path):
    folder, factors = llama_3
    assert factors.min() == pytest.approx(1)
    assert factors.max() == pytest.approx(8)
    path = write_gguf(tmp_path / "m.gguf", folder, kinds={}, tensors=[("rope_freqs.weight", factors)])
    found, expected = load_base_model(str(path)).model, AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(found.model.rotary_emb.inv_freq, expected.model.rotary_emb.inv_freq, rtol=1e-6)
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, expected(ids).logits, atol=1e-5, rtol=0)


def test_other_rotary_factors_are_refused(llama_3, tmp_path):
    folder, factors = llama_3
    path = write_gguf(tmp_path / "m.gguf", folder, kinds={}, tensors=[("rope_freqs.weight", factors**1.1)])
    assert "expected the rotary scaling of Llama 3 in rope_freqs.weight, found other factors" in refusal(path)


def test_rotary_scaling_that_transformers_leaves_out_is_refused(source, tmp_path):
    scaled = [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)]
    path = write_gguf(tmp_path / "m.gguf", source, values=scaled)
    assert "found scaling of type 'linear', which it leaves out" in refusal(path)


def test_a_sliding_window_that_transformers_leaves_out_is_said(source, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", source, values=[("add_sliding_window", 24)])
    (warning,) = load_base_model(str(path)).warnings
    assert "leaves out the file's sliding window of 24 positions" in warning
