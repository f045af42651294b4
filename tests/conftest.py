"""`python -m pytest` runs the quick tests, with --slow all. Only test_cuda.py's use a GPU."""
import pathlib
import signal
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        items[:] = [item for item in items if "slow" not in item.keywords]


# Several threads would wait for each other at every small product, and on a busy machine for long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def surroundings(request, monkeypatch):
    """The same random numbers for every test; one thread; and a GPU for test_cuda.py only."""
    torch.manual_seed(0)
    if request.module.__name__ != "test_cuda":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if request.module.__name__ != "test_notebooks":
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def cli(monkeypatch, tmp_path):
    """What `python train.py ...` does, in an empty folder and with fewer shapes."""
    import train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(train, "shapes", lambda n=64, real=train.shapes: real(n))
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
    yield lambda *argv: train.explained(train.main, [*map(str, argv)])
    for number, handler in handlers:
        signal.signal(number, handler)
