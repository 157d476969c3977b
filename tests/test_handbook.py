"""The page on findings is written from the rules, and the rules tell their record on the zoo."""

from pathlib import Path

import pytest

from gradflow import handbook
from gradflow.rules import RULES

PAGE = Path(__file__).parent.parent / "docs" / "findings.md"


def test_page_on_findings_is_up_to_date():
    assert PAGE.read_text("utf-8") == handbook.page(), "run: gradflow rules --markdown > docs/findings.md"


@pytest.mark.parametrize("code", RULES)
def test_every_rule_has_a_section_with_thresholds_record_and_source(code):
    section = handbook.page().split(f"## {code}\n")[1].split("\n## ")[0]
    assert RULES[code].criterion in section
    assert RULES[code].source in section
    assert all(f"`{threshold.key}`" in section for threshold in RULES[code].thresholds)
    assert "Record on the zoo" in section


def test_record_counts_two_sick_runs_or_more_for_every_rule():
    assert all(handbook.records()[code]["sick"] >= 2 for code in RULES)
    assert handbook.healthy_runs() >= 30


def test_a_rule_that_was_not_tried_says_so(monkeypatch):
    monkeypatch.setattr(handbook, "records", dict)
    assert handbook.told("dead-units") == "not tried"
    assert "Looks like this" not in handbook.page()
