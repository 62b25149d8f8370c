"""How much memory a run takes in each of its stages: said before it begins.

What is held follows from the model, the recipe and the number of tokens alone: hidden states and
what routed experts are given, two or three blocks of experts, the rest of one layer, and what the
work on a block or a batch takes meanwhile. Anonymous memory is meant; pages of the model's files,
which the kernel drops when it needs them, do not count.

N tokens, H channels, I neurons of an expert, T positions of a sequence.
"""

import math
from dataclasses import dataclass
from functools import cached_property

from se_compress.artifacts import ModelSource, RunOptions
from se_compress.recipe import Recipe

# Interpreter and libraries.
LIBRARIES = 450_000_000
# As in model/experts.py, compression/experts.py, compression/layer.py and model/states.py, which
# know torch.
LOADED_ELEMENTS = SOLVED_ELEMENTS = 2**25
LOADED_EXPERTS, SOLVED_EXPERTS = 4, 8
PIECE_TOKENS, WITNESS_TOKENS = 256, 1024
# What is measured below, on models of hidden 512 to 2048: what the work on something takes beside
# it, as a multiple of it. Blocks in float32, rounded to see what it costs; stacks with their
# Hessians, solved; rows of an expert, on their way through it, in profiling and in solving.
ROUNDING, SOLVING, RUNNING, TAKING = 3.0, 2.0, 1.0, 2.4
# The C library keeps what is freed below this size, in pieces that states do not fit into again:
# what they take then in profiling and in solving, as a multiple of what they are. Where they lie in
# files it keeps nothing (memory.give_back_at_once).
KEPT_BYTES, SCATTERED, SCATTERED_SOLVING = 2**25, 1.75, 1.25
# Probabilities that attention holds at once, of all heads, in float32.
PROBABILITIES = 3


@dataclass(frozen=True)
class Footprint:
    """What a stage holds, in bytes.

    states   hidden states, and what routed experts are given and put out
    layer    one layer without its routed experts, embeddings, head
    work     on a block of experts, or on a batch: whichever is more
    """

    stage: str
    states: int
    layer: int
    work: int

    @property
    def size_bytes(self) -> int:
        """All of it but the libraries."""
        return self.states + self.layer + self.work


