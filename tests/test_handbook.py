"""The handbook is written from the rules, its pictures from the zoo, and the rules tell their record on the zoo."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from gradflow.cli import handbook
from gradflow.plotting import gallery
from gradflow.rules import RULES

DOCS = Path(__file__).parents[1] / "docs"
MOST_BYTES = 100_000  # of a picture


def test_pages_are_what_the_rules_say():
    pages = handbook.pages()
    assert set(pages) == {"findings.md", *(f"findings/{code}.md" for code in RULES)}
    assert {page.name for page in (DOCS / "findings").glob("*.md")} == {f"{code}.md" for code in RULES}
    for name, text in pages.items():
        assert (DOCS / name).read_text("utf-8") == text, f"{name} is out of date: run make docs"


@pytest.mark.parametrize("code", RULES)
def test_every_page_shows_a_picture_of_the_gallery_with_its_titles(code):
    assert f"]({code}.svg)" in handbook.pages()[f"findings/{code}.md"]
    assert RULES[code].picture in gallery.BY_KEY
    picture = DOCS / "findings" / f"{code}.svg"
    assert picture.stat().st_size < MOST_BYTES
    written = "".join(ElementTree.parse(picture).getroot().itertext())
    assert f"{code}: {handbook.records()[code]['example']['run']}" in written


def test_every_page_is_reached_from_the_index_and_leads_back():
    index = handbook.pages()["findings.md"]
    assert all(f"(findings/{code}.md)" in index for code in RULES)
    assert all("(../findings.md)" in text for name, text in handbook.pages().items() if name != "findings.md")


def test_papers_are_links():
    assert "[arXiv:1903.06733](https://arxiv.org/abs/1903.06733)" in handbook.pages()["findings/dead-units.md"]


@pytest.mark.parametrize("code", RULES)
def test_every_rule_has_a_section_with_thresholds_record_and_source(code):
    rule, section = RULES[code], handbook.page().split(f"## {code}\n")[1].split("\n## ")[0]
    assert rule.criterion in section
    assert rule.source.split(",")[0] in section
    assert all(f"`{threshold.key}`" in section for threshold in rule.thresholds)
    assert "Record on the zoo" in section


def test_record_counts_two_sick_runs_or_more_for_every_rule():
    assert all(handbook.records()[code]["sick"] >= 2 for code in RULES)
    assert handbook.healthy_runs() >= 30


def test_a_rule_that_was_not_tried_says_so(monkeypatch):
    monkeypatch.setattr(handbook, "records", dict)
    assert handbook.told("dead-units") == "not tried"
    assert "Looks like this" not in handbook.page()
    assert ".svg" not in "".join(handbook.pages().values())
