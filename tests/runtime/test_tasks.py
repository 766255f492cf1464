"""The task store: loaded when first asked for, one object a task, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from prefix_runtime import (
    Bundle,
    DuplicateTaskError,
    Prefix,
    PrefixError,
    PrefixMismatchError,
    TaskNameError,
    UnknownTaskError,
)
from prefix_runtime.bundle.tasks import TaskStore


@pytest.fixture
def store(bundle):
    return TaskStore(Bundle.open(bundle))


@pytest.fixture
def reads(monkeypatch):
    """The paths that prefixes are read from."""
    paths, load = [], Prefix.load

    def count(path, *_):
        paths.append(path.name)
        return load(path)

    monkeypatch.setattr(Prefix, "load", count)
    return paths


def test_it_begins_with_the_bundles_tasks(store):
    assert store.names == ("p20", "p3")


def test_a_prefix_is_read_when_it_is_first_asked_for_and_only_then(store, reads):
    assert reads == []
    assert store.get("p3") is store.get("p3")
    assert reads == ["p3.safetensors"]


def test_a_prefix_is_that_of_the_bundle(store, bundle):
    assert store.get("p20") == Bundle.open(bundle).prefix("p20")


def test_many_threads_get_the_same_object(store):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(store.get, ["p3", "p20"] * 100))
    assert len({id(prefix) for prefix in found}) == 2


@pytest.mark.parametrize("name", ["p4", "P3", "", "../p3", None, 3, ["p3"]])
def test_an_unknown_task_is_refused_and_the_known_are_listed(store, name):
    for ask in (store.get, store.remove):
        with pytest.raises(UnknownTaskError, match=r"there is none of this name; tasks here: p20, p3$"):
            ask(name)


def test_an_added_task_is_there_at_once_and_not_in_the_bundle(store, bundle, make_prefix):
    prefix = make_prefix()
    store.add("new", prefix)
    assert store.names == ("new", "p20", "p3")
    assert store.get("new") is prefix
    assert Bundle.open(bundle).tasks == ("p20", "p3")


def test_a_removed_task_is_gone_at_once_and_stays_in_the_bundle(store, bundle):
    prefix = store.get("p3")
    assert store.remove("p3") == [prefix]
    assert store.names == ("p20",)
    with pytest.raises(UnknownTaskError, match=r"tasks here: p20$"):
        store.get("p3")
    assert Bundle.open(bundle).tasks == ("p20", "p3")


def test_a_task_that_was_never_asked_for_is_removed_without_reading_it(store, reads):
    assert store.remove("p3") == []
    assert reads == []


def test_a_name_is_free_again_when_its_task_is_removed(store, make_prefix):
    store.remove("p3")
    prefix = make_prefix(3)
    store.add("p3", prefix)
    assert store.get("p3") is prefix


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [
        ("p3", {}, DuplicateTaskError),
        ("P20", {}, DuplicateTaskError),
        ("a/b", {}, TaskNameError),
        ("", {}, TaskNameError),
        (3, {}, TaskNameError),
        ("new", {"layers": 2}, PrefixMismatchError),
        ("new", {"base_fingerprint": "sha256:other"}, PrefixMismatchError),
    ],
)
def test_a_wrong_task_is_refused_and_the_store_is_as_it_was(store, make_prefix, name, shape, error):
    with pytest.raises(error):
        store.add(name, make_prefix(**shape))
    assert store.names == ("p20", "p3")


def test_one_of_many_threads_adds_a_name(store, make_prefix):
    def add(seed):
        try:
            store.add("new", make_prefix(seed=seed))
        except DuplicateTaskError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(add, range(20))) == 1


def test_a_damaged_file_is_refused_each_time_and_the_task_stays(store, bundle):
    content = (bundle / "prefixes/p3.safetensors").read_bytes()
    (bundle / "prefixes/p3.safetensors").write_bytes(content[:100])
    for _ in range(2):
        with pytest.raises(PrefixError, match=r"p3\.safetensors: expected a whole safetensors file"):
            store.get("p3")
    (bundle / "prefixes/p3.safetensors").write_bytes(content)
    assert store.get("p3").prefix_length == 3


def test_a_task_that_is_removed_while_it_is_read_is_unknown(store, monkeypatch):
    read = store._bundle.prefix

    def remove_meanwhile(name):
        store.remove(name)
        return read(name)

    monkeypatch.setattr(store._bundle, "prefix", remove_meanwhile)
    with pytest.raises(UnknownTaskError, match=r"tasks here: p20$"):
        store.get("p3")
