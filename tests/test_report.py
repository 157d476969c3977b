"""The report: what it says, that it is safe and whole, and what it costs."""

import re
import time
from functools import cached_property
from html.parser import HTMLParser

import numpy as np
import pytest
import runs

from gradflow.errors import RunError, UsageError
from gradflow.plotting import gallery
from gradflow.report import compare, render, render_comparison, report, summary
from gradflow.report.page import papers
from gradflow.store import readings
from gradflow.store.grids import View
from gradflow.wording import number

VOID = {"wbr", "meta", "br", "img", "input", "link", "hr"}
ALLOWED = set(
    "html head meta title style body a header span h1 h2 h3 h4 p nav ul ol li main section div article details summary dl dt dd table caption thead tbody tr th td "
    "figure figcaption strong bdi code br wbr footer svg g path text tspan use defs clippath rect image desc line".split()
)


class Page(HTMLParser):
    """A parsed page: elements as (tag, attributes), visible text, whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements, self.words, self._open, self._joined = [], [], [], False
        self.feed(html)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag, attrs):
        self._joined = tag == "wbr"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in {"style", "title", "desc", "text", "tspan"}:
            if self._joined:  # a word that may be broken is one word
                self.words[-1] += data
            else:
                self.words.append(data)
        self._joined = False

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @cached_property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


@pytest.fixture
def without_pictures(monkeypatch):
    """Pages are made without drawing, for tests of their words: nine tenths of a page's time is its pictures."""
    monkeypatch.setattr(gallery, "picture_svg", lambda picture, *_, **__: f'<svg class="plot"><title id="{picture.key}"></title></svg>')


@pytest.fixture(scope="module")
def sick() -> Page:
    return Page(render(runs.prenorm(blocks=4, last=1000), findings=runs.findings()))


@pytest.fixture(scope="module")
def healthy() -> Page:
    return Page(render(runs.prenorm(blocks=4, last=200), findings=[]))


@pytest.fixture(scope="module")
def attacked() -> Page:
    named = [runs.finding(where=(name,), claim=f"claim {name}", why=name, remedy=name, evidence={name: name, "list": [name]}) for name in runs.HOSTILE]
    return Page(render(runs.hostile(), findings=named))


def test_the_page_opens_with_what_is_wrong_where_and_what_to_do(sick):
    text = sick.text
    order = ["Not healthy: 2 errors and 1 warning", "The gradient at the first block", "Where blocks.0.attn , blocks.1.mlp", "Next Add residual connections around each sublayer", "Findings", "Signal over depth"]
    places = [text.index(words) for words in order[:4]] + [text.index(order[4], text.index(order[3])), text.index(order[5], text.index(order[3]))]
    assert places == sorted(places)


def test_a_finding_has_evidence_why_next_and_confidence(sick):
    text = sick.text
    for words in (
        "3 warning update-too-large steps 400 to 600 confidence: low", "gradient, first over last 4.1×10⁻⁵", "threshold 0.001", "measured 0.031 update over weight", "threshold 0.01 a rule of thumb", "Why it matters Blocks near the input",
        "Next Halve the learning rate. Lengthen the warm-up.", "largest over median 1,200", "4 info massive-activation step 1,000",
    ):  # fmt: skip
        assert words in text, words


@pytest.mark.usefixtures("without_pictures")
def test_errors_come_before_warnings_before_notes():
    page = Page(render(runs.prenorm(blocks=1, last=2), findings=runs.findings()[::-1]))
    assert re.findall(r"\d (error|warning|info) [a-z-]+ step", page.text) == ["error", "error", "warning", "info"]


def test_a_healthy_run_says_on_what_evidence(healthy):
    text = healthy.text
    assert "Healthy: nothing is wrong" in text
    assert "On the evidence of 11 sampled steps (0 to 200), 8 residual branches" in text
    assert "vanishing-gradient" in text  # among what was looked for
    assert "Ledger, furthest from 1" in text
    assert "Findings" not in text.split("Signal over depth")[0].replace("Sections", "")


@pytest.mark.usefixtures("without_pictures")
def test_findings_come_from_the_rules_unless_they_are_given():
    text = Page(render(runs.trunk(last=1000))).text
    assert "vanishing-gradient" in text
    assert "Healthy" not in text


@pytest.mark.usefixtures("without_pictures")
def test_when_it_started_is_told_wherever_it_was_written():
    for place in ({"started": "2026-01-05T10:00:00+00:00"}, {"started": "", "config": {"rows": 9, "started": "2026-01-05T10:00:00+00:00"}}):
        text = Page(render(runs.Maker(blocks=1, last=2).run(**place), findings=[])).text
        assert "Started 2026-01-05 10:00:00 UTC" in text


