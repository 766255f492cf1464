"""The choice of the next token against transformers' own logits processors, in transformers' own order."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_runtime import RequestError, Sampling
from prefix_runtime.generation.sampling import distribution, make_sampler

torch = pytest.importorskip("torch", reason="what is expected comes from torch")
transformers = pytest.importorskip("transformers", reason="what is expected comes from transformers")

VOCAB_SIZE = 60
SEEN = [3, 3, 17, 42, 0, 59]

SETTINGS = [
    Sampling(temperature=1),
    Sampling(temperature=0.3),
    Sampling(temperature=2.5),
    Sampling(temperature=1, top_k=1),
    Sampling(temperature=1, top_k=7),
    Sampling(temperature=1, top_k=VOCAB_SIZE),
    Sampling(temperature=1, top_k=10 * VOCAB_SIZE),
    Sampling(temperature=1, top_p=0.9),
    Sampling(temperature=1, top_p=0.05),
    Sampling(temperature=1, top_p=1e-6),
    Sampling(temperature=1, top_p=0.999),
    Sampling(temperature=1, min_p=0.1),
    Sampling(temperature=1, min_p=0.001),
    Sampling(temperature=1, min_p=1),
    Sampling(temperature=1, top_h=0.4),
    Sampling(temperature=1, top_h=0.01),
    Sampling(temperature=1, typical_p=0.9),
    Sampling(temperature=1, typical_p=0.2),
    Sampling(temperature=1, epsilon_cutoff=0.02),
    Sampling(temperature=1, epsilon_cutoff=0.9),
    Sampling(temperature=1, eta_cutoff=0.02),
    Sampling(temperature=1, eta_cutoff=0.5),
    Sampling(temperature=0.7, top_k=20, top_p=0.8),
    Sampling(temperature=1.8, top_p=0.95, min_p=0.02),
    Sampling(temperature=0.8, top_k=30, top_p=0.95, min_p=0.03),
    Sampling(temperature=1.4, top_k=12, top_p=0.7, min_p=0.05),
    Sampling(temperature=1.4, top_h=0.8, top_k=12, top_p=0.9, min_p=0.01, typical_p=0.95, eta_cutoff=0.01),
    Sampling(temperature=2.0, top_k=30, typical_p=0.8, epsilon_cutoff=0.01, eta_cutoff=0.01),
]


def logits(seed, spread=3):
    return np.random.default_rng(seed).normal(scale=spread, size=VOCAB_SIZE).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    ends = {"bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=4, n_head=1, n_layer=1, vocab_size=VOCAB_SIZE, **ends)
    )


@pytest.fixture(scope="module")
def transformers_scores(model):
    """The scores [vocab] that transformers samples from, minus infinity where it never would."""

    def scores_of(scores, sampling):
        names = ("top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
        settings = {name: getattr(sampling, name) for name in names}
        config = transformers.GenerationConfig(do_sample=True, top_h=sampling.top_h or None, **settings)
        config.temperature = float(sampling.temperature)
        processors = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(SEEN))
        return processors(torch.tensor([SEEN]), torch.tensor(scores.copy())[None])[0]

    return scores_of


def probabilities(scores, sampling):
    """The runtime's probabilities as [vocab]."""
    ids, found = distribution(scores, sampling)
    spread = np.zeros(VOCAB_SIZE)
    spread[ids] = found
    return spread


def test_probabilities_are_those_of_transformers(transformers_scores):
    for sampling, seed in itertools.product(SETTINGS, range(5)):
        expected = transformers_scores(logits(seed), sampling).softmax(-1).numpy()
        found = probabilities(logits(seed), sampling)
        np.testing.assert_array_equal(found > 0, expected > 0, err_msg=f"{sampling}, seed {seed}")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7, err_msg=f"{sampling}, seed {seed}")


@given(
    seed=st.integers(0, 2**32),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.1, 5),
        top_k=st.integers(0, VOCAB_SIZE),
        top_p=st.floats(0.05, 1),
        min_p=st.floats(0, 0.5),
    ),
)
def test_any_settings_give_the_probabilities_of_transformers(transformers_scores, seed, sampling):
    expected = transformers_scores(logits(seed), sampling).softmax(-1).numpy()
    found = probabilities(logits(seed), sampling)
    # A token right at a threshold may fall on either side, as transformers computes in float32: none may carry weight.
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=0.02 * expected.max())


@pytest.mark.parametrize("setting", [{"top_k": 3}, {"top_p": 0.1}, {"min_p": 0.9}, {"typical_p": 0.1}, {"seed": 5}])
def test_greedy_ignores_what_only_sampling_heeds(setting):
    assert make_sampler(Sampling(**setting))(logits(0)) == logits(0).argmax()


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-4}])
@pytest.mark.parametrize("seed", range(4))
def test_where_one_candidate_is_left_sampling_is_greedy(setting, seed):
    sampler = make_sampler(Sampling(**{"temperature": 1.0, "seed": seed} | setting))
    assert {sampler(logits(seed)) for _ in range(20)} == {int(logits(seed).argmax())}


