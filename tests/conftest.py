"""Shared by all tests: one thread, as the machines that run them have few cores."""

import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", help="where tensors and modules of tests are made (tests that name a device keep it)")


def pytest_configure(config):
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic algorithms ask for


@pytest.fixture(autouse=True)
def _device(request):
    torch.set_default_device(request.config.getoption("--device"))
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _fresh_runs(tmp_path_factory):
    """Runs of the zoo are trained afresh, once a session, unless `ZOO_RUNS` names where they are."""
    if "ZOO_RUNS" in os.environ:
        yield
        return
    os.environ["ZOO_RUNS"] = str(tmp_path_factory.mktemp("zoo"))
    yield
    del os.environ["ZOO_RUNS"]
