"""The design's table of levels as data, held against the imports that the files really make."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A level is a list of parts, a part a list of files. A file imports from lower levels, and from files that stand
# before it in its own part; for type annotations alone it may also look further on in its own part.
LEVELS = [
    [
        "records",
        "schema",
        "wording",
        "shapes",
        "headline",
        "sublayers models",
        "corpus",
    ],
    [
        """tracing.operations tracing.axes tracing.modules tracing.lineage tracing.register tracing.composites
        tracing.reentrant tracing.frames tracing.attachment tracing.observation tracing.tape tracing.tracer
        tracing""",
        """residuals.families residuals.likeness residuals.roles residuals.ancestry residuals.sums residuals.paths
        residuals.joins residuals.naming residuals.streams residuals.trunks residuals.analysis
        residuals""",
        "compiled threads triton_sums device_sums host_sums statistics geometry attention",
        "metrics",
        "theory",
    ],
    [
        "discovery",
        """store.storage store.manifest store.merging store.parts store.reading store.directories store.writer store.run
        store store.conservation store.grids store.readings""",
    ],
    [
        """recorder.buffer recorder.measurable recorder.hooks recorder.join_taps recorder.join_gradients recorder.ledgers
        recorder.layer_taps recorder.parameter_taps recorder.stream_taps recorder.attention_taps recorder.plans
        recorder.addition_taps recorder.leeway
        recorder.origins recorder.guard_taps recorder.guard
        recorder.taps recorder.recomputation recorder.description recorder.options recorder.recording recorder.sharding
        recorder.scaling recorder.stepping recorder.recorder recorder""",
        """rules.texts rules.view rules.faults rules.depth rules.grouping rules.registry rules.gradients rules.silence
        rules.updates rules.attention rules.balance rules.blocked rules.frozen rules.explosion rules.nonfinite
        rules.precision rules.signals rules.tokens rules.units rules""",
        """plotting.style plotting.svg plotting.comparison plotting.depth plotting.heat plotting.layers plotting.timeline
        plotting.tokens plotting plotting.gallery plotting.depth_series plotting.series""",
    ],
    [
        "report.inventory report.summary report.differences report.page report live",
        "probing",
        "watch",
        "cli.settings",
        "cli.handbook cli.console cli.outline",
        "cli.factories",
    ],
    [
        "callbacks.common callbacks.huggingface callbacks.lightning callbacks",
        "cli.commands cli.series_command cli.program cli demo __main__",
    ],
]

# Below all levels: what is raised, and the package itself, of which lower levels want the version alone.
EVERYWHERE = {"errors", "gradflow:__version__"}

# Imports that the levels forbid, each with its reason.
EXCEPTIONS = {
    ("demo", "callbacks"): "the demo shows the callback at work",
    ("cli.program", "demo"): "a command starts it",
    ("store.run", "plotting.gallery"): "Run.plot, for notebooks",
}

# Packages that only some files may import, wherever in the file the import stands.
GUESTS = {
    "matplotlib": {
        f"plotting.{name}"
        for name in ("style", "svg", "comparison", "depth", "heat", "layers", "timeline", "tokens", "gallery", "series")
    },
    "pytorch_lightning": {"callbacks.lightning", "demo"},
    "lightning": {"callbacks.lightning"},
    "transformers": {"callbacks.huggingface"},
}

WITHOUT_TORCH = [
    "records", "metrics", "theory", "residuals", "store", "store.writer", "rules", "plotting", "plotting.gallery", "report",
    "cli",
]  # fmt: skip


def files():
    """Each module's name without `gradflow.`, and its file."""
    found = {}
    for path in [*ROOT.glob("gradflow/**/*.py"), *ROOT.glob("callbacks/**/*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("gradflow.").removesuffix(".__init__")
        found["gradflow" if name == "__init__" else name] = path
    return found


FILES = files()


class Imports(ast.NodeVisitor):
    """Every import of a file, as (module or name, whether it is for type annotations alone)."""

    def __init__(self, name):
        self.here = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
        self.typing = False
        self.found = set()

    def visit_If(self, node):
        before, self.typing = self.typing, self.typing or ast.unparse(node.test) == "TYPE_CHECKING"
        for child in node.body:
            self.visit(child)
        self.typing = before
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node):
        self.found |= {(alias.name, self.typing) for alias in node.names}

    def visit_ImportFrom(self, node):
        module = node.module or ""
        if node.level:
            module = ".".join(filter(None, ("gradflow", self.here, module)))
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            is_module = module.startswith("gradflow") and inner.removeprefix("gradflow.") in FILES
            self.found.add((inner if is_module else f"{module}:{alias.name}", self.typing))


def imports(name):
    visitor = Imports(name)
    visitor.visit(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return visitor.found


def own_imports(name):
    """Imports from gradflow itself: (module without `gradflow.`, or `gradflow:name`, typing).

    Python runs a package's `__init__` before any of its modules: to those outside, that is an import too.
    """
    for target, typing in imports(name):
        module, _, attribute = target.partition(":")
        if module == "gradflow":
            yield f"gradflow:{attribute}" if attribute else "gradflow", typing
        elif module.startswith("gradflow."):
            inner = module.removeprefix("gradflow.")
            yield inner, typing
            package = inner.partition(".")[0]
            if package not in {inner, name.partition(".")[0]} and (name, inner) not in EXCEPTIONS:
                yield package, typing


PLACES = {
    name: (level, part, place)
    for level, parts in enumerate(LEVELS)
    for part, names in enumerate(parts)
    for place, name in enumerate(names.split())
}


def test_every_file_has_its_place_in_the_table_and_every_place_its_file():
    on_disk = FILES.keys() - {"gradflow", "errors"}
    assert (on_disk - PLACES.keys(), PLACES.keys() - on_disk) == (set(), set())


def is_allowed(name, target, typing):
    if target in EVERYWHERE or (name, target) in EXCEPTIONS:
        return True
    level, part, place = PLACES[name]
    if target.startswith("gradflow"):
        return level >= 4  # the package re-exports everything below
    if target not in PLACES:
        return False
    target_level, target_part, target_place = PLACES[target]
    return target_level < level or ((target_level, target_part) == (level, part) and (typing or target_place < place))


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_file_imports_from_lower_levels_only(name):
    assert [target for target, typing in own_imports(name) if not is_allowed(name, target, typing)] == []


def test_errors_import_nothing_of_ours():
    assert list(own_imports("errors")) == []


def test_every_exception_is_used():
    assert all(target in dict(own_imports(name)) for name, target in EXCEPTIONS)


@pytest.mark.parametrize("package", sorted(GUESTS))
def test_a_heavy_package_is_imported_where_the_design_says_and_nowhere_else(package):
    users = {
        name for name in FILES if any(target.split(".")[0].split(":")[0] == package for target, _ in imports(name))
    }
    assert users <= GUESTS[package]


def loaded_after(code, *packages):
    """Which of the packages a fresh Python has loaded after `code`."""
    check = f"{code}\nimport sys; print(*sorted(set(sys.modules) & {set(packages)!r}))"
    return subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


HEAVY = ("matplotlib", "lightning", "pytorch_lightning", "transformers")


def test_import_of_the_package_is_quick():
    assert loaded_after("import gradflow", "torch", "pyarrow", *HEAVY) == []
    assert loaded_after("import gradflow.callbacks", "torch", "pyarrow", *HEAVY) == []


def test_what_starts_a_command_or_watches_a_training_is_quick():
    assert loaded_after("import gradflow.cli, gradflow.live, gradflow.watch", "torch", *HEAVY) == []


def test_public_names_load_what_they_need_and_no_more():
    public = "from gradflow import Branch, Finding, GradflowError, Recorder, Run, diagnose, find_branches, load, probe"
    assert loaded_after(public, "torch", *HEAVY) == ["torch"]
    assert loaded_after("from gradflow import report", *HEAVY) == ["matplotlib"]


def test_what_only_reads_runs_does_not_need_torch():
    modules = "\n".join(f"import gradflow.{name}" for name in WITHOUT_TORCH)
    assert loaded_after(modules, "torch") == []


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import gradflow.report",
        "from gradflow.report import compare",
        "import gradflow; gradflow.compare",
        "import gradflow; gradflow.report; import gradflow.report",
        "from gradflow import report",
        "import importlib; importlib.import_module('gradflow.report')",
        "import gradflow.cli",
    ],
)
def test_gradflow_report_is_the_function_whatever_was_imported_before(before):
    after = (
        "import gradflow, inspect, sys\n"
        "assert inspect.isfunction(gradflow.report), gradflow.report\n"
        "from gradflow import report\n"
        "from gradflow.report import report as inner, compare\n"
        "assert report is gradflow.report is inner and compare is gradflow.compare\n"
        "assert inspect.ismodule(sys.modules['gradflow.report'])"
    )
    assert loaded_after(f"{before}\n{after}", "gradflow.report") == ["gradflow.report"]


def test_public_names_are_listed_and_a_wrong_one_is_refused_with_the_list():
    import gradflow

    assert set(gradflow.__all__) <= set(dir(gradflow))
    assert gradflow.__all__ == sorted(gradflow.__all__)
    assert all(getattr(gradflow, name) is not None for name in gradflow.__all__)
    with pytest.raises(AttributeError, match="no attribute 'reprot'; public names: .*report"):
        gradflow.reprot


def test_packages_of_the_project_file_are_those_on_disk():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("gradflow", "callbacks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    mapping = setuptools["package-dir"]
    assert mapping == {"gradflow.callbacks": "callbacks"}
    assert {mapping.get(package, package) for package in setuptools["packages"]} == on_disk


def test_nothing_shadows_the_mapping_of_callbacks():
    """A directory `gradflow/callbacks/`, even an empty one, would hide `callbacks/` in an editable install."""
    assert not (ROOT / "gradflow" / "callbacks").exists()