@dataclass(frozen=True)
class _Sizes:
    """What the stages are made of.

    item     bytes of a weight or hidden state
    on_disk  hidden states lie in files that are mapped
    """

    source: ModelSource
    recipe: Recipe
    item: int
    on_disk: bool

    @property
    def hidden(self) -> int:
        return int(self.source.text["hidden_size"])

    def stream(self, tokens: int) -> int:
        """Hidden states of so many tokens."""
        return tokens * self.hidden * self.item

    def sums(self, tokens: int) -> int:
        """What is added to them, in float32."""
        return tokens * self.hidden * 4

    @cached_property
    def expert(self) -> int:
        """Weights of the largest routed expert."""
        sizes = [
            sum(math.prod(info.shape) for info in roles.values())
            for identity, roles in self.source.experts.items()
            if identity.expert != "shared"
        ]
        return max(sizes, default=0)

    @cached_property
    def inner(self) -> int:
        """I."""
        widths = [
            roles["down"].shape[-1]
            for identity, roles in self.source.experts.items()
            if identity.expert != "shared"
        ]
        return max(widths, default=0)

    @cached_property
    def rest(self) -> int:
        """Bytes of the largest layer without routed experts, and of the largest coded matrix, which
        is decoded beside its place."""
        sizes: dict[int, int] = {}
        for info in self.source.tensors.values():
            if info.layer is not None and info.kind != "expert":
                sizes[info.layer] = sizes.get(info.layer, 0) + math.prod(info.shape)
        coded = (info.size_bytes for info in self.source.tensors.values() if info.stored)
        return max(sizes.values(), default=0) * self.item + max(coded, default=0)

    @property
    def words(self) -> int:
        """Bytes of the embedding, or of the head."""
        return int(self.source.text.get("vocab_size", 0)) * self.hidden * self.item

    def rows(self, tokens: int) -> int:
        """Tokens of an expert, if all get as many."""
        return tokens * self.source.top_k // max(1, self.source.expert_count)

    def scattered(self, size: float, factor: float) -> int:
        """Bytes of memory that tensors of a batch take which are `size` bytes together."""
        if self.on_disk:
            return 0
        one = RunOptions().batch_tokens * self.hidden * self.item
        return int(size * (factor if one < KEPT_BYTES else 1.0))

    def batch(self, length: int, samples: int) -> int:
        """Work on a batch, attention watched."""
        sequences = min(samples, max(1, RunOptions().batch_tokens // length))
        heads = int(self.source.text.get("num_attention_heads", 1))
        attention = PROBABILITIES * sequences * heads * length**2 * 4
        return attention + 6 * sequences * length * self.hidden * 4

    def blocks(self, most: int, elements: int, each: int) -> tuple[int, int]:
        """Experts of a block that has at most so many, and so many elements, `each` of them of one;
        and its bytes, with those of the next one, which is read ahead."""
        count = self.source.expert_count if self.expert else 0
        experts = min(count, most, max(1, elements // max(1, each)))
        return experts, self.expert * min(count, 2 * experts) * self.item

    def logits(self, length: int) -> int:
        """Logits of both models for a piece of a sequence, and what is made of them."""
        return 8 * min(PIECE_TOKENS, length) * int(self.source.text.get("vocab_size", 0)) * 4


def footprints(
    source: ModelSource, recipe: Recipe, tokens: int, on_disk: bool = False
) -> tuple[Footprint, ...]:
    """What each stage of a run holds in memory.

    tokens   how many are drawn for calibration
    on_disk  hidden states are kept in files (RunOptions.states_in)
    """
    sizes = _Sizes(source, recipe, 4 if recipe.compute_dtype == "float32" else 2, on_disk)
    return _profile(sizes, tokens), _compress(sizes, tokens), _validate(sizes)


def largest_stage(
    source: ModelSource, recipe: Recipe, tokens: int, on_disk: bool = False
) -> Footprint:
    """The one that holds most."""
    return max(footprints(source, recipe, tokens, on_disk), key=lambda one: one.size_bytes)


def _states(sizes: _Sizes, tokens: int) -> int:
    """Before and behind a layer, and given to its experts; what is put out, or what is given once
    more, as one tensor."""
    return 3 * sizes.stream(tokens) + max(sizes.sums(tokens), sizes.stream(tokens))


def _profile(sizes: _Sizes, tokens: int) -> Footprint:
    experts, blocks = sizes.blocks(LOADED_EXPERTS, LOADED_ELEMENTS, sizes.expert)
    rows = sizes.rows(tokens) * (6 * sizes.hidden + 3 * sizes.inner) * sizes.item
    text = sizes.recipe.calibration
    return Footprint(
        stage="profile",
        states=sizes.scattered(_states(sizes, tokens), SCATTERED),
        layer=sizes.rest + sizes.words,
        work=max(
            blocks + int(ROUNDING * experts * sizes.expert * 4),
            blocks + int(RUNNING * rows),
            sizes.batch(text.sequence_length, text.samples),
        ),
    )


def _compress(sizes: _Sizes, tokens: int) -> Footprint:
    hidden, inner, rows = sizes.hidden, sizes.inner, sizes.rows(tokens)
    each = hidden**2 + inner**2 + 3 * hidden * inner
    experts, blocks = sizes.blocks(SOLVED_EXPERTS, SOLVED_ELEMENTS, each)
    text = sizes.recipe.calibration
    solving = SOLVING * experts * each * 4
    # inputs of down of the whole block, and those of one expert on their way there
    seen = rows * (experts * inner + TAKING * (2 * hidden + 3 * inner)) * sizes.item
    witness = 2 * sizes.stream(min(tokens, WITNESS_TOKENS))
    states = _states(sizes, tokens)
    if sizes.recipe.policy.repair:  # what the source's layer makes of them, what is missing of it
        states += sizes.stream(tokens) + sizes.sums(tokens)
    return Footprint(
        stage="compress",
        states=sizes.scattered(states, SCATTERED_SOLVING) + witness,
        layer=sizes.rest + sizes.words,
        work=max(blocks + int(solving + seen), sizes.batch(text.sequence_length, text.samples)),
    )


def _validate(sizes: _Sizes) -> Footprint:
    text = sizes.recipe.validation
    tokens = text.samples * text.sequence_length * max(1, len(text.domain_names))
    _, blocks = sizes.blocks(LOADED_EXPERTS, LOADED_ELEMENTS, sizes.expert)
    return Footprint(
        stage="validate",
        # of both models: behind a layer, and given there; of one before it too, and put out
        states=sizes.scattered(5 * sizes.stream(tokens) + sizes.sums(tokens), SCATTERED),
        layer=sizes.rest + 4 * sizes.words,
        work=max(
            blocks,
            sizes.batch(text.sequence_length, text.samples),
            sizes.logits(text.sequence_length),
        ),
    )
