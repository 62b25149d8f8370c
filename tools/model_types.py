"""Write what is known of each model type: se_compress/artifacts/model_types.json, those that each
target loads right, and recipes/MODELS.md, the same for people.

    python tools/model_types.py measure work   # runs the engines on tiny models: about 15 minutes
    python tools/model_types.py                # writes recipes/MODELS.md anew

Of engines that are run here, a type is loaded if its tiny model, quantised and loaded, computes
what the file stands for (tests/engine_types.py). vLLM and SGLang are not: theirs are the six
families whose code there was read. Nor is our own loader of bitsandbytes' types, which is tested
with these six.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from se_compress.artifacts.targets import TARGETS  # noqa: E402
from se_compress.opening.families import (  # noqa: E402
    ALIASES,
    COMPOSITES,
    FAMILIES,
    Family,
    text_family,
)

FILE = ROOT / "se_compress" / "artifacts" / "model_types.json"
PAGE = ROOT / "recipes" / "MODELS.md"


_TOP = """# Models

Made by `tools/model_types.py`. A type is `model_type` of config.json. Every type is read with its
experts one by one or fused, in 16 or 32 bits, FP8, MXFP4 or int4 of compressed-tensors, and can be
pruned, merged and zeroed with `method: none` for `target: transformers`. What a target is not known
to load right is refused before a weight is read: many engines answer noise there, without an error.
vLLM and SGLang were read for six types, and not run.

"""
_END = """
Composites are read by their language model: {composites}; towers are carried over. {aliases}: the
same model.

`exact`: all shapes are known as functions of config.json, and a dry run looks at each. Of the
others it looks at names, experts, routers and counts, and the start of a run at the rest.
"""


def loaded(work: Path) -> dict[str, dict[str, list[str]]]:
    """Target -> format -> the types that it loads right, after running what can be run."""
    import engine_types

    read = sorted(name for name, row in FAMILIES.items() if row.exact)
    measured = {(target, form) for target, _, form in engine_types.CASES.values()}
    found: dict[str, dict[str, list[str]]] = {}
    for rules in TARGETS:
        if rules.widths:
            types = read
            if (rules.target, rules.format) in measured:
                types = sorted(engine_types.right_types(work, rules.format))
            found.setdefault(rules.target, {})[rules.format] = types
    return found


def page() -> str:
    """recipes/MODELS.md. Formats that the same types are loaded of share a column."""
    columns: dict[frozenset[str], list[str]] = {}
    for rules in TARGETS:
        if rules.model_types is not None:
            columns.setdefault(rules.model_types, []).append(f"{rules.target} `{rules.format}`")
    heads = [", ".join(names) for names in columns.values()]
    lines = [
        *_TOP.splitlines(),
        "| type | experts | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 2) + "|",
    ]
    for name, family in sorted(FAMILIES.items()):
        marks = ["right" if name in types else "refused" for types in columns]
        lines.append(f"| `{name}` | {_experts(family)} | {' | '.join(marks)} |")
    composites = ", ".join(f"`{name}` ({text_family(name)})" for name in sorted(COMPOSITES))
    aliases = ", ".join(f"`{name}` as `{known}`" for name, known in sorted(ALIASES.items()))
    end = _END.format(composites=composites, aliases=aliases)
    return "\n".join([*lines, *end.splitlines(), ""])


def _experts(family: Family) -> str:
    """The form of a family's experts, in words."""
    words = ["fused" if family.published_fused else "one by one"]
    words += ["biases"] if family.biased else []
    words += ["no gate"] if not family.gated else []
    words += ["exact"] if family.exact else []
    return ", ".join(words)


def main() -> None:
    if sys.argv[1:2] == ["measure"]:
        found: Mapping[str, object] = loaded(Path(sys.argv[2]))
        FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
