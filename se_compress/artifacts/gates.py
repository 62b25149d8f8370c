"""The gates: what is measured of a result, in words, and what a limit of it is worth.

A row here is all that recipe, validation, pages, schemas and benchmarks know of a gate: they find
it by its name. To add one, write its row, the function that measures it (`validation/`), and the
line in `validator.py` that calls that.

A massive activation, a sink, a gain spread are defined in `model/measures.py`. The default limits
are calibrated by `benchmarks/gates.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from se_compress.artifacts.checks import Check

Side = Literal["at most", "at least"]


@dataclass(frozen=True)
class Gate:
    """One gate.

    name        its key in a recipe, and the name of its `Check`
    definition  what is measured, exactly
    title       its name for people
    meaning     what it says to somebody who knows none of the words
    short       heading of a narrow column
    side        "at most": good values lie below the limit; "at least": above it
    limit       the recipe's default; the only one if `in_recipe` is false
    harmless    no result can miss a limit from there on; where values have no end, it is far beyond
                those of a model that babbles
    fraction    limits lie between 0 and 1, both included; if false, above 0
    percent     pages show values as percentages
    in_recipe   a recipe may set the limit
    explained   the page that compares results explains it
    on_text     measured on held-out text, so that each domain of that may have a limit of its own
    optional    it is judged only where a recipe sets its limit (or has tasks, of that of tasks);
                `limit` is then one to begin with
    """

    name: str
    definition: str
    title: str
    meaning: str
    short: str
    side: Side
    limit: float
    harmless: float
    fraction: bool = False
    percent: bool = False
    in_recipe: bool = True
    explained: bool = False
    on_text: bool = True
    optional: bool = False

    def meets(self, value: float, limit: float) -> bool:
        """Whether a value is on the good side. NaN never is."""
        return value <= limit if self.side == "at most" else value >= limit

    def is_stricter(self, limit: float, other: float) -> bool:
        """Whether `limit` lets less pass than `other`."""
        return limit < other if self.side == "at most" else limit > other

    def is_harmless(self, limit: float) -> bool:
        """Whether nothing can miss this limit."""
        return not self.is_stricter(limit, self.harmless)

    def judge(
        self,
        value: float,
        limit: float,
        detail: str = "",
        interval: tuple[float, float] | None = None,
    ) -> Check:
        """The check of a value. With an interval, it passes or fails if all of that does; where the
        interval holds the limit, the value decides, and the detail says so."""
        passed = self.meets(value, limit)
        if interval is None:
            return Check(self.name, value, limit, passed, detail)
        low, high = interval
        if self.meets(low, limit) != self.meets(high, limit):
            detail = "; ".join(filter(None, [detail, "the sample is too small to tell"]))
        return Check(self.name, value, limit, passed, detail, low, high)


_ROWS = (
    Gate(
        "perplexity_increase",
        "exp(mean cross-entropy) of the next token, result / source - 1",
        "Perplexity increase",
        "How much worse the result predicts held-out text than the source does.",
        "perplexity",
        "at most",
        limit=0.10,
        harmless=1e6,
        percent=True,
    ),
    Gate(
        "kl_divergence",
        "mean over positions of KL(source || result) of the next token, nats",
        "KL divergence to the source",
        "How far the next-token probabilities moved, in nats per token; 0 means not at all.",
        "KL",
        "at most",
        limit=0.20,
        harmless=1e3,
        explained=True,
    ),
    Gate(
        "kl_divergence_99",
        "KL(source || result) of the next token that 99 % of the positions stay below, nats",
        "KL divergence, 99 % of the tokens",
        "The same where it is large: one token in a hundred moved further than that.",
        "KL 99 %",
        "at most",
        limit=1.0,
        harmless=1e3,
        optional=True,
    ),
    Gate(
        "top_1_agreement",
        "share of the positions of which source and result hold the same token most likely",
        "Same most likely token",
        "How often both models would say the same next token.",
        "top 1",
        "at least",
        limit=0.80,
        harmless=0.0,
        fraction=True,
        percent=True,
        optional=True,
    ),
    Gate(
        "massive_activation_ratio",
        "least retention of any massive activation of the source: per layer, position and channel, "
        "if it is common to half of the sequences",
        "Massive activation kept",
        "How well the result keeps the huge value that super experts write into the stream; the "
        "worst layer counts.",
        "massive",
        "at least",
        limit=0.75,
        harmless=0.0,
        fraction=True,
        percent=True,
        explained=True,
    ),
    Gate(
        "sink_decay",
        "share of the attention to position 0 that is gone, queries from position 8 on, all "
        "layers, heads with a sink",
        "Attention sink lost",
        "Share of the attention to the first token that went elsewhere.",
        "sink decay",
        "at most",
        limit=0.10,
        harmless=1.0,
        fraction=True,
        percent=True,
        explained=True,
    ),
    Gate(
        "sink_token_error",
        "most that the residual of the tokens with a massive activation changes in a layer, "
        "relative to its size",
        "Sink token's state changed",
        "How far the hidden state of tokens with a massive activation moved, size and direction "
        "together, relative to its length; the worst layer counts.",
        "sink token",
        "at most",
        limit=0.30,
        harmless=1e6,
        percent=True,
    ),
    Gate(
        "router_agreement",
        "share of the experts that the source chose for a token which the result chose too, by "
        "their identity in the source: a merged expert stands for all its members, a pruned one is "
        "never chosen; mean over tokens and layers",
        "Router agreement",
        "Share of the experts chosen by the source that the result chooses too.",
        "routers",
        "at least",
        limit=0.70,
        harmless=0.0,
        fraction=True,
        percent=True,
        explained=True,
    ),
    Gate(
        "router_agreement_least",
        "router agreement of the layer where it is least, mean over its tokens",
        "Router agreement, worst layer",
        "The same in the layer where they agree least.",
        "worst router",
        "at least",
        limit=0.50,
        harmless=0.0,
        fraction=True,
        percent=True,
    ),
    Gate(
        "repetition",
        "share of 4-grams of a greedy continuation that occurred in it before; result - source, "
        "mean over prompts",
        "Added repetition",
        "Repeated four-token runs in the continuations, as a share: result minus source.",
        "repetition",
        "at most",
        limit=0.25,
        harmless=1.0,
        explained=True,
    ),
    Gate(
        "loops",
        "share of the continuations that end in a loop, result - source",
        "Added loops",
        "Continuations that end in a loop, as a share: result minus source.",
        "loops",
        "at most",
        limit=0.50,
        harmless=1.0,
    ),
    Gate(
        "unfinished",
        "share of the continuations that reach validation.generation.tokens without an end token, "
        "result - source",
        "Answers that do not end",
        "Continuations that run into the limit on their length, as a share: result minus source.",
        "unfinished",
        "at most",
        limit=0.25,
        harmless=1.0,
        optional=True,
    ),
    Gate(
        "length_change",
        "mean tokens of a continuation up to its end token (or the limit), |result / source - 1|",
        "Change of the answers' length",
        "How much longer or shorter the continuations became, up to where the model ends them.",
        "length",
        "at most",
        limit=0.50,
        harmless=1e6,
        percent=True,
        optional=True,
    ),
    Gate(
        "task_flips",
        "least p-value of any task of validation.tasks, times their number: how likely it is that "
        "so many of the answers that changed were lost by chance (exact test of McNemar, "
        "one-sided)",
        "Answers lost in tasks",
        "Whether the result answers fewer questions right than the source by more than chance: the "
        "lower the value, the surer it is.",
        "tasks",
        "at least",
        limit=0.05,
        harmless=0.0,
        fraction=True,
        on_text=False,
        optional=True,
    ),
    Gate(
        "weight_cosine",
        "least cosine between a quantised matrix and what it was made from: experts, layers or "
        "files that took each other's place; a matrix that is next to nothing in both is left out",
        "Weights point the same way",
        "Cosine between a quantised matrix and the one that it was made from; the worst counts. "
        "Near 0: it is another one.",
        "cosine",
        "at least",
        limit=0.10,
        harmless=-1.0,  # a cosine can be negative, so that 0 is a limit
        fraction=True,
        on_text=False,
    ),
    Gate(
        "weight_gain",
        "spread of the gains of a matrix's rows, median over the matrices of one kind in a layer, "
        "worst layer: scales that belong to other rows",
        "Rows keep their size",
        "How much the sizes of a matrix's rows are scattered, beside those of the source; much of "
        "that is a sign of scales in the wrong place.",
        "gain",
        "at most",
        limit=0.25,
        harmless=1e6,
        on_text=False,
    ),
    Gate(
        "tensors_accounted",
        "share of the planned tensors that are in the result as planned, unchanged ones byte for "
        "byte, packed ones by the hash of what was written, those that surgery makes (router rows "
        "of the experts that are left, merged and zeroed weights) value for value, with nothing "
        "else beside them; and all of them numbers",
        "Tensors accounted for",
        "Share of the planned tensors that are in the files as planned.",
        "accounted",
        "at least",
        limit=1.0,
        harmless=0.0,
        percent=True,
        in_recipe=False,
        on_text=False,
    ),
    Gate(
        "text_alike",
        "share of sample texts and conversations that the result's own tokenizer and chat template "
        "turn into the token ids which the source's make of them; 1 where the files are the "
        "source's own",
        "Text read as before",
        "Whether the tokenizer and the chat template beside the result do what the source's do.",
        "text",
        "at least",
        limit=1.0,
        harmless=0.0,
        percent=True,
        in_recipe=False,
        on_text=False,
    ),
    Gate(
        "reload",
        "relative error of the logits after loading the result with its target engine, against "
        "those that were validated here; median over positions, as round-off that sends a few "
        "tokens to another expert is no fault",
        "Reload",
        "Relative distance of the logits of the target engine from those that were judged here.",
        "reload",
        "at most",
        # The engines' bf16 kernels sit at 0.01 to 0.04, re-initialised experts at 0.3 and more.
        limit=0.10,
        harmless=math.inf,
        in_recipe=False,
        explained=True,
        on_text=False,
    ),
)
# By how far results are from the source, the nearest first.
DISTANCE = "kl_divergence"
# In the order of a recipe's keys.
GATES: Mapping[str, Gate] = {gate.name: gate for gate in _ROWS}


def unlimited(check: Check) -> bool:
    """It passed, and would have passed whatever had been measured."""
    gate = GATES.get(check.name)
    if gate is None or check.limit is None or not check.passed:
        return False
    return gate.is_harmless(check.limit)
