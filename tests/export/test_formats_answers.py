"""Each family that cannot be installed: a model with the published prefix answers as the model with the folded one."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig
from transformers import AutoModelForSeq2SeqLM

import prefix_runtime
from prefix_export.models import load_base_model
from prefix_export.models.model_shape import ModelShape
from prefix_export.prefixes.fold import fold
from prefix_runtime.prefix.composition import concatenated
from tests.export.published import OWN, ZERO, cache_of, decoded, greedy, ours, theirs
from tests.export.test_fold import save_adapter
from tests.export.test_formats_families import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    WIDTH,
    mlp,
    past_key_values,
    saved,
    through,
)

TOKENS = 12
IDS = [5, 17, 300, 42, 8, 99]
SOURCE = torch.tensor([[7, 3, 55, 20, 31]])


def batched(numbers):
    """Keys and values [1, heads, length, head_dim] of a matrix, as the code bases arrange it."""
    return [(key[None].clone(), value[None].clone()) for key, value in past_key_values(numbers)]


def spread(model):
    """A random model whose answers depend on everything."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def check_keys_and_values(prefix, past):
    """A folded prefix is the published past: by site, a key and a value [1, heads, length, head_dim] for each layer."""
    assert set(prefix.sites) == set(past)
    for site, layers in past.items():
        for layer, (key, value) in zip(prefix.sites[site], layers, strict=True):
            np.testing.assert_allclose(layer.key, key[0].numpy(), atol=1e-6)
            np.testing.assert_allclose(layer.value, value[0].numpy(), atol=1e-6)


def layers_of(prefix, site):
    """A folded prefix' keys and values [1, heads, length, head_dim]."""
    return [tuple(torch.tensor(array)[None] for array in (layer.key, layer.value)) for layer in prefix.sites[site]]


def gpt2_mlp(lead="", deep=False):
    state = {f"{lead}wte.weight": torch.randn(LENGTH, HIDDEN)} | mlp(f"{lead}control_trans", deep=deep)
    return state, batched(through(state, f"{lead}control_trans", state[f"{lead}wte.weight"]))


def gpt2_flat():
    state = {"control_trans": torch.randn(LENGTH * WIDTH)}
    return state, batched(state["control_trans"].view(LENGTH, WIDTH))


def gpt2_words():
    state = {"control_trans": torch.randn(2 * LAYERS, 1, HEADS, LENGTH, HEAD_DIM)}
    return state, [tuple(pair) for pair in state["control_trans"].split(2)]


def openprompt(lead):
    state, past = gpt2_mlp(lead)
    named = {f"template.{name}": tensor for name, tensor in state.items()}
    return named | {"template.input_tokens": torch.arange(LENGTH)}, past


CAUSAL = {
    "Li & Liang, MLP": gpt2_mlp,
    "Li & Liang, deep": partial(gpt2_mlp, deep=True),
    "Li & Liang, flat": gpt2_flat,
    "Li & Liang, from words": gpt2_words,
    "OpenPrompt": partial(openprompt, "decoder_"),
    "OpenPrompt, before": partial(openprompt, ""),
}


@pytest.fixture(scope="module", params=["gpt2", "opt"])
def causal(request, workshop):
    """A base model and an engine of its bundle, to which tasks are added."""
    base = load_base_model(str(workshop.model(request.param, tokenizer=True)))
    # The first one is there already, for many other tests.
    bundle = workshop.bundle() if request.param == "gpt2" else workshop.bundle(request.param, (3,), verify=False)
    return base, prefix_runtime.load(bundle, threads=1)