@pytest.mark.usefixtures("without_pictures")
def test_notes_alone_leave_a_run_healthy():
    note = runs.finding(severity="info", code="massive-activation")
    assert "Healthy: nothing is wrong" in Page(render(runs.prenorm(blocks=1, last=2), findings=[note])).text


def test_an_empty_run_says_so():
    text = Page(render(runs.empty(), findings=[])).text
    assert "Nothing was recorded" in text
    assert "Healthy" not in text


def test_a_model_without_branches_says_so_and_still_has_its_trunk_layers_and_parameters():
    page = Page(render(runs.trunk(blocks=4, last=200), findings=[]))
    assert "There are no residual branches in this model: its trunk stands in for the stream" in page.text
    assert "9 members of the trunk Members of the trunk, in order of execution" in page.text
    assert "16 layers" in page.text
    assert "16 parameters" in page.text
    assert {"fig-signal-depth", "fig-gradient-depth", "fig-gradient-map", "fig-units", "fig-update-ratio"} <= set(page.ids)
    assert "fig-ratio-depth" not in page.ids


@pytest.mark.usefixtures("without_pictures")
def test_a_recording_that_stopped_says_from_when_and_why():
    text = Page(render(runs.broken(blocks=2, last=300), findings=[])).text
    assert "Recording stopped at step 300: OSError: no space left on device" in text


def test_what_could_not_be_understood_is_shown(attacked):
    assert "Limits of this report" in attacked.text
    assert "was left out" in attacked.text


def test_every_branch_is_listed_with_its_last_figures_and_its_findings(sick):
    run = runs.prenorm(blocks=4, last=1000)
    last = [row for row in run.table("branches").to_pylist() if row["step"] == 1000]
    for at, row in enumerate(last, 1):
        start = sick.text.index(f"{at} {row['branch']} pre-norm")
        figures = sick.text[start:].split()[3:10]
        assert figures[2] == number(row["branch_ratio"])
        assert figures[4] == number(row["gain"])
    assert {"href": "#finding-1"} in sick.all("a")


def test_nothing_is_loaded_and_nothing_runs(sick, attacked):
    for page in (sick, attacked):
        policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'")
        assert "script" not in policy
        for tag, attributes in page.elements:
            assert tag in ALLOWED, tag
            for name, value in attributes.items():
                assert not name.startswith("on"), (tag, name)
                if name in {"src", "href", "xlink:href", "action", "data"}:
                    if value.startswith("https://arxiv.org/abs/"):  # a link to read, nothing that is loaded
                        assert (tag, attributes["rel"]) == ("a", "noreferrer")
                    else:
                        assert value.startswith(("#", "data:image/png;base64,")), value


def test_hostile_names_are_shown_and_never_obeyed(attacked):
    assert "<script>alert(1)</script>" in attacked.text
    assert '"><img src=x onerror=alert(1)>' in attacked.text
    assert "{{ 7*7 }}{% raw %}" in attacked.text
    assert "\\u202egnp.exe" in attacked.text
    assert "null\\x00bell\\x07" in attacked.text
    assert len(attacked.all("style")) == 1


def test_ids_are_unique_and_every_reference_has_its_target(sick, attacked):
    for page in (sick, attacked):
        assert len(page.ids) == len(set(page.ids))
        for _, attributes in page.elements:
            for name in ("aria-labelledby", "aria-describedby"):
                assert attributes.get(name, page.ids[0]) in page.ids
            if attributes.get("href", "").startswith("#"):
                assert attributes["href"][1:] in page.ids


def test_the_page_has_landmarks_a_language_and_a_text_for_every_picture(sick):
    tags = [tag for tag, _ in sick.elements]
    assert {"header", "nav", "main", "footer"} <= set(tags)
    assert sick.all("html")[0]["lang"] == "en"
    assert tags.count("h1") == 1
    plots = [attributes for attributes in sick.all("svg") if attributes.get("class") == "plot"]
    assert len(plots) >= 20
    assert all(plot["role"] == "img" and plot["aria-labelledby"] and plot["aria-describedby"] for plot in plots)
    levels = [int(tag[1]) for tag in tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))


def test_the_report_is_the_same_each_time():
    run = runs.prenorm(blocks=1, last=2)
    assert render(run, findings=runs.findings()) == render(run, findings=runs.findings())


@pytest.mark.usefixtures("without_pictures")
def test_the_file_is_replaced_as_a_whole_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert report(runs.prenorm(blocks=1, last=2), path, findings=[]) == path
    report(runs.empty(), path, findings=[])
    assert "Nothing was recorded" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="expected a path for the report that can be written, got .*choose another path"):
        report(runs.empty(), tmp_path / "file" / "report.html", findings=[])


