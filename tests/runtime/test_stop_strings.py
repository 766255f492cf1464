"""Stop strings that are looked for byte by byte, against a search in the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefix_runtime.generation.detokenizer import SpaceCleanUp, clean_up_spaces
from prefix_runtime.generation.stop_strings import StopStrings

LETTERS = "ab😀é"
TOKENS = st.lists(st.text(LETTERS, max_size=3), max_size=15)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=3)


@given(tokens=TOKENS, stops=STOPS, prompt=TOKENS)
def test_a_stop_string_is_met_in_the_token_that_it_ends_in(tokens, stops, prompt):
    search = StopStrings(stops, [token.encode() for token in reversed(prompt)])
    before = "".join(prompt)
    text = before
    for token in tokens:
        search.push(token.encode(), token, len(text) - len(before))
        longer = text + token
        starts = [at for stop in stops for end in range(len(text) + 1, len(longer) + 1)
                  if (at := end - len(stop)) >= 0 and longer[at:end] == stop]  # fmt: skip
        assert search.cut == (max(0, min(starts) - len(before)) if starts else None)
        if starts:
            return
        text = longer
        held = max((size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0)
        assert search.certain == max(0, len(text) - held - len(before))


@given(pieces=st.lists(st.text(" '.,?!nmstvre", max_size=4), max_size=30))
def test_spaces_are_cleaned_up_as_in_the_whole(pieces):
    clean_up = SpaceCleanUp()
    grown = [clean_up.push(piece) for piece in pieces]
    assert "".join(grown) + clean_up.finish() == clean_up_spaces("".join(pieces))
