"""Load a finished checkpoint with its target engine and write down its logits: `python -m
se_compress.reload DIRECTORY SCRATCH`. A process of its own, as GPTQModel patches torch,
transformers and safetensors when it is imported, and as whatever it allocates is gone afterwards.

SCRATCH holds request.json ({"tokens": [...], "target": ...}); logits.safetensors is written beside
it.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import psutil

from se_compress.errors import NOT_RUN_EXIT_CODE


def main() -> int:
    directory, scratch = sys.argv[1:]
    request = json.loads((Path(scratch) / "request.json").read_text())
    needed = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    if 2 * needed > psutil.virtual_memory().available:
        return _not_run(f"loading needs about {2 * needed / 1e9:.1f} GB of memory")
    loaders = {"gptqmodel": _load_gptqmodel, "transformers": _load_transformers}
    if request["target"] not in loaders:
        return _not_run(f"{request['target']} cannot be run from here")
    if request["target"] == "gptqmodel" and importlib.util.find_spec("gptqmodel") is None:
        return _not_run("gptqmodel is not installed (pip install 'se-compress[gptq]')")
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    if method == "se-compress" and importlib.util.find_spec("bitsandbytes") is None:
        return _not_run("bitsandbytes is not installed (pip install 'se-compress[bnb]')")
    model = loaders[request["target"]](directory)

    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        logits = model(torch.tensor([request["tokens"]])).logits
    save_file({"logits": logits.float().contiguous()}, Path(scratch) / "logits.safetensors")
    return 0


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

    loaded = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
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