def test_where_in_depth_shows_the_worst_at_each_place():
    run = runs.many(last=50)
    names = [branch.name for branch in run.branches]
    found = [runs.finding(severity="warning", where=(names[0],)), runs.finding(where=(f"{names[0]}.fc", names[-1]))]
    strip = summary.depth_strip(run, found)
    assert len(strip) == summary.MOST_CELLS
    assert (strip[0].severity, strip[1].severity, strip[-1].severity) == ("error", "", "error")
    assert (strip[0].first, strip[-1].last) == (names[0], names[-1])
    assert summary.depth_strip(run, [runs.finding(where=("elsewhere",))]) == []
    assert summary.depth_strip(run, [runs.finding(where=("model.language_model.transformer.layers.1",))]) == []


def test_the_ledgers_error_is_measured():
    maker = runs.Maker(blocks=2, last=8)
    tables = maker.tables()
    assert readings.ledger_error(View(runs.Run(maker.meta(), tables))) < 1e-12
    shares = tables["branches"]["signal_share"].to_numpy().copy()
    shares[5] += 0.25
    at = tables["branches"].schema.get_field_index("signal_share")
    tables["branches"] = tables["branches"].set_column(at, "signal_share", [shares])
    assert readings.ledger_error(View(runs.Run(maker.meta(), tables))) == pytest.approx(0.25)


@pytest.mark.parametrize("count", [1, 9])
def test_any_number_of_runs_is_compared(count):
    page = Page(render_comparison({f"run {i}": runs.prenorm(blocks=1 + i, last=50, seed=i) for i in range(count)}, findings=[[]] * count))
    assert f"{count} run{'s' if count > 1 else ''} compared" in page.text
    assert all(f"run {i} TinyTransformer" in page.text for i in range(count))
    assert len([plot for plot in page.all("svg") if plot.get("class") == "plot"]) == 6


@pytest.mark.usefixtures("without_pictures")
def test_differences_are_said_in_words_with_numbers():
    pair = {"with": runs.postnorm(last=1000), "without": runs.trunk(last=1000)}
    text = Page(render_comparison(pair, findings=[[], runs.findings()])).text
    assert re.search(r"The loss ends at 2\.5\d* in with , 3\.1 in without \.", text)
    assert re.search(r"The gradient at the input, over that at the output, is 0\.00\d+ in without , 1\.\d+ in with \.", text)
    assert "vanishing-gradient was found in without , and not in the other." in text
    assert "massive-activation was found" not in text


@pytest.mark.usefixtures("without_pictures")
def test_runs_that_do_not_differ_have_no_differences():
    same = {"a": runs.prenorm(blocks=2, last=200), "b": runs.prenorm(blocks=2, last=200)}
    assert "Differences that matter" not in Page(render_comparison(same, findings=[[], []])).text


@pytest.mark.usefixtures("without_pictures")
def test_runs_are_named_by_the_shortest_path_that_tells_them_apart(tmp_path):
    made = [runs.prenorm(blocks=1, last=2) for _ in range(3)]
    for run, path in zip(made, ("logs/version_0/gradflow", "logs/version_1/gradflow", None)):
        run.path = path
    path = compare(made, tmp_path / "compare.html", findings=[[]] * 3)
    text = Page(path.read_text(encoding="utf-8")).text
    for name in ("version_0/gradflow", "version_1/gradflow", "TinyTransformer TinyTransformer"):
        assert name in text
    twins = [runs.prenorm(blocks=1, last=2), runs.prenorm(blocks=1, last=2)]
    assert "TinyTransformer (2)" in Page(compare(twins, path, findings=[[], []]).read_text(encoding="utf-8")).text


def test_comparing_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected one run or more"):
        compare([], tmp_path / "compare.html")


@pytest.mark.usefixtures("without_pictures")
def test_hostile_run_names_are_shown_and_never_obeyed():
    page = Page(render_comparison({name: runs.prenorm(blocks=1, last=2) for name in runs.HOSTILE}, findings=[[]] * len(runs.HOSTILE)))
    assert all(tag in ALLOWED for tag, _ in page.elements)
    assert '"><img src=x onerror=alert(1)>' in page.text


def test_a_run_of_fifty_branches_and_two_hundred_steps_is_reported_in_under_four_seconds(tmp_path):
    run = runs.prenorm(blocks=25, steps=np.arange(200))
    start = time.process_time()
    path = report(run, tmp_path / "report.html")
    assert time.process_time() - start < 4
    assert path.stat().st_size < 1_500_000


def test_papers_are_links_and_the_text_around_them_stays_text():
    assert str(papers("<b>Dong 2021, arXiv:2103.03404</b>")) == (
        '&lt;b&gt;Dong 2021, <a href="https://arxiv.org/abs/2103.03404" rel="noreferrer">arXiv:2103.03404</a>&lt;/b&gt;'
    )
    assert "<a" not in papers('arXiv:2103."><a')
