"""What the tests of several files are given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from scenes import write_iclevr_layout
from tiny import COMPACT, REFERENCE, lively_generator, shorten_fits

from condgan import IterativeGenerator
from condgan.prepare import prepare

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: more threads would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def compact() -> IterativeGenerator:
    """Knows places."""
    return lively_generator(COMPACT)


@pytest.fixture(scope="session")
def reference() -> IterativeGenerator:
    """Does not know places."""
    return lively_generator(REFERENCE)


@pytest.fixture(scope="session", params=["compact", "reference"])
def generator(request: pytest.FixtureRequest) -> IterativeGenerator:
    model: IterativeGenerator = request.getfixturevalue(request.param)
    return model


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes, packed."""
    folder = write_iclevr_layout(tmp_path_factory.mktemp("data"), num_scenes=24, image_size=(64, 64))
    return prepare(folder, progress=False).path


@pytest.fixture(autouse=True)
def same_weights_whatever_ran_before() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_fits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("whole_fits"):
        shorten_fits(monkeypatch.setattr)
