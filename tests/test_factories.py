import pytest
import torch
from torch import nn

from gradflow.cli.factories import build
from gradflow.errors import UsageError

SOURCE = """
import torch
from torch import nn


class Needs(nn.Module):
    def forward(self, ids, mask, scale=1.0):
        return ids * mask * scale


class Offers(Needs):
    example_input_array = (torch.ones(2), torch.zeros(2))


class Dummy(nn.Module):
    dummy_inputs = {"ids": torch.ones(3)}

    def forward(self, ids):
        return ids


class Vision(nn.Module):
    dummy_inputs = {"ids": torch.ones(3)}

    def forward(self, pixels):
        return pixels


class Free(nn.Module):
    def forward(self, *args, scale=2.0, **kwargs):
        return torch.ones(1) * scale


def needs(): return Needs()
def offers(): return Offers()
def dummy(): return Dummy()
def vision(): return Vision()
def free(): return Free()
def args(): return Needs(), (torch.ones(1), torch.ones(1))
def listed(): return Needs(), [torch.ones(1), torch.ones(1)]
def one(): return Dummy(), torch.ones(1)
def named(): return Needs(), {"ids": torch.ones(1), "mask": torch.ones(1)}
def both(): return Needs(), (torch.ones(1),), {"mask": torch.ones(1)}
def inputs(): return torch.ones(1), torch.ones(1)
def inputs_and_names(): return (torch.ones(1),), {"mask": torch.ones(1)}
def only_names(): return {"ids": torch.ones(1), "mask": torch.ones(1)}
def no_model(): return 3
def swapped(): return torch.ones(1), Needs()
def too_many(): return Needs(), (), {}, 1
def bad_names(): return Needs(), (), 5
def breaks(): raise RuntimeError("no weights")
def quits(): raise SystemExit(3)
value = 5


class Holder:
    @staticmethod
    def make(): return Free()
"""

LINE = 1 + SOURCE.splitlines().index('def breaks(): raise RuntimeError("no weights")')


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """A module of factories in the current directory, with a name of its own."""
    monkeypatch.chdir(tmp_path)
    name = f"factories_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.setattr("sys.path", ["/nowhere"] + __import__("sys").path)
    return name


@pytest.mark.parametrize(
    ("factory", "inputs", "args", "kwargs"),
    [
        ("args", None, 2, []),
        ("listed", None, 2, []),
        ("one", None, 1, []),
        ("named", None, 0, ["ids", "mask"]),
        ("both", None, 1, ["mask"]),
        ("offers", None, 2, []),
        ("dummy", None, 0, ["ids"]),
        ("free", None, 0, []),
        ("needs", "inputs", 2, []),
        ("needs", "inputs_and_names", 1, ["mask"]),
        ("needs", "only_names", 0, ["ids", "mask"]),
        ("args", "only_names", 0, ["ids", "mask"]),
        ("Holder.make", None, 0, []),
    ],
)
def test_a_factory_gives_a_model_that_runs_on_its_inputs(module, factory, inputs, args, kwargs):
    subject = build(f"{module}:{factory}", inputs and f"{module}:{inputs}")
    assert isinstance(subject.model, nn.Module)
    assert (len(subject.args), sorted(subject.kwargs)) == (args, kwargs)
    assert isinstance(subject.model(*subject.args, **subject.kwargs), torch.Tensor)


def test_a_file_is_taken_as_well(module, tmp_path):
    assert len(build(f"{tmp_path}/{module}.py:args").args) == 2


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("{module}", "expected module:function, got"),
        (":args", "expected module:function, got ':args'"),
        ("no_such_module_xyz:make", "got ModuleNotFoundError: No module named 'no_such_module_xyz'"),
        ("nowhere.py:make", "got FileNotFoundError: no file"),
        ("{module}:nothing", "has no attribute 'nothing'"),
        ("{module}:value", "to be a function without arguments, got int"),
        ("{module}:no_model", r"\(module, args\) or \(module, args, kwargs\), got int"),
        ("{module}:swapped", r"got \(Tensor, Needs\); return the model first"),
        ("{module}:too_many", r"got \(Needs, tuple, dict, int\)"),
        ("{module}:bad_names", "expected a dict of keyword arguments as the third item, got int"),
        ("{module}:breaks", rf"got RuntimeError: no weights at factories_\d+.py:{LINE}"),
        ("{module}:quits", "got SystemExit: 3"),
        ("{module}:needs", "got Needs alone, whose forward needs ids, mask; return .* or pass --input"),
        ("{module}:vision", "got Vision alone, whose forward needs pixels"),
        ("{module}:Needs.forward", "missing 1 required positional argument|missing 3 required"),
    ],
)
def test_what_does_not_fit_is_said_with_what_was_got(module, target, said):
    with pytest.raises(UsageError, match=said):
        build(target.format(module=module))


def test_a_module_that_fails_to_import_is_named_with_the_line(module, tmp_path):
    (tmp_path / "broken_module_xyz.py").write_text("import os\n\nraise ValueError('half done')\n")
    with pytest.raises(UsageError, match=r"got ValueError: half done at broken_module_xyz.py:3"):
        build("broken_module_xyz:make")
    (tmp_path / "no_python_xyz.py").write_text("def broken(:\n")
    with pytest.raises(UsageError, match="got SyntaxError"):
        build("no_python_xyz:make")
