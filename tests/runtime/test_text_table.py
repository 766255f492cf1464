"""Tables that fit a width; a number or a path is never broken."""

from __future__ import annotations

import pytest

from prefix_runtime.text_table import as_table, folded

HEADER = ("task", "size", "logits within")
ROWS = [("e2e", "1.5 MB", "3.3e-06 [1.1e-06, 4.4e-06]"), ("a task of a long name", "12 kB", "")]


def test_a_wide_table_has_a_line_for_each_row():
    assert as_table(HEADER, ROWS, 100).splitlines() == [
        "task                     size               logits within",
        "─────────────────────────────────────────────────────────",
        "e2e                    1.5 MB  3.3e-06 [1.1e-06, 4.4e-06]",
        "a task of a long name   12 kB",
    ]


def test_the_first_column_is_cut_before_the_table_is_too_wide():
    lines = as_table(HEADER, ROWS, 46).splitlines()
    assert lines[3] == "a task of…   12 kB"
    assert max(map(len, lines)) == 46


def test_a_narrow_table_is_a_block_for_each_row():
    assert as_table(HEADER, ROWS, 30).splitlines() == [
        "task e2e",
        "  size: 1.5 MB",
        "  logits within: 3.3e-06",
        "    [1.1e-06, 4.4e-06]",
        "task a task of a long name",
        "  size: 12 kB",
    ]


@pytest.mark.parametrize("width", [1, 20, 40])
def test_lines_are_folded_between_words_alone(width):
    text = "/a/path/that/is/longer-than-the-line: 123456.789 MB, all of it"
    lines = folded(text, width, indent=2).splitlines()
    assert " ".join(line.strip() for line in lines) == text
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    assert folded(text, None) == text
