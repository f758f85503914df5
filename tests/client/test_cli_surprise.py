"""The most surprising lines of a text, compared with sums made line by line."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cellserve.cli.surprise import bits_of, most_surprising_lines


@given(st.text(alphabet="ab \n", max_size=40))
def test_lines_are_ranked_by_the_bits_of_all_their_bytes(text: str) -> None:
    content = text.encode()
    bits = np.random.default_rng(len(text)).uniform(0, 8, len(content))
    expected = []
    begin = 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        expected.append((float(bits[begin : begin + len(line)].sum()), number, len(line)))
        begin += len(line)
    expected.sort(key=lambda each: -each[0])
    lines = most_surprising_lines(content, bits, max_lines=3)
    assert [line.number for line in lines] == [number for _, number, _ in expected[:3]]
    assert [line.num_bytes for line in lines] == [size for _, _, size in expected[:3]]
    np.testing.assert_allclose([line.bits for line in lines], [total for total, _, _ in expected[:3]])


def test_an_excerpt_is_the_line_without_its_indentation_and_end() -> None:
    content = b"if x:\n    return  1\n"
    bits = np.ones(len(content))
    assert most_surprising_lines(content, bits, max_lines=1)[0].excerpt == "return  1"


def test_an_excerpt_of_a_long_line_shows_what_surprised_most() -> None:
    content = b"a" * 200 + b"needle" + b"b" * 200
    bits = np.zeros(len(content))
    bits[200:206] = 9.0
    excerpt = most_surprising_lines(content, bits, max_lines=1)[0].excerpt
    assert "needle" in excerpt
    assert len(excerpt) <= 62
    assert excerpt.startswith("…")
    assert excerpt.endswith("…")


def test_an_excerpt_holds_nothing_that_a_terminal_would_obey() -> None:
    content = b"\x1b[31mred\x07\xff\r"
    excerpt = most_surprising_lines(content, np.ones(len(content)), max_lines=1)[0].excerpt
    assert excerpt.isprintable()


def test_an_empty_text_has_no_lines() -> None:
    assert most_surprising_lines(b"", np.zeros(0), max_lines=3) == []


def test_surprisal_is_minus_the_logarithm_to_base_two() -> None:
    logprobs = np.log(np.array([0.5, 0.25, 1.0], dtype=np.float32))
    np.testing.assert_allclose(bits_of(logprobs), [1.0, 2.0, 0.0], atol=1e-6)
    assert math.isclose(bits_of(logprobs).sum(), 3.0, abs_tol=1e-6)
