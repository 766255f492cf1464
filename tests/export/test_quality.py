"""Held-out text: how it is read, and that the figures are those that a plain computation gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from prefix_export.errors import PrefixExportError
from prefix_export.models import load_base_model
from prefix_export.tokenizers.held_out import HeldOut, Text, read_held_out
from prefix_export.verify.quality import answers, assess
from prefix_runtime import LayerPrefix, Prefix


@pytest.fixture(scope="module")
def base(workshop):
    return load_base_model(str(workshop.model(tokenizer=True)))


class Model:
    """Logits that follow from the tokens alone."""

    def __init__(self, seed=0):
        self.table = np.random.default_rng(seed).normal(size=(20, 20)).astype(np.float32)

    def logits(self, token_ids, _task=None):
        return self.table[list(token_ids)]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


class TestFigures:
    HELD_OUT = HeldOut("some", (Text((1, 2, 3, 4), 1), Text((5, 6, 7), 2)), is_text=True)

    def test_perplexity_is_that_of_torch(self):
        model = Model()
        logits = torch.tensor(np.concatenate([model.table[[1, 2, 3]], model.table[[6]]]))
        expected = math.exp(torch.nn.functional.cross_entropy(logits, torch.tensor([2, 3, 4, 7])))
        found = assess(self.HELD_OUT, answers(self.HELD_OUT, model), Model(), None)
        assert found.perplexity == pytest.approx(expected, rel=1e-6)
        assert found.reference_perplexity == found.perplexity
        assert (found.positions, found.greedy_agreement, found.held_out) == (4, 1.0, "some")

    def test_agreement_counts_the_places_in_which_the_choice_is_the_same(self):
        other = Model()
        other.table[2] = -other.table[2]
        other.table[6] = -other.table[6]
        found = assess(self.HELD_OUT, answers(self.HELD_OUT, Model()), other, None)
        assert found.greedy_agreement == 0.5
        assert found.perplexity != found.reference_perplexity

    def test_random_tokens_have_no_perplexity(self):
        held_out = HeldOut("random tokens", self.HELD_OUT.texts, is_text=False)
        found = assess(held_out, answers(held_out, Model()), Model(), None)
        assert (found.perplexity, found.reference_perplexity) == (None, None)


class TestReading:
    def test_a_line_is_a_text_and_what_stands_before_a_tab_a_prompt(self, base, tmp_path):
        held_out = read_held_out(write(tmp_path / "t.txt", "the fox\n\nthe lazy\t dog é\n"), base, None, 320)
        assert held_out.name == "t.txt"
        one, two = held_out.texts
        assert (one.prompt, base.tokenizer.decode(one.token_ids)) == (1, "the fox")
        assert base.tokenizer.decode(two.token_ids[: two.prompt]) == "the lazy"
        assert base.tokenizer.decode(two.token_ids[two.prompt :]) == " dog é"

    def test_the_demos_own_is_read_where_none_is_given(self, base):
        held_out = read_held_out(None, base, None, 320)
        assert held_out.name == "the demo's lighthouses"
        assert sum(len(text.token_ids) for text in held_out.texts) <= 2048
        assert all(len(text.token_ids) <= 256 for text in held_out.texts)

    def test_texts_leave_room_for_the_prefix(self, base, tmp_path):
        layer = LayerPrefix(*np.zeros((2, 4, 20, 16), np.float32))
        prefix = Prefix({"decoder": (layer,) * 3}, position_base=20)
        path = write(tmp_path / "t.txt", "the quick brown fox " * 40)
        held_out = read_held_out(path, base, prefix, 100)
        assert len(held_out.texts[0].token_ids) == 80

    def test_a_prompt_that_is_too_long_loses_its_beginning(self, base, tmp_path):
        path = write(tmp_path / "t.txt", "the quick brown fox " * 40 + "fox\t jumps")
        (text,) = read_held_out(path, base, None, 30).texts
        assert len(text.token_ids) == 30
        assert base.tokenizer.decode(text.token_ids[text.prompt :]) == " jumps"

    @pytest.mark.parametrize("content", ["", "\n\n", "\t\n", "the quick brown\t\n"])
    def test_a_file_without_tokens_that_count_is_refused(self, base, tmp_path, content):
        with pytest.raises(PrefixExportError, match=r"t\.txt: expected lines of at least two tokens, found none"):
            read_held_out(write(tmp_path / "t.txt", content), base, None, 320)

    def test_bytes_that_are_no_text_are_refused(self, base, tmp_path):
        (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(PrefixExportError, match=r"t\.txt: expected UTF-8 text"):
            read_held_out(tmp_path / "t.txt", base, None, 320)

    def test_a_model_without_tokenizer_reads_random_tokens(self, workshop):
        held_out = read_held_out(None, load_base_model(str(workshop.model())), None, 64)
        assert (held_out.name, held_out.is_text) == ("random tokens", False)
        assert {len(text.token_ids) for text in held_out.texts} == {64}

    def test_text_for_a_model_without_tokenizer_is_refused(self, workshop, tmp_path):
        path = write(tmp_path / "t.txt", "the fox")
        with pytest.raises(PrefixExportError, match="expected a model with a tokenizer"):
            read_held_out(path, load_base_model(str(workshop.model())), None, 64)
