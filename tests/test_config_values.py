"""Values of a config are taken for what they are, or refused in one line; what is taken,
transformers takes too."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS
from transformers.activations import ACT2CLS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from se_compress.checkpoint import open_tensors
from se_compress.config_values import ACTIVATIONS, KINDS, ROPE_TYPES, flag, integer, number, real
from se_compress.errors import SourceError
from se_compress.source import open_source
from se_compress.streaming import StreamedModel

TinyModel = Callable[[str], Path]


@pytest.fixture
def model_of(tiny_model: TinyModel, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny model that a test may break."""
    return lambda name: shutil.copytree(tiny_model(name), tmp_path / "model")


def set_config(path: Path, **changes: object) -> None:
    """As `edit_config`, but None is written as null; `...` removes a key."""
    file = path / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refusal(path: Path, match: str) -> None:
    with pytest.raises(SourceError, match=match) as caught:
        open_source(str(path))
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize(
    ("take", "taken", "refused"),
    [
        (integer, {8: 8, 9.0: 9, "8": 8, " 8 ": 8, "8.0": 8, "-3": -3, "+3": 3},
         [True, "8.5", 8.5, "", "eight", "0x8", "1_0", float("inf"), float("nan"), 10**30, "9" * 99,
          1e300, None, [8], {}]),
        (real, {1: 1.0, 1.5: 1.5, "1e-6": 1e-6, ".5": 0.5, "1.": 1.0},
         [True, "nan", "inf", "1_0", "", "one", float("inf"), float("nan"), 10**400, None, [1.0]]),
        (number, {1: 1, "32": 32, 1.5: 1.5, "1.5": 1.5}, [True, "inf", None]),
        (flag, {True: True, False: False, "true": True, "False": False},
         [2, "yes", None, [], 0.5]),
    ],
)  # fmt: skip
def test_what_a_value_is(
    take: Callable[[object], object], taken: Mapping[object, object], refused: list[object]
) -> None:
    for value, expected in taken.items():
        found = take(value)
        assert found == expected
        assert type(found) is type(expected)
    assert [value for value in refused if take(value) is not None] == []


def neighbours(value: object) -> list[object]:
    """What people and converters write in place of a value, and what they do not."""
    other: list[object] = [
        None,
        str(value),
        "",
        "x",
        [value],
        {"a": value},
        True,
        -1,
        0,
        1.5,
        10**30,
    ]
    if isinstance(value, (int, float)):
        other += [float(value), int(value), value + 1, f"{float(value)}"]
    if isinstance(value, list):
        other += [[], [None], ["x"], [1.0], ["1"], [True]]
    if isinstance(value, dict):
        other += [{}, {**value, "rope_type": None}, {**value, "rope_type": "unknown"}]
        other += [{**value, key: part} for key in value for part in ("4", None, "x", -1, [], True)]
    return other


def one_line(error: SourceError, path: Path) -> bool:
    assert str(error).isprintable()
    assert len(str(error)) < 400 + len(str(path))
    return True


def is_taken(path: Path, run: set[str]) -> bool:
    """Whether the model opens. If so, transformers has to run a layer of every kind of it; configs
    that did are in `run`."""
    try:
        source = open_source(str(path))
    except SourceError as error:
        return not one_line(error, path)
    config = json.dumps(source.config, sort_keys=True)
    if config in run:
        return True
    run.add(config)
    model = StreamedModel(source, open_tensors(source.tensors))
    hidden = model.embed([torch.arange(2, 14)[None]])
    for layer in sorted({0, source.moe_layers[0]}):
        hidden = model.run_layer(layer, model.load_layer(layer), hidden)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*CONFIGS, "deepseek_v3-yarn", "deepseek_v2-grouped"])
def test_no_value_ends_in_a_traceback(model_of: Callable[[str], Path], name: str) -> None:
    path = model_of(name)
    config = json.loads((path / "config.json").read_text())
    verdicts, run = {True: 0, False: 0}, set[str]()
    for key, value in config.items():
        for other in neighbours(value):
            set_config(path, **{key: other})
            verdicts[is_taken(path, run)] += 1
        set_config(path, **{key: ...})
        verdicts[is_taken(path, run)] += 1
        set_config(path, **{key: value})
    assert is_taken(path, run)
    assert min(verdicts.values()) > 100, verdicts


def test_the_activations_are_those_of_transformers() -> None:
    assert set(ACTIVATIONS) == set(ACT2CLS) - {"prelu", "xielu"}  # these two have weights


def test_the_rope_types_are_those_of_transformers() -> None:
    assert set(ROPE_TYPES) == {"default", *ROPE_INIT_FUNCTIONS} - {"proportional"}  # partial
    assert {"hidden_size", "num_experts", "rms_norm_eps"} <= set(KINDS)
