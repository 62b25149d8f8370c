"""What each choice in the quantisation of experts is worth, on text that was not calibrated on.

    python benchmarks/gptq_quality.py [--seeds 0,1] [--only PATTERN] [--slices DIR]

All 480 routed experts of smollm2-moe in groups of 64, none protected, calibrated on 32 x 256 tokens
of two corpora and judged on 16 x 256 others by the KL divergence to the source. Seeds draw other
calibration and other held-out text. A variant is a recipe, which goes through
`quantize_experts` as in a real run, or an idea that did not make it into the tool and lives
in this file. Differences to the default are paired sequence by sequence, with their standard error.

With --slices, a directory of austen.txt, factbook.txt, bible.txt and handbook.txt, the bars of the
asymmetric grids are measured as they were set: 8 sequences of each from its beginning, 4 from the
last two fifths, each behind the beginning-of-sequence token, positions from 8 on.

Nothing is written to disk but the findings, one file a run under --work; the section of RESULTS.md
is rewritten from all of them, so the work can be done in parts.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from results import machine, write_section
from torch import Tensor

from se_compress.artifacts import ExpertDecision, Scheme
from se_compress.compression.experts import quantize_experts
from se_compress.model.checkpoint import open_tensors
from se_compress.model.experts import Given, LayerExperts, run_experts
from se_compress.model.measures import kl_divergence
from se_compress.model.observers import Observer, RoutingCapture
from se_compress.model.states import States, batches_of, hidden_of, in_pieces
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.quant.gptq import gptq
from se_compress.quant.grid import Grid, dequantize
from se_compress.recipe import Recipe, parse_recipe
from se_compress.text.calibrate import draw_sequences

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "tools" / "reference" / "text"
MODEL = ROOT / "models" / "smollm2-moe"
CORPORA = ("austen", "factbook")
SLICES = ("austen", "factbook", "bible", "handbook")
LENGTH, BATCH_TOKENS = 256, 2048


@dataclass(frozen=True)
class Text:
    """Calibration and held-out sequences; KL counts positions from `first` on."""

    name: str
    calibration: Sequence[Sequence[int]]
    held_out: Sequence[Sequence[int]]
    first: int = 0


@dataclass
class Layer:
    """One layer while it is being quantised.

    experts         the live fused module
    capture         what the experts see in the compressed stream
    source_capture  the same in the source's stream, for the ideas that ask for it
    """

    number: int
    experts: Any
    capture: RoutingCapture
    source_capture: RoutingCapture | None


Idea = Callable[[Layer, Grid], None]


@dataclass(frozen=True)
class Variant:
    """A recipe's settings, or an idea in place of the solver."""

    name: str
    bits: int = 4
    quantization: Mapping[str, Any] = field(default_factory=dict)
    routing: str = "routed"
    idea: Idea | None = None
    source_stream: bool = False


# ------------------------------------------------------------------------- ideas that did not stay


