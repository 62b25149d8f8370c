"""The sections of text: what calibration sees, what a result is judged on, and its limits."""

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from se_compress.artifacts import GATES, Gate
from se_compress.artifacts.targets import Backend
from se_compress.errors import brief
from se_compress.recipe.kinds import (
    Fraction,
    Name,
    Natural,
    Place,
    Positive,
    Reloader,
    Seed,
    SequenceLength,
    one_or_more,
)

_DOMAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataSource(Section):
    """One source of text.

    data           path of a .txt, .jsonl or .parquet file, or the name of a data set on the Hub
    split          which part of a data set on the Hub
    config         which configuration of a data set on the Hub, if it has several
    column         which one holds the text, or the chat messages if `chat_template` is set
    domain         what it is a sample of, such as prose; a mapping of names in `data` says the same
    weight         how many of the samples it gives, beside the other sources (of its domain, in
                   `validation`)
    chat_template  as in the section, of this source alone
    """

    data: Place
    split: Name = "train"
    config: Name | None = None
    column: Name = "text"
    domain: str = ""
    weight: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    chat_template: bool | None = None

    @field_validator("domain")
    @classmethod
    def _short_name(cls, value: str) -> str:
        if value and not _DOMAIN.fullmatch(value):
            raise ValueError(
                f"{brief(value)} is no name of a domain: letters, digits, _ and -, such as prose"
            )
        return value


