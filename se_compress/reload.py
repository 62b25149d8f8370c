"""Load a finished checkpoint with its target engine and write down its logits: `python -m
se_compress.reload DIRECTORY SCRATCH`. A process of its own, as GPTQModel patches torch,
transformers and safetensors when it is imported, and as whatever it allocates is gone afterwards.

vLLM and SGLang are not loaded here. transformers reads their unquantised files, and those of one
width, and stands in for them: what it says is no proof of the engine, but a file that it cannot
load, or loads otherwise, is broken.

SCRATCH holds request.json ({"tokens": [...], "target": ...}); logits.safetensors is written beside
it.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from se_compress.errors import NOT_RUN_EXIT_CODE
from se_compress.formats import FORMATS
from se_compress.memory import available_memory

# By what config.json calls it.
BY_METHOD = {form.quant_method: form for form in FORMATS.values()}


def main() -> int:
    directory, scratch = sys.argv[1:]
    request = json.loads((Path(scratch) / "request.json").read_text())
    needed = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    available = available_memory()
    if 2 * needed > available.size_bytes:
        return _not_run(
            f"loading needs about {2 * needed / 1e9:.1f} GB of memory, and "
            f"{available.size_bytes / 1e9:.1f} GB {available.limit} are available"
        )
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    settings = config.get("quantization_config", {})
    if reason := _obstacle(request["target"], settings):
        return _not_run(reason)
    load = _load_gptqmodel if request["target"] == "gptqmodel" else _load_transformers
    model = load(directory)

    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        logits = model(torch.tensor([request["tokens"]])).logits
    save_file({"logits": logits.float().contiguous()}, Path(scratch) / "logits.safetensors")
    return 0


def _obstacle(target: str, settings: Mapping[str, Any]) -> str:
    """Why this machine cannot say anything of the result; "" if it can."""
    form = BY_METHOD.get(settings.get("quant_method", ""))
    package, extra = (form.package, form.extra) if form else ("transformers", "")
    if target == "gptqmodel":
        package, extra = "gptqmodel", "gptq"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install 'se-compress[{extra}]')"
    groups = settings.get("config_groups", {}).values()
    patterns = [*settings.get("ignore", ()), *(t for group in groups for t in group["targets"])]
    if any(pattern.startswith("re:") for pattern in patterns):
        return (
            f"{target} is not installed, and transformers would read layers of several widths wrong"
        )
    return ""


def _not_run(reason: str) -> int:
    print(reason, file=sys.stderr)
    return NOT_RUN_EXIT_CODE


def _load_gptqmodel(directory: str) -> Any:
    # With two cores GPTQModel 7.6 asks for more workers than its own pool has, unless told.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel

    return GPTQModel.load(directory, device="cpu").model.eval()


def _load_transformers(directory: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # auto-round's linears have no float32; Mixtral's renamed tensors keep their dtype under a
    # quantizer.
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    form = BY_METHOD.get(config.get("quantization_config", {}).get("quant_method", ""))
    as_stored = form is not None and not form.has_float32
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto" if as_stored else torch.float32, output_loading_info=True
    )
    model, info = cast(tuple[Any, dict[str, Any]], loaded)
    # transformers re-initialises what it does not find, and only this tells. Tensors that it does
    # not use (multi-token prediction) do no harm.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise SystemExit(f"{problem}: {sorted(map(str, info[problem]))[:3]}")
    return model.eval()


if __name__ == "__main__":
    sys.exit(main())