def moments(layer: Layer, weigh: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[E, H, H]: second moments of the experts' inputs, tokens weighted by `weigh` of their rows
    and routing weights."""
    found = []
    for expert in range(len(layer.experts.gate_up_proj)):
        rows, routing = layer.capture.rows_of(expert)
        x, weight = layer.capture.hidden[rows], weigh(rows, routing)
        found.append((x.T * weight) @ x / weight.sum())
    return torch.stack(found)


def put(live: Tensor, weight: Tensor, hessian: Tensor, grid: Grid, **options: Any) -> None:
    live.copy_(dequantize(gptq(weight, hessian, grid, **options).stack))


def inner_of(layer: Layer, expert: int, hidden: Tensor, gate_up: Tensor) -> Tensor:
    inner: Tensor = layer.experts.activated(expert, hidden @ gate_up.T)
    return inner


def by_expert(
    layer: Layer,
    grid: Grid,
    *,
    weigh: Callable[[Tensor, Tensor], Tensor] = lambda rows, routing: torch.ones_like(routing),
    feedback: Sequence[str] = (),
    **options: Any,
) -> None:
    """Expert by expert, tokens weighted by `weigh`, solved with other options of gptq().

    feedback  matrices ("gate_up", "down") that are asked for the outputs which the source has in
              its own stream: GPTAQ (arXiv:2504.02692), W + (mean of (target - W x) x') (H + R)^-1
              with R the damping
    """
    experts, count = layer.experts, len(layer.experts.gate_up_proj)
    gate_up, down = experts.gate_up_proj.clone(), experts.down_proj.clone()
    rows = [layer.capture.rows_of(e) for e in range(count)]
    seen = [layer.capture.hidden[r] for r, _ in rows]
    wanted = [_source_hidden(layer)[r] for r, _ in rows] if feedback else seen
    weights = [weigh(r, routing) for r, routing in rows]
    hessian = torch.stack([_moment(x, w) for x, w in zip(seen, weights, strict=True)])
    asked = gate_up
    if "gate_up" in feedback:
        asked = _asked(gate_up, wanted, seen, weights, hessian)
    put(experts.gate_up_proj, asked, hessian, grid, **options)
    inner = [inner_of(layer, e, seen[e], experts.gate_up_proj[e]) for e in range(count)]
    hessian = torch.stack([_moment(x, w) for x, w in zip(inner, weights, strict=True)])
    asked = down
    if "down" in feedback:
        wanted = [inner_of(layer, e, wanted[e], gate_up[e]) for e in range(count)]
        asked = _asked(down, wanted, inner, weights, hessian)
    put(experts.down_proj, asked, hessian, grid, **options)


def _source_hidden(layer: Layer) -> Tensor:
    assert layer.source_capture is not None
    return layer.source_capture.hidden


def _moment(inputs: Tensor, weight: Tensor) -> Tensor:
    return (inputs.T * weight) @ inputs / weight.sum()


def _asked(
    weight: Tensor,
    wanted: Sequence[Tensor],
    seen: Sequence[Tensor],
    weights: Sequence[Tensor],
    hessian: Tensor,
) -> Tensor:
    cross = torch.stack(
        [((a - b).T * w) @ b / w.sum() for a, b, w in zip(wanted, seen, weights, strict=True)]
    )
    return weight + ridge_solve(weight @ cross, hessian)


def ridge_solve(cross: Tensor, hessian: Tensor, ridge: float = 0.2) -> Tensor:
    """cross (H + R)^-1 with R a share of H's diagonal, as gptq() damps."""
    damped = hessian + torch.diag_embed(ridge * hessian.diagonal(dim1=1, dim2=2))
    return torch.cholesky_solve(cross.mT, torch.linalg.cholesky(damped)).mT


def jointly(layer: Layer, grid: Grid, *, feedback: bool) -> None:
    """The down projections of all experts as one matrix [H, E I], whose input is a token's inner
    states times their routing weights: experts of a token make up for each other's errors.

    feedback  they are also asked for the routed output that the source has in its own stream
    """
    experts, capture = layer.experts, layer.capture
    count, inner = len(experts.gate_up_proj), experts.down_proj.shape[2]
    target = _routed_output(layer) if feedback else None
    down = torch.cat(list(experts.down_proj), 1)
    ones = moments(layer, lambda rows, routing: torch.ones_like(routing))
    put(experts.gate_up_proj, experts.gate_up_proj.clone(), ones, grid)
    joint = torch.zeros(len(capture.hidden), count * inner)
    for e in range(count):
        rows, routing = capture.rows_of(e)
        states = inner_of(layer, e, capture.hidden[rows], experts.gate_up_proj[e])
        joint[rows, e * inner : (e + 1) * inner] = states * routing[:, None]
    hessian = (joint.T @ joint / len(joint))[None]
    if target is not None:
        cross = (target - joint @ down.T).T @ joint / len(joint)
        down = down + ridge_solve(cross[None], hessian)[0]
    made = dequantize(gptq(down[None], hessian, grid).stack)[0]
    experts.down_proj.copy_(torch.stack(made.split(inner, 1)))


def _routed_output(layer: Layer) -> Tensor:
    """What the source's experts add to its own stream, [N, H]."""
    assert layer.source_capture is not None
    capture = layer.source_capture
    total = torch.zeros_like(capture.hidden)
    for e in range(len(layer.experts.gate_up_proj)):
        rows, routing = capture.rows_of(e)
        inner = inner_of(layer, e, capture.hidden[rows], layer.experts.gate_up_proj[e])
        total.index_add_(0, rows, inner @ layer.experts.down_proj[e].T * routing[:, None])
    return total


def from_the_source(layer: Layer, grid: Grid) -> None:
    """Calibrated on what the source sees, not on what the compressed model lets through."""
    assert layer.source_capture is not None
    layer.capture = layer.source_capture
    by_expert(layer, grid)


GPTAQ = ("gate_up", "down")
VARIANTS: tuple[Variant, ...] = (
    Variant("default"),
    Variant("rounding to nearest", quantization={"method": "rtn"}),
    Variant("act_order none", quantization={"act_order": "none"}),
    Variant("scales minmax", quantization={"scales": "minmax"}),
    *(Variant(f"damping {d}", quantization={"damping": d}) for d in (0.01, 0.05, 0.1, 0.5)),
    *(Variant(f"shrinkage {s}", quantization={"shrinkage": s}) for s in (0.0, 4.0)),
    Variant("calibration.routing all", routing="all"),
    *(Variant(f"{n} rounds", idea=partial(by_expert, rounds=n)) for n in (0, 1, 4)),
    Variant("calibrated on the source's stream", idea=from_the_source, source_stream=True),
    Variant("tokens weighted by routing weight", idea=partial(by_expert, weigh=lambda rows, w: w)),
    Variant(
        "tokens weighted by its square", idea=partial(by_expert, weigh=lambda rows, w: w.square())
    ),
    Variant("GPTAQ, gate and up", idea=partial(by_expert, feedback=GPTAQ[:1]), source_stream=True),
    Variant("GPTAQ, down", idea=partial(by_expert, feedback=GPTAQ[1:]), source_stream=True),
    Variant("GPTAQ, all", idea=partial(by_expert, feedback=GPTAQ), source_stream=True),
    Variant("down of all experts jointly", idea=partial(jointly, feedback=False)),
    Variant(
        "the same, asked for the source's output",
        idea=partial(jointly, feedback=True),
        source_stream=True,
    ),
    *(Variant(f"{b} bits", bits=b) for b in (8, 3, 2)),
    *(
        Variant(f"{b} bits asymmetric", bits=b, quantization={"symmetric": False})
        for b in (4, 3, 2)
    ),
    *(Variant(f"group_size {g}", quantization={"group_size": g}) for g in (32, 128, -1)),
)
ON_SLICES = ("default", "4 bits asymmetric", "3 bits asymmetric", "2 bits asymmetric")


# ------------------------------------------------------------------------------------------ running


def recipe_of(variant: Variant) -> Recipe:
    files = [str(TEXT / f"{corpus}-calibration.txt") for corpus in CORPORA]
    return parse_recipe(
        {
            "model": str(MODEL),
            "output": "unused",
            "target": "gptqmodel",
            "calibration": {"data": files, "routing": variant.routing},
            "quantization": {"group_size": 64, **variant.quantization},
            "validation": {"data": files},
        },
        variant.name,
    )


def drawn(seed: int) -> Text:
    """Sequences of both corpora, as a recipe with this seed draws them."""

    def part(kind: str, samples: int) -> Sequence[Sequence[int]]:
        files = [str(TEXT / f"{corpus}-{kind}.txt") for corpus in CORPORA]
        text = {"data": files, "samples": samples, "sequence_length": LENGTH, "seed": seed}
        settings = {"model": "", "output": "", "calibration": text, "validation": text}
        settings = {**settings, "model": str(MODEL), "output": "unused"}
        return draw_sequences(parse_recipe(settings, kind).calibration, MODEL, kind)

    return Text(f"seed {seed}", part("calibration", 32), part("held-out", 16))


def slices(directory: Path) -> Text:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def rows(corpus: str, share: float, count: int) -> list[list[int]]:
        text = (directory / f"{corpus}.txt").read_text(encoding="utf-8")
        text = text[int(share * len(text)) :][:400_000]
        ids = tokenizer(text[text.find(" ") + 1 :], add_special_tokens=False)["input_ids"]
        size = LENGTH - 1
        return [[tokenizer.bos_token_id, *ids[i * size : (i + 1) * size]] for i in range(count)]

    return Text(
        "slices",
        [row for corpus in SLICES for row in rows(corpus, 0.0, 8)],
        [row for corpus in SLICES for row in rows(corpus, 0.6, 4)],
        first=8,
    )


def routed(experts: LayerExperts, seen: RoutingCapture) -> Tensor:
    """Output [N, H] of a layer's experts for what one run of the layer routed to them."""
    return run_experts(experts, [Given(Observer(), 0, seen.hidden, seen.experts, seen.weights)])


@torch.no_grad()
def run(model: StreamedModel, text: Text, reference: Sequence[States], variant: Variant) -> Any:
    """Quantise, and compare the held-out states with those of the source, `reference`."""
    recipe = recipe_of(variant)
    rule = recipe.quantization
    scheme = Scheme("gptq", rule.method, rule.group_size, rule.symmetric)
    grid = Grid(variant.bits, rule.group_size, rule.symmetric)
    calibration = model.embed(batches_of(text.calibration, BATCH_TOKENS))
    held_out = model.embed(batches_of(text.held_out, BATCH_TOKENS))
    source = calibration if variant.source_stream else []
    for number in range(model.source.layer_count):
        module = model.load_layer(number)
        source_capture = None
        if variant.source_stream:
            source_capture = RoutingCapture()
            source = model.run_layer(number, module, source, source_capture)
        capture, other = (RoutingCapture(runs_experts=False) for _ in range(2))
        before = calibration, held_out
        calibration = model.run_layer(number, module, calibration, capture)
        held_out = model.run_layer(number, module, held_out, other)
        experts = model.layer_experts(module)
        experts.keep()
        assert experts.kept is not None
        layer = Layer(number, experts.kept, capture, source_capture)
        if variant.idea is not None:
            variant.idea(layer, grid)
        else:
            decisions = [ExpertDecision(number, e, "quantize", variant.bits, "") for e in range(16)]
            quantize_experts(
                model.source.weight_of, experts, capture, decisions, scheme, recipe, lambda _: None
            )
        runs = zip(before, (calibration, held_out), (capture, other), strict=True)
        calibration, held_out = (
            model.add_routed(number, module, old, states, routed(experts, seen))
            for old, states, seen in runs
        )
    return compare(model, text, reference, held_out)


@torch.no_grad()
def source_states(model: StreamedModel, text: Text) -> list[States]:
    states = model.embed(batches_of(text.held_out, BATCH_TOKENS))
    for number in range(model.source.layer_count):
        states = model.run_layer(number, model.load_layer(number), states)
    return states


def compare(
    model: StreamedModel, text: Text, source: Sequence[States], result: Sequence[States]
) -> dict[str, Any]:
    """KL of each sequence, log-perplexity of both, and the relative error of the final states."""
    first = text.first
    targets = [torch.tensor(row[first + 1 :]) for row in text.held_out]
    pair = (
        model.logits(in_pieces([s.cut(positions=slice(first, -1)) for s in states]))
        for states in (source, result)
    )
    divergences, losses = [], [[], []]
    for target, before, after in zip(targets, *pair, strict=True):
        divergences.append(float(kl_divergence(before, after).double().mean()))
        for loss, logits in zip(losses, (before, after), strict=True):
            picked = logits.log_softmax(-1).gather(-1, target[None, :, None])
            loss.append(-float(picked.double().mean()))
    away = [
        ((new - old).norm(dim=-1) / old.norm(dim=-1)).mean()
        for old, new in zip(hidden_of(source), hidden_of(result), strict=True)
    ]
    return {
        "kl": divergences,
        "loss_source": mean(losses[0]),
        "loss": mean(losses[1]),
        "error": float(torch.stack(away).mean()),
    }


# ---------------------------------------------------------------------------------------- reporting


def section(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all findings: text -> variant -> what `run` returned."""
    drawn_texts = sorted(name for name in found if name.startswith("seed"))
    lines = [
        "## Quality of the quantisation",
        "",
        f"`benchmarks/gptq_quality.py`, {machine()}. smollm2-moe, all 480 routed experts at 4 bits "
        "symmetric in groups of 64 unless said, none protected, 32 x 256 calibration tokens, "
        "16 x 256 held-out tokens. KL in nats per token for each draw of both texts; its change to "
        "the default is paired by sequence, with its standard error.",
        "",
        f"| variant | {' | '.join(f'KL, {name}' for name in drawn_texts)} | change of KL "
        "| error of the last hidden states | perplexity |",
        f"|---|{'---|' * (len(drawn_texts) + 3)}",
    ]
    for variant in VARIANTS:
        results = [found[name].get(variant.name) for name in drawn_texts]
        there = [result for result in results if result is not None]
        if there:
            base = [found[n]["default"] for n, r in zip(drawn_texts, results, strict=True) if r]
            cells = [
                variant.name,
                *(f"{mean(r['kl']):.4f}" if r else "" for r in results),
                _change(there, base),
                " / ".join(f"{100 * r['error']:.2f} %" for r in there),
                " / ".join(f"{torch.tensor(r['loss']).exp():.2f}" for r in there),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    sources = [found[name]["default"]["loss_source"] for name in drawn_texts]
    texts = " and ".join(f"{torch.tensor(loss).exp():.2f}" for loss in sources)
    lines += ["", f"The source's perplexity is {texts}."]
    if "slices" in found:
        lines += ["", *_slices(found["slices"])]
    return "\n".join(lines)


def _change(results: Sequence[Any], base: Sequence[Any]) -> str:
    pairs = [
        p for r, b in zip(results, base, strict=True) for p in zip(r["kl"], b["kl"], strict=True)
    ]
    differences = [new - old for new, old in pairs]
    whole = mean(old for _, old in pairs)
    if not any(differences):
        return ""
    error = stdev(differences) / len(differences) ** 0.5
    return f"{100 * mean(differences) / whole:+.1f} ± {100 * error / whole:.1f} %"


def _slices(found: Mapping[str, Any]) -> Iterator[str]:
    bars = {"4 bits asymmetric": 0.045, "3 bits asymmetric": 0.094, "2 bits asymmetric": 0.29}
    yield "On the slices on which the bars of the asymmetric grids were set (see the script):"
    yield ""
    yield "| variant | KL | bar | perplexity |"
    yield "|---|---|---|---|"
    for name, result in found.items():
        perplexity = torch.tensor(result["loss"]).exp()
        yield f"| {name} | {mean(result['kl']):.4f} | {bars.get(name, '')} | {perplexity:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--only", default="", help="a pattern of the variants' names")
    parser.add_argument("--slices", type=Path, help="directory with the four corpora")
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gptq-quality")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source = open_source(str(MODEL))
    model = StreamedModel(source, open_tensors(source.tensors))
    texts = [drawn(int(seed)) for seed in options.seeds.split(",") if seed]
    texts += [slices(options.slices)] if options.slices else []
    for text in texts:
        reference: list[Tensor] = []
        for variant in VARIANTS:
            wanted = variant.name in ON_SLICES if text.name == "slices" else True
            file = options.work / f"{text.name}-{variant.name}.json".replace(" ", "-")
            if not wanted or file.exists() or not re.search(options.only, variant.name):
                continue
            reference = reference or source_states(model, text)
            result = run(model, text, reference, variant)
            content = {"text": text.name, "variant": variant.name, **result}
            file.write_text(json.dumps(content), encoding="utf-8")
            print(f"{text.name:8} {variant.name:40} KL {mean(result['kl']):.4f}", flush=True)
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(options.work.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        found.setdefault(result["text"], {})[result["variant"]] = result
    write_section("quality of the quantisation", section(found))


if __name__ == "__main__":
    main()
