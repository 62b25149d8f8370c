"""Compress Mixture-of-Experts checkpoints while their super experts stay provably intact.

The Python API is what `__all__` lists: a recipe, a source and tokens go in, and each of the verbs
makes one artefact of those before it. They are loaded on first use, so that `import se_compress`
needs neither torch nor transformers.

With it imported, transformers' `from_pretrained` loads our bitsandbytes checkpoints (loading.py).
"""

from importlib import import_module
from typing import Any

from wrapt import register_post_import_hook

__version__ = "0.1.0"
__all__ = [
    "RunOptions",
    "compress",
    "draw_domains",
    "draw_tokens",
    "load_recipe",
    "make_plan",
    "open_source",
    "profile_experts",
    "validate",
]

_HOME = {
    "RunOptions": "se_compress.artifacts",
    "load_recipe": "se_compress.recipe",
    "open_source": "se_compress.opening.source",
    "draw_domains": "se_compress.text.calibrate",
    "draw_tokens": "se_compress.text.calibrate",
    "profile_experts": "se_compress.profiling.profiler",
    "make_plan": "se_compress.planning.policy",
    "compress": "se_compress.compression.execute",
    "validate": "se_compress.validation.validator",
}


# At once if transformers is imported already.
register_post_import_hook(
    lambda module: import_module("se_compress.engines.loading"), "transformers.quantizers.auto"
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'se_compress' has no attribute {name!r}")
