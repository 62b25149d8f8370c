"""Fixtures that several test files share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family or variant -> its directory, built once a session; change only copies."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: tiny.build(root / name, name))
