"""Every tiny type is what it says: complete, runnable, and of transformers' experts interface."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from tiny_types import CONFIGS, NAMES, NOT_RUN, OWN_BLOCKS
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

INTERFACE = "@use_experts_implementation"
TinyType = Callable[[str], Path]


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_type_loads_whole_and_runs(tiny_type: TinyType, name: str) -> None:
    model = tiny.plain_model(tiny_type(name))
    assert any(hasattr(m, "is_transposed") and hasattr(m, "has_gate") for m in model.modules())
    with torch.no_grad():
        logits = model(torch.tensor(tiny.random_tokens(2, 24)), use_cache=False).logits
    assert torch.isfinite(logits).all()
    assert logits.std(dim=1).median() > 0.01  # positions differ


def modelling_code(model_type: str) -> str:
    """The source of a type's module; importing all of them takes long and warns."""
    folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
    return "".join(file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py"))


def test_no_type_of_the_interface_is_left_out() -> None:
    language_models = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    with_experts = {name for name in language_models if INTERFACE in modelling_code(name)}
    # Composites are built as their text models, which are types of their own.
    composite = {name for name in with_experts if f"{name}_text" in language_models}
    assert with_experts - composite == set(CONFIGS) - set(OWN_BLOCKS)


@pytest.mark.parametrize("model_type", [*NOT_RUN, *OWN_BLOCKS])
def test_the_other_types_have_no_experts_interface(model_type: str) -> None:
    assert model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert INTERFACE not in modelling_code(model_type)
