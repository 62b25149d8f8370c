"""Fixtures that several test files share."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny
import tiny_types

from se_compress.model.live import Weights
from se_compress.model.streaming import StreamedModel


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a family or variant -> its directory, built once a session; change only copies."""
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda name: tiny.build(root / name, name))


@pytest.fixture
def layer_watch(monkeypatch: pytest.MonkeyPatch) -> tiny.LayerWatch:
    """Sees every layer that is loaded during the test."""
    watch = tiny.LayerWatch()
    monkeypatch.setattr(StreamedModel, "load_layer", lambda model, at: watch.load_layer(model, at))
    monkeypatch.setattr(Weights, "experts", lambda *args: watch.load_experts(*args))
    return watch


@pytest.fixture(scope="session")
def tiny_type(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model type of transformers' experts interface, "-published" behind it for the settings of
    published checkpoints -> its directory, built once a session; change only copies."""
    root = tmp_path_factory.mktemp("types")
    return cache(lambda name: tiny_types.build_named(root / name, name))
