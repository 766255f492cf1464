"""A tokenizer that was saved beside an adapter: used if it is the adapters' own and fits, told otherwise."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefix_runtime
from prefix_export.build import BuildRequest, build, writing
from prefix_export.models import load_base_model
from prefix_export.prefixes.adapter_tokenizer import with_adapters_tokenizer
from prefix_export.prefixes.fold import fold_for_bundle
from prefix_export.prefixes.reference import PrefixSource
from prefix_runtime import Bundle
from tests.workshop import VOCAB_SIZE

BESIDE = "the tokenizer beside the adapter differs from the base model's"


@pytest.fixture(scope="module")
def model(workshop):
    return workshop.model("gpt2", tokenizer=True)


@pytest.fixture(scope="module")
def base(model):
    return load_base_model(str(model))


@pytest.fixture
def adapter(workshop, model, tmp_path):
    """Makes copies of an adapter, with a tokenizer beside each that was changed by some function, or none."""

    def make(name, change=None):
        folder = Path(shutil.copytree(workshop.adapter(model, 3), tmp_path / name))
        if change is not None:
            tokenizer = AutoTokenizer.from_pretrained(model)
            change(tokenizer)
            tokenizer.save_pretrained(folder)
        return folder

    return make


def nothing(_tokenizer):
    pass


def separator(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["<sep>"]})


def padding(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token


def words(tokenizer):
    tokenizer.add_tokens(["brown fox", AddedToken("lazy", lstrip=True)])


def many(tokenizer):
    tokenizer.add_tokens([f"<{place}>" for place in range(VOCAB_SIZE)])


def start(tokenizer):
    tokenizer.bos_token = "<|end|>"


def split(tokenizer):
    tokenizer.init_kwargs["split_special_tokens"] = tokenizer.split_special_tokens = True


def chosen(base, **folders):
    return with_adapters_tokenizer(base, {task: PrefixSource(folder) for task, folder in folders.items()})


@pytest.mark.parametrize("change", [None, nothing, padding])
def test_one_that_reads_text_as_the_bases_does_changes_nothing(base, adapter, change):
    found, warnings = chosen(base, task=adapter("a", change))
    assert found is base
    assert warnings == ()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (separator, "1 token more: '<sep>'"),
        (words, "2 tokens more: 'brown fox', 'lazy'"),
        (start, "bos_token is '<|end|>', not None"),
        (split, "'<|end|>' has token ids "),
    ],
)
def test_one_that_differs_is_used_and_told(base, adapter, change, difference):
    found, (line,) = chosen(base, task=adapter("a", change))
    assert line.startswith(f"task 'task': {BESIDE} ({difference}")
    assert line.endswith("; the bundle uses the adapter's")
    theirs = AutoTokenizer.from_pretrained(adapter("b", change), config=base.model.config)
    text = "the <sep> brown fox<|end|>  lazy"
    assert found.tokenizer(text)["input_ids"] == theirs(text)["input_ids"]


def test_adapters_that_agree_and_those_without_a_tokenizer_share_it(base, adapter):
    found, warnings = chosen(base, a=adapter("a", separator), b=adapter("b", separator), c=adapter("c"))
    assert "<sep>" in found.tokenizer.get_vocab()
    assert [line.partition(":")[0] for line in warnings] == ["task 'a'", "task 'b'"]


@pytest.mark.parametrize("other", [nothing, words])
def test_adapters_that_disagree_keep_the_bases(base, adapter, other):
    found, warnings = chosen(base, a=adapter("a", separator), b=adapter("b", other))
    assert found is base
    reason = "because the adapters' tokenizers differ: build each task by itself to use its own"
    assert warnings[0] == f"task 'a': {BESIDE} (1 token more: '<sep>'); the bundle uses the base model's, {reason}"
    assert len(warnings) == (1 if other is nothing else 2)


def test_one_with_more_tokens_than_the_model_has_rows_is_not_used(base, adapter):
    found, (line,) = chosen(base, task=adapter("a", many))
    assert found is base
    assert f"and the model has {VOCAB_SIZE} rows of embeddings: build with the base model that was resized" in line


def test_a_model_without_a_tokenizer_gets_the_adapters(workshop, adapter):
    bare = load_base_model(str(workshop.model("gpt2")))
    found, (line,) = chosen(bare, task=adapter("a", nothing))
    assert found.tokenizer("the")["input_ids"] == AutoTokenizer.from_pretrained(adapter("b", nothing))("the").input_ids
    assert "(the base model has none)" in line


@pytest.mark.parametrize("content", [b"{}", b"[" * 100_000])
def test_one_that_cannot_be_read_is_told(base, adapter, content):
    folder = adapter("a", separator)
    (folder / "tokenizer.json").write_bytes(content)
    found, (line,) = chosen(base, task=folder)
    assert found is base
    assert line.startswith(
        "task 'task': the tokenizer beside the adapter cannot be used, the bundle uses the base model"
    )


class TestWhereItLies:
    def test_beside_the_file_of_an_adapter(self, base, adapter):
        found, _ = chosen(base, task=adapter("a", separator) / "adapter_model.safetensors")
        assert "<sep>" in found.tokenizer.get_vocab()

    def test_beside_the_folder_of_an_adapter_with_a_name(self, base, adapter):
        trained = adapter("trained", separator)
        named = Path(shutil.copytree(adapter("plain"), trained / "named"))
        found, _ = chosen(base, task=named)
        assert "<sep>" in found.tokenizer.get_vocab()
        (trained / "config.json").write_text("{}")  # now it is a model, whose tokenizer is its own
        assert chosen(base, task=named) == (base, ())

    def test_not_beside_any_other_file(self, base, adapter):
        folder = adapter("a", separator)
        (folder / "adapter_model.safetensors").rename(folder / "own.safetensors")
        assert chosen(base, task=folder / "own.safetensors") == (base, ())


@pytest.fixture(scope="module")
def built(workshop, model, tmp_path_factory):
    """A bundle of an adapter that was trained with one token more."""
    root = tmp_path_factory.mktemp("built")
    folder = Path(shutil.copytree(workshop.adapter(model, 3), root / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    separator(tokenizer)
    tokenizer.save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writing,
            "tokenizer_warnings",
            lambda at, own: (f"{len(own)} tokens in {len(list(at.glob('tok*')))} files",),
        )
        result = build(BuildRequest(str(model), {"task": folder}, root / "bundle", verify=False))
    return SimpleNamespace(root=root / "bundle", result=result, folder=folder, tokenizer=tokenizer)


class TestBundles:
    def test_the_bundle_reads_text_as_the_adapter_was_trained(self, built):
        engine = prefix_runtime.load(built.root, threads=1)
        ids = built.tokenizer("the quick<sep>fox")["input_ids"]
        found = engine.generate("the quick<sep>fox", task="task", max_new_tokens=8)
        assert found.token_ids == engine.generate(token_ids=ids, task="task", max_new_tokens=8).token_ids
        assert len(ids) == found.metrics.prompt_length

    def test_the_build_says_so_and_what_the_runtime_cannot_do(self, built):
        assert built.result.warnings == (
            f"task 'task': {BESIDE} (1 token more: '<sep>'); the bundle uses the adapter's",
            f"{len(built.tokenizer)} tokens in 2 files",
        )

    def test_adding_an_adapter_with_another_tokenizer_warns(self, built, shared_bundle):
        _, warnings = fold_for_bundle(built.folder, Bundle.open(shared_bundle))
        assert warnings[0] == (
            "the tokenizer beside the adapter differs from the bundle's (1 token more: '<sep>'); the bundle keeps its "
            "own: build a bundle of this adapter to use the adapter's"
        )
        assert fold_for_bundle(built.folder, Bundle.open(built.root))[1] == warnings[1:]

    def test_adding_an_adapter_with_an_unreadable_tokenizer_warns(self, adapter, shared_bundle):
        folder = adapter("a", nothing)
        (folder / "tokenizer.json").write_text("{}")
        _, warnings = fold_for_bundle(folder, Bundle.open(shared_bundle))
        assert warnings[0].startswith("the tokenizer beside the adapter cannot be compared with the bundle's: ")


def test_the_models_rows_are_what_ids_are_compared_with(model):
    assert AutoModelForCausalLM.from_pretrained(model).get_input_embeddings().num_embeddings == VOCAB_SIZE