def check_tensorrt_engine(engine, task, prefix, logits, tokens):
    """The exported graph under the folded prefix answers as the reference did."""
    engine.add_task(task, prefix)
    np.testing.assert_allclose(engine.logits(IDS, task), logits, atol=1e-4)
    assert list(engine.generate(token_ids=IDS, task=task, max_new_tokens=TOKENS).token_ids) == tokens
    engine.remove_task(task)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_decoder_answers_as_with_the_published_past(causal, tmp_path, name):
    base, engine = causal
    torch.manual_seed(1)
    state, past = CAUSAL[name]()
    (prefix,) = fold(saved(tmp_path / "run", state), base.shape, pytest.fail).prefixes.values()
    check_keys_and_values(prefix, {"decoder": past})

    def logits(tokens):
        """As their `forward` does: the past and a mask of all; positions are transformers' own."""
        with torch.no_grad():
            mask = torch.ones(1, LENGTH + len(tokens), dtype=torch.int64)
            return base.model(
                input_ids=torch.tensor([tokens]), past_key_values=cache_of(past), attention_mask=mask
            ).logits[0]

    check_tensorrt_engine(engine, "task", prefix, logits(IDS).numpy(), greedy(logits, IDS, TOKENS))


def soft_array(how, tmp_path):
    numbers = torch.randn(LENGTH, HIDDEN) * 0.5
    if how == "npy":
        np.save(tmp_path / "prompt.npy", numbers.numpy())
        return tmp_path / "prompt.npy", numbers
    if how == "pt":
        torch.save(numbers, tmp_path / "prompt.pt")
        return tmp_path / "prompt.pt", numbers
    state = {"wte.weight": torch.randn(LENGTH, HIDDEN)} | mlp("control_trans", outputs=HIDDEN)
    return saved(tmp_path / "run", state), through(state, "control_trans", state["wte.weight"])


@pytest.mark.parametrize("how", ["npy", "pt", "Li & Liang's embeddings"])
def test_a_decoder_answers_as_with_the_soft_prompt_before_its_text(causal, tmp_path, how):
    base, engine = causal
    torch.manual_seed(1)
    path, prompt = soft_array(how, tmp_path)
    (prefix,) = fold(path, base.shape, lambda: base).prefixes.values()

    def run(tokens):
        text = base.model.get_input_embeddings()(torch.tensor(tokens, dtype=torch.int64))
        with torch.no_grad():
            return base.model(inputs_embeds=torch.cat([prompt, text])[None])

    def logits(tokens):
        return run(tokens).logits[0, LENGTH:]

    past = [(layer.keys, layer.values) for layer in run([]).past_key_values.layers]
    check_keys_and_values(prefix, {"decoder": past})
    check_tensorrt_engine(engine, "task", prefix, logits(IDS).numpy(), greedy(logits, IDS, TOKENS))


_BART = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
}
_T5 = {"d_model": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS, "d_kv": HEAD_DIM, "d_ff": 32}
PAIRED = {
    "bart": (transformers.BartConfig, _BART),
    "mbart": (transformers.MBartConfig, _BART),
    "t5": (transformers.T5Config, _T5),
    "mt5": (transformers.MT5Config, _T5),
}  # fmt: skip


@pytest.fixture(scope="module")
def paired():
    """Random encoder-decoders by name, and what their configurations say."""
    found = {}
    for name, (config_class, sizes) in PAIRED.items():
        torch.manual_seed(0)
        model = spread(
            AutoModelForSeq2SeqLM.from_config(config_class(vocab_size=99, **sizes), attn_implementation="eager")
        )
        found[name] = model, ModelShape.of_config(name, model.config)
    return found


SITES = {"li-liang": ("", "2", "_enc"), "unified-skg": ("", "_dec", "_enc"), "control-prefixes": ("", "2", "_enc")}


def three_sites(family, deep=False):
    """Tables and MLPs for decoder, cross and encoder; and each one's matrix."""
    ends = dict(zip(("decoder", "cross", "encoder"), SITES[family], strict=True))
    state = {f"wte{end}.weight": torch.randn(LENGTH, HIDDEN) for end in ends.values()}
    for end in ends.values():
        state |= mlp(f"control_trans{end}", deep=deep)
    return state, {site: through(state, f"control_trans{end}", state[f"wte{end}.weight"]) for site, end in ends.items()}


def li_liang(deep):
    state, numbers = three_sites("li-liang", deep)
    return state, {"preseqlen": LENGTH}, numbers, ZERO, None


def unified_skg():
    state, numbers = three_sites("unified-skg")
    return state, None, numbers, ZERO, None


