"""A run directory is data from a stranger, and the names in a model may be hostile: nothing is executed or escapes."""

from __future__ import annotations

import html.parser
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from trainings import BATCH, TOKENS, WIDTH, seed

import gradflow
from gradflow.errors import GradflowError

NAMES = ["<script>alert(1)</script>", "a b", "../../etc", "{{ 7*7 }}", 'x" onload="alert(1)', "层", "$x^2$", "a\nb", "]]></style>"]


class Hostile(nn.Module):
    """Modules whose names try to break out of a page, a path and a query."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            self._modules[name] = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for name in NAMES:
            x = x + torch.relu(self._modules[name](x))
        return x


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    seed()
    root = tmp_path_factory.mktemp("hostile")
    model = Hostile()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradflow.Recorder(model, optimizer, root / "run", every_n_steps=1, strict=True) as recorder:
        for _ in range(3):
            with recorder.step():
                optimizer.zero_grad()
                model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
                optimizer.step()
    return root / "run"


@pytest.fixture
def run_directory(hostile, tmp_path):
    return Path(shutil.copytree(hostile, tmp_path / "run"))


class Page(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.attributes = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.links += [value for name, value in attrs if name in {"src", "href", "action", "data", "xlink:href"} and value and not value.startswith("#")]
        self.inline = [*getattr(self, "inline", []), *[value for name, value in attrs if name == "src"]]


def test_hostile_names_are_recorded_and_read_as_they_are(hostile):
    run = gradflow.load(hostile)
    assert run.problems == []
    assert len(run.branches) == len(NAMES)
    assert {name for name in run.table("parameters")["parameter"].to_pylist()} == {f"{name}.{kind}" for name in NAMES for kind in ("weight", "bias")}
    assert sorted(path.name for path in hostile.iterdir() if path.is_dir()) == sorted({*os.listdir(hostile)} - {"run.json", "report.html"})


def test_report_escapes_everything_and_refers_to_nothing_outside(hostile, tmp_path):
    gradflow.report(gradflow.load(hostile), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in text
    page = Page(text)
    assert not [name for name in page.attributes if name.startswith("on")]
    assert not [link for link in page.inline if not link.startswith("data:")]
    assert not {"iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "49" not in [word.strip() for word in text.split("7*7")[1:2]]


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path):
    pq.write_table(pa.table({"step": [1], "evil": ["x"]}), path)


def _wrong_type(path):
    pq.write_table(pa.table({"step": ["one"], "branch": ["x"]}), path)


def _link(path):
    path.unlink()
    path.symlink_to("/etc/passwd")


def _directory(path):
    path.unlink()
    path.mkdir()


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _pickle(path):
    path.write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")


@pytest.mark.parametrize("damage", [_truncate, _foreign, _wrong_type, _link, _directory, _fifo, _pickle])
def test_broken_part_is_named_and_the_rest_is_read(damage, run_directory):
    part = next((run_directory / "branches").iterdir())
    damage(part)
    run = gradflow.load(run_directory)
    assert any(part.name in problem for problem in run.problems)
    assert run.table("branches").num_rows == 0
    assert run.table("parameters").num_rows > 0
    gradflow.diagnose(run)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"schema_version": "x"}', b"\xff\xfe\x00", b'{"schema_version": 10000, "gradflow": "99"}', b"[" * 100_000])
def test_broken_description_is_a_gradflow_error_that_names_the_file(content, run_directory):
    (run_directory / "run.json").write_bytes(content)
    with pytest.raises(GradflowError, match=r"run\.json"):
        gradflow.load(run_directory)


MANGLED = {
    "branches": [1, "x", {"name": None}, {"name": "a", "depth": "deep"}, {"name": "ok"}], "layers": "none", "streams": [{"name": "s", "points": "xyz"}],
    "parameters": [{"name": "p", "shape": [1, "x"]}], "optimizers": [1, None, {"groups": 3}], "config": [], "world_size": -1, "stopped": 5, "problems": [3],
}  # fmt: skip


@pytest.mark.parametrize("key", MANGLED)
def test_mangled_description_reads_as_far_as_it_goes(key, run_directory, tmp_path):
    path = run_directory / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: MANGLED[key]}))
    try:
        run = gradflow.load(run_directory)
        gradflow.diagnose(run)
        gradflow.report(run, tmp_path / "report.html")
    except GradflowError as error:
        assert "run.json" in str(error)


def test_links_lead_nowhere(run_directory, tmp_path):
    secret = tmp_path / "secret"
    shutil.copytree(run_directory / "branches", secret)
    shutil.rmtree(run_directory / "branches")
    (run_directory / "branches").symlink_to(secret, target_is_directory=True)
    run = gradflow.load(run_directory)
    assert run.table("branches").num_rows == 0
    assert any("branches" in problem for problem in run.problems)


def test_opening_a_run_writes_nothing(run_directory):
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_directory.rglob("*") if path.is_file()}
    run = gradflow.load(run_directory)
    for table in ("branches", "layers", "parameters", "streams", "steps"):
        run.table(table)
    gradflow.diagnose(run)
    repr(run), run._repr_html_()
    after = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run_directory.rglob("*") if path.is_file()}
    assert after == before


def test_recorder_does_not_write_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "branches").symlink_to(outside, target_is_directory=True)
    model = Hostile()
    recorder = gradflow.Recorder(model, None, tmp_path / "run", every_n_steps=1)
    with recorder.step():
        model(torch.randn(BATCH, TOKENS, WIDTH)).square().mean().backward()
    recorder.close()
    assert list(outside.iterdir()) == []
