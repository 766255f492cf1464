"""One engine under threads, interrupts, hot changes, aborted streams and collections at every allocation.

Every answer is compared with what a single thread answered before.
"""

from __future__ import annotations

import ctypes
import gc
import random
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager

import pytest

import prefix_runtime
from prefix_runtime import UnknownTaskError
from prefix_runtime.backends.onnxruntime.shared_cache import SharedCache
from prefix_runtime.bundle.tasks import TaskStore
from prefix_runtime.prefix.composition import concatenated
from tests.stress.conftest import SECONDS

pytestmark = pytest.mark.stress

PROMPTS = ([5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [260] * 30)
TASKS = (None, "p3", "p20", "p3+p20", "hot", "hot+p3")
TOKENS = 6
THREADS = 6


class Interrupted(BaseException):
    """Raised at random moments."""


def alone(engine, prompt, task):
    return engine.generate(token_ids=prompt, task=task, max_new_tokens=TOKENS).token_ids


class Truth:
    """What one thread answers, for each version of the task `hot`."""

    def __init__(self, bundle, make_prefix):
        self.versions = [make_prefix(length, seed=seed) for seed, length in enumerate((4, 4, 7))]
        self.of = {}
        for version, prefix in enumerate(self.versions):
            engine = prefix_runtime.load(bundle, threads=1)
            engine.add_task("hot", prefix)
            self.of |= {
                (version, task, place): alone(engine, prompt, task)
                for task in TASKS
                for place, prompt in enumerate(PROMPTS)
            }
        for task in ("hot", "hot+p3"):
            answers = {self.of[version, task, 2] for version in range(len(self.versions))}
            assert len(answers) == len(self.versions), "versions that answer alike show nothing"

    def allows(self, task, place, found):
        """Whether an answer is that of a version of its task."""
        return any(self.of[version, task, place] == tuple(found) for version in range(len(self.versions)))


@pytest.fixture(scope="module")
def truth(shared_bundle, make_prefix):
    return Truth(shared_bundle, make_prefix)


@pytest.fixture
def engine(shared_bundle, truth):
    size = prefix_runtime.load(shared_bundle, threads=1)._pool._position_bytes * 64
    engine = prefix_runtime.load(shared_bundle, threads=1, cache_bytes=5 * size)
    engine.add_task("hot", truth.versions[0])
    return engine


class User:
    """Asks an engine at random; counts what it did and what was wrong."""

    def __init__(self, engine, truth, seed):
        self.engine, self.truth, self.chance = engine, truth, random.Random(seed)
        self.counts, self.wrong = Counter(), []

    def act(self):
        place, task = self.chance.randrange(len(PROMPTS)), self.chance.choice(TASKS)
        does = self.chance.choice(["answer", "answer_list", "stream", "leave", "forget"])
        try:
            getattr(self, does)(place, task)
        except UnknownTaskError:  # at this moment there is no `hot`
            assert "hot" in task
        self.counts[does] += 1

    def check(self, task, place, found):
        if not self.truth.allows(task, place, found):
            self.wrong.append((task, place, found))

    def answer(self, place, task):
        self.check(task, place, alone(self.engine, PROMPTS[place], task))

    def answer_list(self, place, task):
        rows = [(place, task), (self.chance.randrange(len(PROMPTS)), self.chance.choice(TASKS[:4]))]
        results = self.engine.generate(
            token_ids=[PROMPTS[row] for row, _ in rows], task=[name for _, name in rows], max_new_tokens=TOKENS
        )
        for (row, name), result in zip(rows, results, strict=True):
            self.check(name, row, result.token_ids)

    def stream(self, place, task):
        stream = self.engine.stream(token_ids=PROMPTS[place], task=task, max_new_tokens=TOKENS)
        self.check(task, place, [chunk.token_id for chunk in stream])

    def leave(self, place, task):
        stream = self.engine.stream(token_ids=PROMPTS[place], task=task, max_new_tokens=TOKENS)
        for _ in range(self.chance.randrange(3)):
            next(stream)
        stream.close()

    def forget(self, place, task):
        """Leave a stream in a cycle, for the collector."""
        stream = self.engine.stream(token_ids=PROMPTS[place], task=task, max_new_tokens=TOKENS)
        for _ in range(self.chance.randrange(3)):
            next(stream)
        cycle = [stream]
        cycle.append(cycle)


def change_hot(engine, truth, chance, wrong):
    """Replace the task `hot`, and look that nothing answers from the old one."""
    version = chance.randrange(len(truth.versions))
    engine.remove_task("hot")
    engine.add_task("hot", truth.versions[version])
    for task in ("hot", "hot+p3"):
        found = alone(engine, PROMPTS[2], task)
        if found != truth.of[version, task, 2]:
            wrong.append(("stale", task, found))


def check_at_rest(engine, truth, version):
    """Nothing is held or lent, no buffer is lost, and answers are right."""
    gc.collect()
    assert not engine._pool._lock.locked()
    assert not engine._store._lock.locked()
    assert engine._pool.lent_bytes == 0
    idle = set(map(id, engine._pool._idle))
    caches = [each for each in gc.get_objects() if type(each) is SharedCache]
    alive = [cache for cache in caches if cache._prompt._session is engine._backend.session]
    assert [each for each in alive if id(each) not in idle] == []
    for task in TASKS:
        for place, prompt in enumerate(PROMPTS):
            assert alone(engine, prompt, task) == truth.of[version, task, place]


@contextmanager
def collecting_always():
    """Collect garbage at each allocation of a container."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()  # else each takes as long as torch is large
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def restore(engine, truth):
    if "hot" in engine.tasks:
        engine.remove_task("hot")
    engine.add_task("hot", truth.versions[0])


@pytest.mark.parametrize("collects", [False, True], ids=["", "collecting at every allocation"])
def test_threads_hot_changes_and_streams_that_are_left(engine, truth, report, collects):
    users = [User(engine, truth, seed) for seed in range(THREADS)]
    ends, wrong, changes, errors = time.monotonic() + 0.2 * SECONDS, [], Counter(), []

    def use(user):
        try:
            while time.monotonic() < ends:
                user.act()
        except BaseException as error:  # noqa: BLE001  # a thread's error is to be told
            errors.append(error)

    def change():
        chance = random.Random(99)
        try:
            while time.monotonic() < ends:
                change_hot(engine, truth, chance, wrong)
                changes["hot changes"] += 1
        except BaseException as error:  # noqa: BLE001  # as above
            errors.append(error)

    threads = [threading.Thread(target=use, args=[user]) for user in users] + [threading.Thread(target=change)]
    with collecting_always() if collects else contextmanager(lambda: iter([None]))():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counts = sum((user.counts for user in users), changes)
    wrong += [each for user in users for each in user.wrong]
    report({**counts, "wrong answers": len(wrong)})
    assert errors == []
    assert wrong == []
    assert min(counts.values()) > 5
    restore(engine, truth)
    check_at_rest(engine, truth, 0)


class Interrupter:
    """Raises in threads that use an engine, at random moments; in each only when it has dealt with the last time."""

    def __init__(self, ends):
        self.ends, self.count, self.errors = ends, 0, []
        self._is_due, self._sent = {}, {}

    def use(self, user, started):
        """Let a user act in this thread, which is interrupted again and again."""
        number, dealt_with = threading.get_ident(), threading.Event()
        dealt_with.set()
        started.wait()
        try:
            self._is_due[number] = dealt_with
            while time.monotonic() < self.ends:
                self._act(user, dealt_with)
            self._is_due.pop(number)
            time.sleep(0.2)  # for an interrupt that is under way
        except Interrupted:
            self._is_due.pop(number, None)

    def _act(self, user, dealt_with):
        try:
            while time.monotonic() < self.ends:
                user.act()
        except Interrupted:
            dealt_with.set()
        except BaseException as error:  # noqa: BLE001  # a thread's error is to be told
            self.errors.append(error)

    def interrupt(self):
        """Interrupt the others, in a thread of its own."""
        chance = random.Random(8)
        while time.monotonic() < self.ends:
            for number, dealt_with in list(self._is_due.items()):
                self._interrupt(number, dealt_with)
            time.sleep(0.008 * chance.random() ** 2)

    def _interrupt(self, number, dealt_with):
        # Also after a while: what is raised in a finaliser is lost.
        if dealt_with.is_set() or time.monotonic() > self._sent.get(number, 0) + 1:
            dealt_with.clear()
            self._sent[number] = time.monotonic()
            self.count += 1
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(number), ctypes.py_object(Interrupted))


class MainThread:
    """What is done in the main thread, where a signal's handler raises: all that users do, hot changes and openings."""

    def __init__(self, engine, truth, path):
        self.engine, self.truth, self.path = engine, truth, path
        self.user, self.chance = User(engine, truth, 99), random.Random(7)
        self.counts, self.wrong = Counter(), []

    def act(self):
        does = self.chance.random()
        if does < 0.01:
            loaded = prefix_runtime.load(self.path, threads=1)
            self.user.check("p3", 0, alone(loaded, PROMPTS[0], "p3"))
            self.counts["load"] += 1
        elif does < 0.3:
            if "hot" not in self.engine.tasks:
                self.engine.add_task("hot", self.truth.versions[0])
            change_hot(self.engine, self.truth, self.chance, self.wrong)
            self.counts["hot changes"] += 1
        else:
            self.user.act()

    def act_until(self, ends):
        while time.monotonic() < ends:
            try:
                # Again and again, as what is raised in a finaliser is lost.
                signal.setitimer(signal.ITIMER_REAL, 1e-5 + self.chance.random() * 0.01, 0.05)
                while time.monotonic() < ends:
                    self.act()
            except Interrupted:
                self.counts["in the main thread"] += 1


@contextmanager
def raising_on_alarms():
    def handle(*_):
        raise Interrupted

    before = signal.signal(signal.SIGALRM, handle)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_interrupts_in_all_threads(shared_bundle, engine, truth, report, monkeypatch):
    """Asynchronous exceptions in other threads, and a signal's handler that raises in the main thread."""
    # What is raised in a finaliser is told to this hook; pytest's own would keep all that its frames know.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    ends = time.monotonic() + 0.5 * SECONDS
    users, interrupter = [User(engine, truth, seed) for seed in range(THREADS)], Interrupter(ends)
    started = threading.Barrier(THREADS + 1)
    threads = [threading.Thread(target=interrupter.use, args=[user, started]) for user in users]
    threads.append(threading.Thread(target=interrupter.interrupt))
    main = MainThread(engine, truth, shared_bundle)
    for thread in threads:
        thread.start()
    started.wait()
    with raising_on_alarms():
        main.act_until(ends)
    for thread in threads:
        thread.join()
    wrong = [*main.wrong, *(each for user in [*users, main.user] for each in user.wrong)]
    counts = sum((user.counts for user in [*users, main.user]), main.counts)
    interrupts = {"in other threads": interrupter.count, "interrupts": interrupter.count + counts["in the main thread"]}
    report({**counts, **interrupts, "wrong answers": len(wrong)})
    assert interrupter.errors == []
    assert wrong == []
    assert counts["in the main thread"] > 100
    assert interrupter.count > THREADS * SECONDS, "threads that ended early are not interrupted"
    restore(engine, truth)
    check_at_rest(engine, truth, 0)


def test_compositions_race_with_replacements(shared_bundle, make_prefix, report):
    """`a+p3` is of the `a` that there was when it was asked for, or of a later one."""
    store = TaskStore(prefix_runtime.Bundle.open(shared_bundle))
    prefixes = [make_prefix(2, seed=seed) for seed in range(8)]
    of_hash = {concatenated([prefix, store.get("p3")]).content_hash: place for place, prefix in enumerate(prefixes)}
    store.add("a", prefixes[0])
    ends, asked, stale, done = time.monotonic() + 0.1 * SECONDS, Counter(), [], threading.Event()
    newest = [0]  # how often it was replaced

    def ask():
        while not done.is_set():
            first = newest[0]
            try:
                found = store.get("a+p3")
            except UnknownTaskError:
                continue
            last = newest[0] + 1  # the next may be there already
            asked["races"] += 1
            place = of_hash[found.content_hash]
            if last - first < len(prefixes) and place not in {
                count % len(prefixes) for count in range(first, last + 1)
            }:
                stale.append((place, first, last))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while time.monotonic() < ends:
        count = newest[0] + 1
        store.remove("a")
        store.add("a", prefixes[count % len(prefixes)])
        newest[0] = count
    done.set()
    for thread in threads:
        thread.join()
    report({**asked, "replacements": newest[0], "stale": len(stale)})
    assert stale == []
    assert asked["races"] > 100