def openprompt_t5():
    state = {f"{lead}wte.weight": torch.randn(LENGTH, HIDDEN) for lead in ("", "decoder_")}
    state |= mlp("control_trans") | mlp("decoder_control_trans")
    numbers = {
        site: through(state, f"{lead}control_trans", state[f"{lead}wte.weight"])
        for site, lead in (("encoder", ""), ("decoder", "decoder_"))
    }
    return state | {"input_tokens": torch.arange(LENGTH)}, None, numbers, OWN, None


def data_to_text():
    """`get_prompt_multiple_prefix`: each category's label before what there is so far, all through the same MLP."""
    state, _ = three_sites("control-prefixes")
    chosen, rows = {"sources": 2, "cats": 1}, 2
    numbers = {}
    for site, end, each in (("decoder", "", ""), ("cross", "2", "2_"), ("encoder", "_enc", "enc_")):
        whole = through(state, f"control_trans{end}", state[f"wte{end}.weight"])
        for category, label in chosen.items():
            table = torch.randn(3 * rows, HIDDEN)
            state[f"M_Prefixes.wte_{each}{category}.weight"] = table
            found = through(state, f"control_trans{end}", table)[label * rows : (label + 1) * rows]
            whole = torch.cat([found, whole])
        numbers[site] = whole
    return state, {"m_prefix_len": rows, "preseqlen": LENGTH}, numbers, ZERO, ("general", "sources-2", "cats-1")


def xsum():
    """The first table's rows, then the second's, then the general ones."""
    ends = dict(zip(("decoder", "cross", "encoder"), SITES["control-prefixes"], strict=True))
    state = {f"wte{end}.weight": torch.randn(LENGTH + 2 + 40 * 3, HIDDEN) for end in ends.values()}
    numbers = {}
    for site, end in ends.items():
        state |= mlp(f"control_trans{end}")
        rows = through(state, f"control_trans{end}", state[f"wte{end}.weight"])
        sport, category = rows[LENGTH + 1 : LENGTH + 2], rows[LENGTH + 2 + 21 : LENGTH + 2 + 24]
        numbers[site] = torch.cat([sport, category, rows[:LENGTH]])
    return state, {"preseqlen": LENGTH}, numbers, ZERO, ("category-7", "general", "sport-1")


TRAINED = {
    "Li & Liang": (partial(li_liang, False), ("bart", "mbart")),
    "Li & Liang, deep": (partial(li_liang, True), ("bart", "mbart")),
    "UnifiedSKG": (unified_skg, ("bart", "t5")),
    "OpenPrompt": (openprompt_t5, ("t5", "mt5")),
    "Control Prefixes, data to text": (data_to_text, ("t5", "bart")),
    "Control Prefixes, XSum": (xsum, ("bart", "mbart")),
}


@pytest.mark.parametrize(("name", "which"), [(name, which) for name, (_, both) in TRAINED.items() for which in both])
def test_an_encoder_decoder_answers_as_with_the_published_prefix(paired, tmp_path, name, which):
    model, shape = paired[which]
    torch.manual_seed(1)
    state, config, numbers, bias, chosen = TRAINED[name][0]()
    parts = fold(saved(tmp_path / "run", state, config), shape, pytest.fail).prefixes
    prefix = concatenated([parts[part] for part in chosen]) if chosen else parts[""]
    past = {site: batched(matrix) for site, matrix in numbers.items()}
    check_keys_and_values(prefix, past)
    begins = [2, 9, 31]
    moves = prefix.position_base == prefix.prefix_length
    assert moves == (bias is OWN)
    # OpenPrompt's decoder has its prefix as transformers' own past.
    patched, decoder = ({"encoder": past["encoder"]}, past["decoder"]) if moves else (past, None)

    def expected(tokens):
        with theirs(model, patched, bias):
            return decoded(model, SOURCE, tokens, decoder)

    def found(tokens):
        with ours(model, prefix, tuple(prefix.sites)):
            return decoded(model, SOURCE, tokens)

    np.testing.assert_allclose(found(begins).numpy(), expected(begins).numpy(), atol=1e-4)
    assert (found(begins) - decoded(model, SOURCE, begins)).abs().max() > 0.05, "the prefix would show nothing"
    assert greedy(found, begins, TOKENS) == greedy(expected, begins, TOKENS)


