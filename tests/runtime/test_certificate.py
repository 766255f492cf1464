"""What a certificate says of a task, in words."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from prefix_runtime.bundle.certificate import agreement, agreement_of, cost_of_rounding

PARITY = {"reference": "peft 0.21", "error": 1.2e-5, "yardstick": 3e-5, "limit": 1.2e-4}
EXACTNESS = "1.2e-05 of double precision (limit 1.2e-04, its own error 3.0e-05)"
QUALITY = {"greedy_agreement": 0.981, "perplexity_change": 0.004}


def manifest(parity, quantizer=None):
    return SimpleNamespace(parity=parity, quantizer=quantizer)


def test_exact_weights_agree_and_that_is_all():
    assert agreement(PARITY, None, is_quantized=False) == f"agrees with peft 0.21 within {EXACTNESS}"


def test_a_certificate_of_an_earlier_version_tells_the_difference_from_the_reference_itself():
    old = {"reference": "peft 0.21", "largest_logit_difference": 2e-5, "tolerance": 1e-4}
    assert agreement(old, None, is_quantized=False) == "agrees with peft 0.21 within 2.0e-05"


def test_of_quantized_weights_it_says_what_the_framework_ran_on_and_what_they_cost():
    assert agreement(PARITY, QUALITY, is_quantized=True) == (
        f"agrees with peft 0.21 run on the quantized weights within {EXACTNESS}; "
        "against float32: 98.1% of tokens equal, perplexity +0.4%"
    )


def test_a_cost_that_was_not_measured_is_told():
    assert agreement(PARITY, None, is_quantized=True).endswith("; what quantizing costs was not measured")


def test_a_rounded_cache_has_a_cost_and_the_framework_ran_on_the_weights_as_they_are():
    said = agreement(PARITY, {"greedy_agreement": 1.0, "perplexity_change": None}, is_quantized=False)
    assert said == f"agrees with peft 0.21 within {EXACTNESS}; against float32: 100.0% of tokens equal"


def test_a_manifest_is_asked_by_task_or_for_the_bare_model():
    parity = {
        "bare_model": {**PARITY, "reference": "transformers 5"},
        "tasks": {"e2e": PARITY},
        "quality": {"graph_bytes": 1, "tasks": {"e2e": QUALITY}},
    }
    assert "98.1% of tokens equal" in agreement_of(manifest(parity, "rtn"), "e2e")
    assert "transformers 5 run on the quantized weights" in agreement_of(manifest(parity, "rtn"), None)
    assert agreement_of(manifest(parity), "other") == "not compared"


@pytest.mark.parametrize(
    "parity", [None, [], 1, {}, {"tasks": []}, {"tasks": {"e2e": "yes"}}, {"tasks": None, "quality": 7}]
)
def test_a_certificate_of_another_form_counts_as_none(parity):
    assert agreement_of(manifest(parity), "e2e") == "not compared"


@pytest.mark.parametrize("quality", [None, {}, {"greedy_agreement": "all"}, {"greedy_agreement": True}, []])
def test_a_quality_of_another_form_counts_as_none(quality):
    assert cost_of_rounding(quality) == ""