def test_tokens_are_drawn_as_often_as_they_are_likely():
    sampling, draws = Sampling(temperature=1, top_k=5, seed=1), 20_000
    sampler = make_sampler(sampling)
    found = np.bincount([sampler(logits(0)) for _ in range(draws)], minlength=VOCAB_SIZE)
    expected = probabilities(logits(0), sampling)
    np.testing.assert_array_equal(found > 0, expected > 0)
    # Five standard deviations of a binomial distribution.
    np.testing.assert_array_less(abs(found - draws * expected), 5 * np.sqrt(draws * expected * (1 - expected)) + 1)


def test_candidates_come_by_id_and_their_probabilities_sum_to_one():
    ids, found = distribution(logits(0), Sampling(temperature=1, top_k=9, top_p=0.99))
    assert list(ids) == sorted(ids)
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_next_to_no_temperature_leaves_the_most_likely_token():
    ids, found = distribution(logits(0), Sampling(temperature=1e-310))
    assert ids[found == 1] == [logits(0).argmax()]
    assert found.sum() == 1


def test_ties_with_the_kth_are_kept_as_in_transformers(transformers_scores):
    tied, sampling = np.zeros(VOCAB_SIZE, np.float32), Sampling(temperature=1, top_k=3)
    tied[10] = 1
    expected = transformers_scores(tied, sampling).softmax(-1).numpy()
    np.testing.assert_allclose(probabilities(tied, sampling), expected, rtol=1e-5)
    assert (expected > 0).all()


@pytest.mark.parametrize("sampling", [Sampling(), SETTINGS[-1]])
def test_the_logits_are_left_as_they_are(sampling):
    # The engine hands out a view of the buffer that the next step writes to.
    own = logits(0)
    own.flags.writeable = False
    make_sampler(sampling)(own)
    np.testing.assert_array_equal(own, logits(0))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(temperature=1, top_k=3, top_p=0.5)])
def test_a_token_that_was_excluded_never_comes(sampling):
    scores = logits(0)
    scores[np.argsort(scores)[4:]] = -np.inf
    sampler = make_sampler(sampling)
    assert {sampler(scores) for _ in range(100)} <= set(np.flatnonzero(scores > -np.inf))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1)])
def test_where_no_token_is_left_the_request_is_refused(sampling):
    with pytest.raises(RequestError, match="expected a token to choose, found that the logits and the rules"):
        make_sampler(sampling)(np.full(VOCAB_SIZE, -np.inf, np.float32))


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_same_seed_draws_the_same_tokens(seed):
    one, other = (make_sampler(Sampling(temperature=2, seed=seed)) for _ in range(2))
    assert [one(logits(i)) for i in range(30)] == [other(logits(i)) for i in range(30)]


def test_a_last_digit_of_the_logits_seldom_tips_a_choice():
    # A row of a batch is computed in other groups than a row alone; here of a vocabulary in which all is alike.
    random = np.random.default_rng(0)
    one, other = (make_sampler(Sampling(temperature=1, seed=1)) for _ in range(2))
    same, draws = 0, 300
    for _ in range(draws):
        scores = random.standard_normal(50_000, np.float32)
        changed = scores + 1e-3 * random.standard_normal(50_000, np.float32)
        same += one(scores) == other(changed)
    assert same >= 0.98 * draws  # by a cumulated sum it is 0.88


@pytest.mark.parametrize("seeds", [(1, 2), (None, None)])
def test_other_seeds_draw_other_tokens(seeds):
    one, other = (make_sampler(Sampling(temperature=2, seed=seed)) for seed in seeds)
    assert [one(logits(i)) for i in range(30)] != [other(logits(i)) for i in range(30)]


@pytest.mark.parametrize(
    ("name", "expected", "values"),
    [
        ("temperature", "0 or more", [-0.1, float("nan"), float("inf"), -float("inf"), "1", None, True, 10**400]),
        ("top_k", "a whole number, 0 or more", [-1, 1.5, 2.0, float("nan"), float("inf"), True, "3", None]),
        ("top_p", "above 0 and at most 1", [0, -0.1, 1.1, float("nan"), float("inf"), "1"]),
        ("min_p", "0 to 1", [-0.1, 1.1, float("nan")]),
        ("top_h", "0 to 1", [-0.1, 1.1, float("nan"), None]),
        ("typical_p", "0 to 1", [-0.1, 1.1, "1"]),
        ("epsilon_cutoff", "0 to 1", [-0.1, 1.1, True]),
        ("eta_cutoff", "0 to 1", [-0.1, 1.1, float("inf")]),
        ("repetition_penalty", "0.001 to 1000", [0, -1, float("nan"), float("inf"), 1e-300, 1e4]),
        ("seed", "None or a whole number, 0 or more", [-1, 1.5, True, "a", float("nan")]),
    ],
)
def test_a_setting_out_of_range_is_refused(name, expected, values):
    for value in values:
        with pytest.raises(RequestError, match=f"^{name}: expected {expected}, found {re.escape(repr(value))}$"):
            Sampling(**{name: value})


@pytest.mark.parametrize(
    "sampling", [*SETTINGS, Sampling(), Sampling(temperature=1, top_k=np.int64(3), seed=np.int64(3))]
)
def test_settings_within_their_range_are_taken(sampling):
    assert 0 <= make_sampler(sampling)(logits(0)) < VOCAB_SIZE


def test_settings_are_a_value():
    assert replace(SETTINGS[0], seed=3) == Sampling(temperature=1, seed=3)
    assert len({Sampling(), Sampling()}) == 1
