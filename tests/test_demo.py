import logging
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import gradflow
from gradflow import demo
from gradflow.corpus import make_corpus, read_sources
from gradflow.errors import RunError, UsageError


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A demo that is too short to learn anything: what it writes, not what it finds."""
    out = tmp_path_factory.mktemp("demo") / "out"
    return demo.run(out, steps=3, depth=2), out


def test_corpus_is_the_standard_library_in_characters_that_print():
    text = read_sources(50_000)
    assert len(text) == 50_000
    assert "import" in text
    assert all(c == "\n" or c.isprintable() and c.isascii() for c in text)
    assert text == read_sources(50_000)


def test_windows_hold_every_character_once_and_one_in_twenty_is_held_out():
    text = read_sources(20_000)
    corpus = make_corpus(text, 10)
    assert len(corpus.held_out) == len(corpus.training) // 19
    windows = torch.cat([corpus.training, corpus.held_out]).tolist()
    spelled = Counter("".join(corpus.characters[n] for n in window) for window in windows)
    assert spelled == Counter(text[at : at + 10] for at in range(0, 20_000, 10))


def test_entropy_is_what_the_frequencies_of_characters_cost_on_held_out_text():
    corpus = make_corpus("aab" * 400, 2)
    share = {"a": 2 / 3, "b": 1 / 3}
    followers = [corpus.characters[n] for n in corpus.held_out[:, 1].tolist()]
    assert corpus.entropy == pytest.approx(-sum(math.log(share[c]) for c in followers) / len(followers))


def test_a_python_without_its_sources_is_told_so():
    with pytest.raises(UsageError, match="expected 1,000,000,000,000 characters of Python source"):
        read_sources(10**12)


def test_demo_writes_three_runs_a_report_each_and_a_comparison(short):
    outcomes, out = short
    assert sorted(path.name for path in out.iterdir()) == ["comparison.html", "no-residuals", "post-norm", "pre-norm"]
    assert [len(gradflow.load(out / o.variant.folder).branches) for o in outcomes] == [4, 0, 4]
    for outcome in outcomes:
        assert outcome.report == out / outcome.variant.folder / "report.html"
        assert outcome.report.read_text(encoding="utf-8").startswith("<!doctype html>")
        assert outcome.run.steps == [0, 1, 2]
        assert not outcome.run.meta["stopped"]
    assert all(o.variant.name in (out / "comparison.html").read_text(encoding="utf-8") for o in outcomes)


def test_all_models_see_the_same_text_from_the_same_weights(short):
    rows = [outcome.run.table("parameters").to_pylist() for outcome in short[0]]
    first = [{row["parameter"]: row["weight_sq"] for row in table if row["step"] == 0} for table in rows]
    assert first[0] == first[1]
    assert set(first[2]) - set(first[0]) == {"network.encoder.final_norm.weight", "network.encoder.final_norm.bias"}
    assert all(first[2][name] == value for name, value in first[0].items())


def test_the_same_demo_again_gives_the_same_figures_in_a_new_directory(short, capsys):
    outcomes, out = short
    again = demo.run(out, steps=3, depth=2)
    assert [o.loss for o in again] == [o.loss for o in outcomes]
    assert again[0].report.parent.parent == out.with_name("out-1")
    printed = capsys.readouterr().out
    assert f"{out}-1/comparison.html" in printed
    assert all(f"{o.loss:.2f}" in printed for o in again)


def test_force_replaces_an_earlier_demo_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    (tmp_path / "pre-norm").mkdir()
    (tmp_path / "pre-norm" / "mine.pt").write_text("no run of ours")
    demo._make_directory(tmp_path, force=True)
    assert (tmp_path / "pre-norm" / "mine.pt").exists()
    (tmp_path / "pre-norm" / "run.json").write_text("{}")
    assert demo._make_directory(tmp_path, force=True) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_directories_are_numbered_and_an_empty_one_is_used(tmp_path):
    out = tmp_path / "demo"
    assert demo._make_directory(out, force=False) == out
    assert demo._make_directory(out, force=False) == out
    (out / "something").touch()
    (tmp_path / "demo-1").touch()
    assert demo._make_directory(out, force=False) == tmp_path / "demo-2"


def test_a_directory_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a directory that can be written at .*file/demo"):
        demo.run(tmp_path / "file" / "demo", steps=1, depth=1)


@pytest.mark.parametrize("option", [{"steps": 0}, {"depth": 0}])
def test_no_steps_or_no_depth_is_refused(tmp_path, option):
    with pytest.raises(UsageError, match="1 or more"):
        demo.run(tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_demo_leaves_threads_random_state_and_loggers_as_they_were(tmp_path):
    torch.manual_seed(5)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    level = logging.getLogger("pytorch_lightning").level
    demo.run(tmp_path / "out", steps=1, depth=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert logging.getLogger("pytorch_lightning").level == level


@pytest.mark.slow
def test_demo_shows_what_residual_connections_do(tmp_path: Path):
    """The claims of the README about the full demo."""
    outcomes = demo.run(tmp_path / "out")
    entropy = make_corpus(read_sources(), demo.CONTEXT + 1).entropy
    post, plain, pre = outcomes
    assert post.loss < entropy - 0.5
    assert pre.loss < entropy - 0.5
    assert abs(plain.loss - entropy) < 0.15
    codes = {finding.code for finding in plain.findings if finding.severity == "error"}
    assert {"rank-collapse", "vanishing-gradient"} <= codes
    for healthy in (post, pre):
        assert [f for f in healthy.findings if f.severity != "info"] == []
