"""Prefixes one after another: what results, what is refused, and tasks that are composed when they are asked for."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import numpy as np
import pytest

import prefix_runtime
from prefix_runtime import CompositionError, PrefixMismatchError, Source, UnknownTaskError
from prefix_runtime.bundle import tasks
from prefix_runtime.bundle.tasks import MOST_COMPOSED, TaskStore
from prefix_runtime.prefix.composition import GENERAL, PLACE, TABLE, concatenated
from prefix_runtime.prefix.prefix import TEXT_HAS_BEGUN


@pytest.fixture
def engine(shared_bundle):
    return prefix_runtime.load(shared_bundle, threads=1)


class TestConcatenation:
    def test_keys_and_values_follow_each_other(self, make_prefix):
        left, right = make_prefix(3), make_prefix(5)
        found = concatenated([left, right])
        assert (found.prefix_length, found.position_base) == (8, 8)
        for layer, first, second in zip(*(each.sites["decoder"] for each in (found, left, right)), strict=True):
            np.testing.assert_array_equal(layer.key, np.concatenate([first.key, second.key], 1))
            np.testing.assert_array_equal(layer.value, np.concatenate([first.value, second.value], 1))

    @pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 2), ()])
    def test_text_has_begun_behind_any_part_that_is_a_text(self, make_prefix, places):
        metadata = [{TEXT_HAS_BEGUN: "true"} if place in places else {} for place in range(3)]
        found = concatenated([replace(make_prefix(3), metadata=each) for each in metadata])
        assert found.metadata == ({TEXT_HAS_BEGUN: "true"} if places else {})

    def test_text_at_position_0_stays_there(self, make_prefix):
        prefixes = [replace(make_prefix(length), position_base=0) for length in (3, 5)]
        assert concatenated(prefixes).position_base == 0

    def test_a_base_that_one_knows_is_the_wholes(self, make_prefix):
        known = replace(make_prefix(3), base_fingerprint="sha256:a")
        unknown = replace(make_prefix(5), base_fingerprint=None)
        assert concatenated([unknown, known]).base_fingerprint == "sha256:a"

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            (
                lambda prefix: replace(prefix, metadata={"relative_position_bias": "zero"}),
                "expected relative",
            ),
            (lambda prefix: replace(prefix, position_base=0), "expected text to begin behind the prefix"),
            (lambda prefix: replace(prefix, base_fingerprint="sha256:other"), "expected one base model"),
            (lambda prefix: replace(prefix, head={"score": np.ones((2, 2), np.float32)}), "found a head"),
            (lambda prefix: replace(prefix, embeddings=np.ones((2, 2), np.float32)), "found a soft prompt"),
            (
                lambda prefix: replace(prefix, sites={"decoder": prefix.sites["decoder"][:1]}),
                "expected sites and layers",
            ),
            (lambda prefix: replace(prefix, sites={"encoder": prefix.sites["decoder"]}), "expected sites and layers"),
        ],
    )
    def test_what_has_no_meaning_together_is_refused(self, make_prefix, change, found):
        first = replace(make_prefix(3), base_fingerprint="sha256:one")
        with pytest.raises(CompositionError, match=rf"^prefix 2 of 2: .*{found}"):
            concatenated([first, change(replace(make_prefix(5), base_fingerprint="sha256:one"))])

    @pytest.mark.parametrize("count", [0, 1])
    def test_fewer_than_two_are_refused(self, make_prefix, count):
        with pytest.raises(CompositionError, match=f"expected at least two prefixes to compose, found {count}"):
            concatenated([make_prefix(3)] * count)


class TestControlPrefixes:
    """Parts whose metadata says which table they are of and at which place it stands."""

    @pytest.fixture
    def part(self, make_prefix):
        def part(table, place, seed=0, length=3, sha256="a" * 64):
            metadata = {TABLE: table, PLACE: place}
            base = replace(make_prefix(length, seed=seed), position_base=0, metadata=metadata)
            return replace(base, source=Source("control-prefixes", sha256))

        return part

    def test_they_stand_in_the_order_that_they_were_trained_in(self, part):
        cats, sources, general = part("cats", "0", 1), part("sources", "1", 2, 5), part(GENERAL, "2", 3)
        found = {concatenated(order).content_hash for order in itertools.permutations([cats, sources, general])}
        assert len(found) == 1
        composed = concatenated([general, cats, sources])
        for index, layer in enumerate(composed.sites["decoder"]):
            parts = [each.sites["decoder"][index] for each in (cats, sources, general)]
            np.testing.assert_array_equal(layer.key, np.concatenate([each.key for each in parts], 1))
            np.testing.assert_array_equal(layer.value, np.concatenate([each.value for each in parts], 1))
        assert composed.metadata == {TABLE: "cats+sources+general"}

    @pytest.mark.parametrize(
        ("others", "message"),
        [
            ([("cats", "0"), ("cats", "0")], r"^prefix 3 of 3: .* found a second of 'cats'"),
            ([(GENERAL, "2")], r"^prefix 2 of 2: .* found a second of 'general'"),
            ([("cats", "")], r"^prefix 2 of 2: expected single parts .* found one 'cats'"),
            ([("cats", "\u0661")], "expected single parts"),
        ],
    )
    def test_two_of_one_table_are_refused(self, part, others, message):
        with pytest.raises(CompositionError, match=message):
            concatenated([part(GENERAL, "2"), *(part(*other) for other in others)])

    def test_labels_without_the_general_prefix_are_refused(self, part):
        with pytest.raises(CompositionError, match=r"expected the general prefix .* found cats, sources alone"):
            concatenated([part("sources", "1"), part("cats", "0")])

    def test_parts_of_two_checkpoints_are_refused(self, part):
        with pytest.raises(CompositionError, match="expected parts of one checkpoint of Control Prefixes"):
            concatenated([part(GENERAL, "1"), part("cats", "0", sha256="b" * 64)])

    def test_another_prefix_among_them_is_refused(self, part, make_prefix):
        with pytest.raises(CompositionError, match=r"^prefix 2 of 2: .* found one 'of something else'"):
            concatenated([part(GENERAL, "1"), replace(make_prefix(3), position_base=0)])

    def test_what_was_composed_is_not_composed_once_more(self, part):
        composed = concatenated([part("cats", "0"), part(GENERAL, "2")])
        with pytest.raises(CompositionError, match="all at once, found one 'cats\\+general'"):
            concatenated([part("sources", "1"), composed])

    def test_tasks_are_chosen_in_any_order(self, engine, part):
        parts = {"cats-1": part("cats", "0", 1), "sources-2": part("sources", "1", 2), "general": part(GENERAL, "2", 3)}
        for name, prefix in parts.items():
            engine.add_task(name, replace(prefix, base_fingerprint=None))
        logits = [engine.logits([5, 6, 7], "+".join(order)) for order in itertools.permutations(parts)]
        for found in logits[1:]:
            np.testing.assert_array_equal(found, logits[0])
        with pytest.raises(CompositionError, match=r"^task 'cats-1\+cats-1\+general': .* a second of 'cats'"):
            engine.generate(token_ids=[5], task="cats-1+cats-1+general")


class TestTasks:
    def test_tasks_joined_answer_as_their_concatenation(self, engine):
        engine.add_task("both", concatenated([engine.bundle.prefix("p3"), engine.bundle.prefix("p20")]))
        ids = [5, 6, 7, 8]
        expected = engine.logits(ids, "both")
        np.testing.assert_array_equal(engine.logits(ids, "p3+p20"), expected)
        assert np.abs(engine.logits(ids, "p3") - expected).max() > 0.1
        joined, alone = (engine.generate(token_ids=ids, task=task, max_new_tokens=9) for task in ("p3+p20", "both"))
        assert joined.token_ids == alone.token_ids
        assert engine.room("p3+p20") == engine.room(None) - 23
        assert engine.tasks == ("both", "p20", "p3")

    def test_rows_of_a_batch_may_be_composed(self, engine):
        tasks = ["p3+p20", "p3", None, "p20+p20"]
        rows = engine.generate(token_ids=[[5, 6, 7]] * 4, task=tasks, max_new_tokens=9)
        alone = [engine.generate(token_ids=[5, 6, 7], task=task, max_new_tokens=9) for task in tasks]
        assert [row.token_ids for row in rows] == [row.token_ids for row in alone]

    @pytest.mark.parametrize("tasks", ["text", "text+p3", "p3+text", "p3+text+p20"])
    def test_a_prompt_behind_a_text_gets_no_second_start_token(self, starting_bundle, make_prefix, tasks):
        engine = prefix_runtime.load(starting_bundle, threads=1)
        engine.add_task("text", replace(make_prefix(3), metadata={TEXT_HAS_BEGUN: "true"}))
        ids = engine._codec.encode("the dog")
        assert ids[0] == 0
        found = engine.generate("the dog", task=tasks, max_new_tokens=6)
        assert found.metrics.prompt_length == len(ids) - 1
        assert found.token_ids == engine.generate(token_ids=ids[1:], task=tasks, max_new_tokens=6).token_ids
        assert engine.generate("the dog", task="p3+p20", max_new_tokens=6).metrics.prompt_length == len(ids)

    def test_a_part_that_is_not_there_is_named(self, engine):
        for task in ("p3+nothing", "+", "p3+", "+p3"):
            with pytest.raises(UnknownTaskError, match="tasks here: p20, p3"):
                engine.generate(token_ids=[5], task=task)

    def test_a_prefix_that_leaves_no_room_is_refused(self, engine):
        with pytest.raises(PrefixMismatchError, match=r"task 'p20\+.*expected a prefix that leaves"):
            engine.generate(token_ids=[5], task="+".join(["p20"] * 16))

    def test_a_task_that_cannot_be_composed_is_named(self, engine, make_prefix):
        engine.add_task("other", replace(make_prefix(3), position_base=0))
        with pytest.raises(CompositionError, match=r"^task 'p3\+other': prefix 2 of 2: expected text to begin behind"):
            engine.generate(token_ids=[5], task="p3+other")

    def test_the_same_object_comes_back_until_a_part_goes(self, shared_bundle):
        store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
        first = store.get("p3+p20")
        assert store.get("p3+p20") is first
        assert store.holds("p3+p20", first)
        assert first in store.remove("p3")
        assert not store.holds("p3+p20", first)
        with pytest.raises(UnknownTaskError):
            store.get("p3+p20")

    def test_only_the_last_few_are_kept(self, shared_bundle):
        store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
        first = store.get("p3+p3")
        for count in range(3, MOST_COMPOSED + 3):
            store.get("+".join(["p3"] * count))
        assert store.get("p3+p3") is not first

    def test_threads_get_one_object(self, shared_bundle):
        store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
        found = []
        threads = [threading.Thread(target=lambda: found.append(store.get("p3+p20"))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(prefix) for prefix in found}) == 1

    @pytest.mark.parametrize("kept", [False, True], ids=["made for the first time", "kept from before"])
    def test_a_part_that_is_replaced_meanwhile_is_not_in_the_answer(
        self, shared_bundle, make_prefix, monkeypatch, kept
    ):
        store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
        old, new = make_prefix(4, seed=1), make_prefix(4, seed=2)
        store.add("a", old)
        if kept:
            store.get("a+p3")
        replaced = []

        def replace_meanwhile(prefixes):
            if not replaced:
                replaced.append(store.remove("a"))
                store.add("a", new)
            return concatenated(prefixes)

        monkeypatch.setattr(tasks, "concatenated", replace_meanwhile)
        if kept:
            replace_meanwhile([old, new])
        assert store.get("a+p3") == concatenated([new, store.get("p3")])
        assert store.get("a+p3") is store.get("a+p3")

    def test_a_removal_that_is_interrupted_leaves_no_composition_of_what_is_gone(self, shared_bundle, make_prefix):
        store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
        store.add("a", make_prefix(4, seed=1))
        stale = store.get("a+p3")
        del store._tasks["a"]  # and then the interrupt
        assert not store.holds("a+p3", stale)
        store.add("a", make_prefix(4, seed=2))
        assert store.get("a+p3") == concatenated([make_prefix(4, seed=2), store.get("p3")])

    @pytest.mark.parametrize(
        ("name", "error"),
        [
            ("+".join(["p3"] * 20_000), CompositionError),
            ("p3+" + "x" * 50_000, CompositionError),
            ("+".join(["p20"] * 16), PrefixMismatchError),
            ("x" * 50_000, UnknownTaskError),
        ],
        ids=["many", "long", "more than the context", "one long name"],
    )
    def test_a_name_is_bounded_before_anything_is_made_of_it(self, engine, monkeypatch, name, error):
        monkeypatch.setattr(tasks, "concatenated", lambda _: pytest.fail("made"))
        with pytest.raises(error) as caught:
            engine.generate(token_ids=[5], task=name)
        assert len(str(caught.value)) < 300
        assert name[:80] in str(caught.value)

    def test_a_graph_that_holds_its_prefixes_composes_none(self, workshop):
        engine = prefix_runtime.load(workshop.bundle(lengths=(3, 20), mode="bake"), threads=1)
        with pytest.raises(CompositionError, match="expected one task a row, as the graph holds its prefixes"):
            engine.generate(token_ids=[5], task="p3+p20")