@pytest.mark.parametrize("which", ["bart", "t5"])
def test_an_encoder_decoder_answers_as_pefts(paired, tmp_path, which):
    model, shape = paired[which]
    model.save_pretrained(tmp_path / "model")
    again = partial(AutoModelForSeq2SeqLM.from_pretrained, tmp_path / "model")
    adapter = save_adapter(
        again(), PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH), tmp_path / "a"
    )
    (prefix,) = fold(adapter, shape, pytest.fail).prefixes.values()
    wrapped = PeftModel.from_pretrained(again(), adapter).eval()
    layers = layers_of(prefix, "decoder")
    begins = [2, 9, 31]

    def expected(tokens):
        with torch.no_grad():
            return wrapped(
                input_ids=SOURCE, decoder_input_ids=torch.tensor([tokens]), attention_mask=torch.ones_like(SOURCE)
            ).logits[0]

    def found(tokens):
        return decoded(model, SOURCE, tokens, layers)

    np.testing.assert_allclose(found(begins).numpy(), expected(begins).numpy(), atol=1e-4)
    assert greedy(found, begins, TOKENS) == greedy(expected, begins, TOKENS)


ENCODERS = {
    "bert": (transformers.BertConfig, transformers.BertModel),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
}


@pytest.mark.parametrize("projection", [False, True], ids=["matrix", "projection"])
@pytest.mark.parametrize("which", ENCODERS)
def test_an_encoder_and_its_head_answer_as_p_tuning_v2s(tmp_path, which, projection):
    """`BertPrefixForSequenceClassification`, `RobertaPrefixForSequenceClassification`: both classify what is pooled."""
    config_class, model_class = ENCODERS[which]
    torch.manual_seed(1)
    config = config_class(vocab_size=99, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                          intermediate_size=32, max_position_embeddings=64)  # fmt: skip
    model = spread(model_class(config))
    trained = {f"{which}.{name}": tensor for name, tensor in model.state_dict().items()}
    head = torch.nn.Linear(HIDDEN, 5)
    trained |= {"classifier.weight": head.weight.data, "classifier.bias": head.bias.data}
    trained["prefix_encoder.embedding.weight"] = torch.randn(LENGTH, HIDDEN if projection else WIDTH)
    numbers = trained["prefix_encoder.embedding.weight"]
    if projection:
        trained |= mlp("prefix_encoder.trans")
        numbers = through(trained, "prefix_encoder.trans", numbers)
    folder = saved(tmp_path / "run", trained, {"pre_seq_len": LENGTH})
    (prefix,) = fold(folder, ModelShape.of_config(which, config), pytest.fail).prefixes.values()
    check_keys_and_values(prefix, {"encoder": batched(numbers)})

    # The base model has a pooler that was never trained, as those have that come without one.
    base = model_class(config).eval()
    pooler = {name: part for name, part in base.state_dict().items() if "pooler" in name}
    base.load_state_dict(model.state_dict() | pooler)
    first = prefix.position_base + (config.pad_token_id + 1 if which == "roberta" else 0)
    for seed in range(4):
        ids = torch.randint(5, 99, (1, 9), generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(1, LENGTH + 9, dtype=torch.int64)
        with torch.no_grad():
            expected = head(model(ids, attention_mask=mask, past_key_values=cache_of(batched(numbers))).pooler_output)
            hidden = base(ids, attention_mask=mask, past_key_values=cache_of(layers_of(prefix, "encoder")),
                          position_ids=torch.arange(first, first + 9)[None]).last_hidden_state[0, 0]  # fmt: skip
        weights = {name: np.asarray(array) for name, array in prefix.head.items()}
        pooled = np.tanh(weights["pooler.dense.weight"] @ hidden.numpy() + weights["pooler.dense.bias"])
        found = weights["classifier.weight"] @ pooled + weights["classifier.bias"]
        np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-4)
        assert found.argmax() == expected[0].argmax()
