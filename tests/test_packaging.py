import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import gradflow

ROOT = Path(__file__).parents[1]
SOURCES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", "gradflow", "callbacks"]
LIBRARY = "gradflow/_sums.abi3.so"


def run(*command, cwd=None):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what packaging reads, so that the checkout gets no build folders."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """Wheel and sdist; the wheel is built from the sdist, so that a file missing there is missing here too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def contents(built):
    with zipfile.ZipFile(built[0]) as wheel:
        return wheel.namelist()


def sources(folder):
    return {
        path.relative_to(ROOT / folder).as_posix()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".json"} or path.name == "py.typed"
    }


def test_wheel_holds_every_module_template_and_the_typing_mark(contents):
    expected = {f"gradflow/{name}" for name in sources("gradflow")}
    expected |= {f"gradflow/callbacks/{name}" for name in sources("callbacks")}
    assert {"gradflow/py.typed", "gradflow/report/templates/report.html", "gradflow/callbacks/lightning.py"} <= expected
    assert {name for name in contents if ".dist-info/" not in name} - {LIBRARY} == expected


def test_wheel_puts_nothing_but_gradflow_into_site_packages(contents):
    assert {name.split("/")[0] for name in contents} == {"gradflow", f"gradflow_diagnostics-{gradflow.__version__}.dist-info"}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here")
def test_wheel_holds_the_compiled_sums_and_serves_every_python_from_the_first(built, contents):
    assert LIBRARY in contents
    assert re.search(r"-cp311-abi3-\w+\.whl$", built[0].name)


def test_without_a_compiler_the_wheel_is_built_and_numpy_sums(checkout, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "checkout")
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, copy]
    done = subprocess.run(command, env={**os.environ, "CC": "no-such-compiler"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'building extension "gradflow._sums" failed' in done.stdout + done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert LIBRARY not in wheel.namelist()
        wheel.extractall(tmp_path / "installed")
    code = "import torch; from gradflow import compiled, statistics; print(compiled.SUMS, statistics.sum_squares(torch.ones(9)))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "installed", capture_output=True, text=True)
    assert shown.stdout.strip() == "{} 9.0", shown.stderr


def test_metadata_names_the_distribution_licence_and_command(built):
    with zipfile.ZipFile(built[0]) as wheel:
        info = f"gradflow_diagnostics-{gradflow.__version__}.dist-info"
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        commands = wheel.read(f"{info}/entry_points.txt").decode()
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()
    assert (metadata["Name"], metadata["Version"]) == ("gradflow-diagnostics", gradflow.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert "MIT License" in licence
    assert "gradflow = gradflow.cli:main" in commands


def test_sdist_holds_the_sources_where_they_stand_in_the_checkout(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "setup.py", "gradflow/_sums.c", "gradflow/_samples.c", "gradflow/_helpers.c", "gradflow/_helpers.h", "gradflow/_lanes.h", "gradflow/_portable.h", "README.md", "LICENSE", "callbacks/lightning.py", "gradflow/report/templates/report.html"} <= names
    assert not any(name.startswith("gradflow/callbacks/") for name in names)


def new_environment(folder):
    """An environment of its own that sees the third-party packages of this one, so that nothing is downloaded."""
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip())
    # A folder that a .pth file names does not have its own .pth files read: an editable install here stays out.
    (site / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def install(python, *what):
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what)


ATTACH = """
import os, gradflow, gradflow.callbacks
from gradflow.callbacks import GradientFlowMonitor
import pytorch_lightning
assert isinstance(GradientFlowMonitor(), pytorch_lightning.Callback)
print(os.path.dirname(gradflow.__file__), os.path.dirname(gradflow.callbacks.__file__))
"""

USER = """
from gradflow.callbacks import GradientFlowMonitor
monitor: GradientFlowMonitor = GradientFlowMonitor(every_n_steps=10)
reveal_type(monitor.findings)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="paths of a virtual environment are those of POSIX")
def test_installed_wheel_works_and_is_typed(built, tmp_path):
    python = new_environment(tmp_path / "env")
    install(python, built[0])
    core, callbacks = run(python, "-c", ATTACH, cwd=tmp_path).split()
    assert Path(core).is_relative_to(tmp_path / "env")
    assert Path(callbacks) == Path(core) / "callbacks"
    assert run(tmp_path / "env" / "bin" / "gradflow", "--version").split() == ["gradflow", gradflow.__version__]
    (tmp_path / "user.py").write_text(USER)
    checked = run(sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path, "user.py", cwd=tmp_path)
    assert 'Revealed type is "list[gradflow.records.Finding]"' in checked


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="paths of a virtual environment are those of POSIX")
def test_editable_install_follows_the_checkout(checkout, tmp_path):
    python = new_environment(tmp_path / "env")
    install(python, "--editable", checkout)
    core, callbacks = run(python, "-c", ATTACH, cwd=tmp_path).split()
    assert Path(core) == checkout / "gradflow"
    assert Path(callbacks) == checkout / "callbacks"
