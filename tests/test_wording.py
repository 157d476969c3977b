"""Wording: names and numbers as people read them."""

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradflow.wording import MOST_NAMES, label, number, plain, printable, rows_of_names


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"), (1.0, "1"), (0.98765, "0.988"), (0.99999999, "1"), (0.9998, "0.9998"), (-0.5, "\N{MINUS SIGN}0.5"), (1234.5, "1,234"), (3.2e-7, "3.2×10⁻⁷"), (1e-5, "10⁻⁵"),
        (12500.0, "1.2×10⁴"), (math.nan, "NaN"), (math.inf, "∞"), (-math.inf, "\N{MINUS SIGN}∞"), (5e-324, "4.9×10⁻³²⁴"), (1.7e308, "1.7×10³⁰⁸"),
    ],
)  # fmt: skip
def test_numbers_are_written_with_few_digits(value, text):
    assert number(value) == text


@given(st.floats(-1.7e308, 1.7e308))
def test_a_written_number_reads_back_to_within_six_percent(value):
    text = number(value).replace("\N{MINUS SIGN}", "-").replace(",", "")
    powers = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    mantissa, _, power = text.partition("10") if text[-1] in "⁰¹²³⁴⁵⁶⁷⁸⁹" else (text, "", "")
    back = float(f"{mantissa.removesuffix('×') or 1}e{power.translate(powers) or 0}")
    assert back == pytest.approx(value, rel=0.06, abs=5e-324)


@given(st.text(st.characters(codec=None)))
def test_nothing_unseen_is_left_in_a_name(text):
    assert all(unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"} for char in printable(text))
    printable(text).encode("utf-8")


def test_a_direction_override_is_written_out():
    assert printable("a\u202egnp.exe") == "a\\u202egnp.exe"


def test_a_label_is_shortened_in_the_middle_and_never_read_as_mathematics():
    assert label("x" * 100, 20) == "x" * 9 + "…" + "x" * 10
    assert label("$a$") == "\\$a\\$"


def test_names_of_a_deep_model_are_thinned_by_module():
    names = [f"model.layers.{i}.{part}" for i in range(100) for part in ("attn", "mlp")]
    common, positions, short = rows_of_names(names)
    assert common == "model.layers"
    assert len(positions) == len(short) <= MOST_NAMES
    assert short[0] == "0"
    assert min(b - a for a, b in zip(positions, positions[1:])) >= 0.8 * len(names) / MOST_NAMES


def test_a_stranger_at_the_head_of_the_stream_does_not_lengthen_the_others():
    common, _, short = rows_of_names(["embed", *(f"model.layers.{i}:add" for i in range(30))])
    assert common == "model.layers"
    assert all(not name.startswith("model") for name in short)


def test_few_names_are_all_shown():
    assert rows_of_names(["net.0", "net.1", "net.2"]) == ("net", [0, 1, 2], ["0", "1", "2"])
    assert rows_of_names([]) == ("", [], [])


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "yes"), (False, "no"), (None, "\N{EN DASH}"), (12345, "12,345"), (0.5, "0.5"), ([], "none"), ([1, 2], "1, 2"), (list(range(10)), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"), ({"a_b": 1}, "a b 1"), ("x\x00", "x\\x00")],
)
def test_evidence_is_written_as_a_person_would(value, text):
    assert plain(value) == text


def test_a_name_that_leaves_the_common_start_is_shown_from_there():
    names = [*(f"net.encoder.blocks.{i}" for i in range(12)), "net.encoder.final_norm"]
    assert rows_of_names(names)[2][-1] == "final_norm"