class TextSection(Section):
    """Text, and which samples are drawn from it.

    data             where the text comes from: a path or the name of a data set, a mapping with
                     the keys of one source, or a list of these; or a mapping of names, those of
                     domains, to the same: {prose: prose.txt, code: {data: code.jsonl}}
    samples          number of sequences
    sequence_length  tokens of each sequence
    seed             of the draw: the same seed draws the same sequences of the same text
    chat_template    true: rows are chats, which the model's own chat template writes as text
    """

    data: tuple[DataSource, ...]
    samples: Positive
    sequence_length: SequenceLength
    seed: Seed = 0
    chat_template: bool = False

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        if names_domains(value):
            value = [one for name, text in value.items() for one in _sources_of(name, text)]
        items = one_or_more(value, "source of text is needed")
        return tuple({"data": item} if isinstance(item, str) else item for item in items)

    @field_validator("data")
    @classmethod
    def _all_or_none(cls, value: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        if len({bool(source.domain) for source in value}) > 1:
            nameless = next(source.data for source in value if not source.domain)
            raise ValueError(f"{brief(nameless)} has no domain, but others have; name all or none")
        return value

    @property
    def domain_names(self) -> tuple[str, ...]:
        """The domains in their order; none if the text has no name."""
        return tuple(dict.fromkeys(source.domain for source in self.data if source.domain))

    def is_chat(self, source: DataSource) -> bool:
        """Whether the rows of a source are chats."""
        return self.chat_template if source.chat_template is None else source.chat_template


def names_domains(data: object) -> TypeGuard[Mapping[str, object]]:
    """Whether `data` is a mapping of names, and not the keys of one source."""
    known = DataSource.model_fields
    return isinstance(data, Mapping) and bool(data) and not any(key in known for key in data)


def _sources_of(name: str, text: object) -> list[object]:
    """The sources of a domain, each with its name. What is no source is left for the checks."""
    if isinstance(text, list | tuple):
        return [one for item in text for one in _sources_of(name, item)]
    if not isinstance(text, Mapping):
        return [{"data": text, "domain": name}]
    inner = text.get("data")
    items = list(inner) if isinstance(inner, list | tuple) else [inner]
    common = {"domain": name, **{key: value for key, value in text.items() if key != "data"}}
    if "data" not in text:
        return [common]
    return [{**common, **(item if isinstance(item, Mapping) else {"data": item})} for item in items]


class Calibration(TextSection):
    """The text that the profile and the quantiser see.

    routing  what an expert is quantised on. routed: the tokens routed to it; all: all tokens of
             its layer
    """

    samples: Positive = 256
    sequence_length: SequenceLength = 512
    routing: Literal["routed", "all"] = "routed"


class Generation(Section):
    """Greedy continuations for the checks of repetition and loops.

    prompts        beginnings of held-out sequences that both models go on with, of each domain
    prompt_tokens  tokens of each beginning
    tokens         tokens that follow; 0 leaves the checks out (not run)
    chat_template  true: a beginning is put to the model as the message of a user, which it answers
    """

    prompts: Positive = 8
    prompt_tokens: Positive = 32
    tokens: Natural = 32
    chat_template: bool = False


class Tasks(Section):
    """Tasks of lm_eval (an extra: se-compress[eval]) that source and result answer. What counts is
    which answers change, not how many are right.

    names    of the tasks, as `lm-eval ls tasks` lists them, or of those in `include`
    limit    questions of each task, from the first on; null: all of them
    include  directory with tasks of your own; what lies beside them is found by its name
    backend  what loads the models. auto: of the result what loads it here (for vLLM and SGLang what
             stands in for them), of the source transformers; vllm, sglang: both models through
             lm_eval's own class for the engine, or not run, with the reason; vllm may be in the
             environment whose Python the variable SE_COMPRESS_VLLM_PYTHON names, beside lm_eval
    """

    names: tuple[Name, ...]
    limit: Positive | None = None
    include: Place | None = None
    backend: Backend = "auto"

    @field_validator("names", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return tuple(one_or_more(value, "task is needed"))


def _limits(name: str, base: type[BaseModel], own: bool) -> type[BaseModel]:
    """A section with a key for the limit of each gate that has one. `own`: of a domain, which has
    those of the whole recipe where it sets none."""
    above_zero = Annotated[float, Field(gt=0.0)]
    fields: dict[str, Any] = {}
    gates = [gate for gate in GATES.values() if gate.in_recipe and (gate.on_text or not own)]
    for gate in gates:
        kind: Any = Fraction if gate.fraction else above_zero
        may_lack = own or gate.optional
        fields[gate.name] = (kind | None, None) if may_lack else (kind, gate.limit)
    lines = map(_limit_in_words, gates)
    return create_model(name, __base__=base, __doc__="\n".join(lines), **fields)


def _limit_in_words(gate: Gate) -> str:
    wanted = "; not judged without a limit" if gate.optional else ""
    return f"{gate.name}  {gate.side} this: {gate.definition}{wanted}"


if TYPE_CHECKING:
    _Limits = TextSection
    _OwnLimits = Section
else:
    _Limits = _limits("Limits", TextSection, own=False)
    _OwnLimits = _limits("OwnLimits", Section, own=True)


class Domain(_OwnLimits):
    """What one domain of the held-out text has of its own; what it leaves out is the section's. In
    `data` these keys may stand beside the domain's text: {code: {data: code.jsonl, samples: 8}}.

    samples  number of sequences of this domain
    """

    samples: Positive | None = None

    @model_serializer(mode="wrap")
    def _without_nulls(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


def _own(key: object) -> bool:
    """Whether a key beside a domain's text is one of the domain, by what it is most like."""
    near = difflib.get_close_matches(str(key), [*DataSource.model_fields, *Domain.model_fields], 1)
    return bool(near) and near[0] in Domain.model_fields


class Reload(Section):
    """What loads the result for the gate `reload`.

    engine  auto: the target, or for vLLM and SGLang what stands in for them; vllm: vLLM itself, for
            the targets vllm and vllm-cpu, from the environment whose Python the variable
            SE_COMPRESS_VLLM_PYTHON names, else from this one. Where it cannot run, the gate is not
            run, and says why
    """

    engine: Reloader = "auto"


class Validation(_Limits):
    """Held-out text and the limit of each gate (defined in artifacts/gates.py). Of several domains
    each has `samples` sequences, and each is judged by itself.

    domains     name of a domain -> samples and limits of its own
    early_stop  stop compressing at the layer after which the massive activation or the sinks of the
                calibration text are lost
    generation  greedy continuations of both models
    reload      what loads the result for the gate of that name
    tasks       questions that both models answer; null: none
    """

    samples: Positive = 32
    sequence_length: SequenceLength = 256
    domains: Mapping[str, Domain] = {}
    early_stop: bool = True
    generation: Generation = Generation()
    reload: Reload = Reload()
    tasks: Tasks | None = None

    @model_validator(mode="before")
    @classmethod
    def _beside_the_text(cls, values: Any) -> Any:
        """Limits that stand beside a domain's text go to `domains`."""
        data = values.get("data") if isinstance(values, Mapping) else None
        if not names_domains(data):
            return values
        texts = dict(data)
        own: dict[str, Any] = dict(values.get("domains") or {})
        for name, text in texts.items():
            if isinstance(text, Mapping) and (limits := {k: text[k] for k in filter(_own, text)}):
                texts[name] = {k: v for k, v in text.items() if k not in limits}
                own[name] = {**limits, **dict(own.get(name) or {})}
        return {**values, "data": texts, **({"domains": own} if own else {})}

    @model_validator(mode="after")
    def _known_domains(self) -> "Validation":
        strange = next((name for name in self.domains if name not in self.domain_names), None)
        if strange is not None:
            known = ", ".join(self.domain_names) or "none, as data names none"
            raise ValueError(f"domains: {brief(strange)} is no domain of data; these are {known}")
        return self

    @model_validator(mode="after")
    def _tasks_to_judge(self) -> "Validation":
        if self.tasks is None and getattr(self, "task_flips", None) is not None:
            raise ValueError("task_flips is the limit of tasks, which are not given")
        return self

    def limit(self, gate: str) -> float:
        """Of a gate by its name: this recipe's, or the only one where a recipe sets none."""
        found = getattr(self, gate, None) if GATES[gate].in_recipe else None
        return GATES[gate].limit if found is None else float(found)

    def asks(self, gate: str) -> bool:
        """Whether a gate is judged: one that is optional needs a limit."""
        return not GATES[gate].optional or getattr(self, gate, None) is not None

    def of(self, domain: str) -> "Validation":
        """The section as if one domain were all of it; "" is a text without a name."""
        if not domain:
            return self
        own = self.domains.get(domain, Domain())
        given = {key: value for key, value in own if value is not None}
        data = tuple(source for source in self.data if source.domain == domain)
        return self.model_copy(update={"data": data, "domains": {}, **given})
