"""Long continuations: chat prompts, end tokens, loops, and layers that stay in memory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoTokenizer

from se_compress.artifacts import Check, Continuation, RunOptions
from se_compress.errors import SourceError
from se_compress.model.checkpoint import open_tensors
from se_compress.model.residents import resident
from se_compress.model.streaming import StreamedModel
from se_compress.opening.source import open_source
from se_compress.text.prompts import end_tokens, frame_of, prompts_of
from se_compress.validation import continuations, validator
from se_compress.validation.side_by_side import continuations as continued

TinyModel = Callable[[str], Path]
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TOKENS = tiny.random_tokens(6, 24, seed=3)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("chat"), bos=True, template=TEMPLATE)


def section(**generation: Any) -> Any:
    made = {"prompts": 3, "prompt_tokens": 8, "tokens": 12, **generation}
    return tiny.recipe("m", validation={"data": "x.txt", "generation": made}).validation


# ------------------------------------------------------------------------------------- the prompts


def test_a_beginning_becomes_a_message_of_the_user(chatty: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chatty)
    text = [tokenizer("Tell me more about the sea, please.")["input_ids"]]
    (made,) = prompts_of({"": text}, section(chat_template=True, prompt_tokens=7), chatty)[""]
    body = text[0][1:8]
    message = tokenizer.decode(body)
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(list(made)) == wanted
    assert made.count(tiny.BOS) == 1, "what the template writes is not put in front again"
    assert all(len(p) == len(made) for p in (frame_of(chatty).around(text[0], 7),))


def test_prompts_are_spread_over_the_sequences_as_ever(chatty: Path) -> None:
    found = prompts_of({"": TOKENS}, section(), chatty)
    assert found == {"": [tuple(TOKENS[at][:8]) for at in (0, 2, 4)]}


def test_what_is_a_chat_already_is_not_put_into_one(chatty: Path) -> None:
    data = {
        "prose": "x.txt",
        "chat": {"data": "c.jsonl", "column": "messages", "chat_template": True},
    }
    made = {"prompts": 1, "prompt_tokens": 8, "tokens": 12, "chat_template": True}
    validation = tiny.recipe("m", validation={"data": data, "generation": made}).validation
    found = prompts_of({"prose": TOKENS, "chat": TOKENS}, validation, chatty)
    assert found["chat"] == [tuple(TOKENS[0][:8])]
    assert len(found["prose"][0]) > 8


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}<{{ m.role }}>{% endfor %}", "leaves out what a user says"),
        ("{{ raise_exception('no') }}", "that the chat template refuses: no"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(
    template: str, problem: str, tmp_path: Path
) -> None:
    model = tiny.save_tokenizer(tmp_path / "model", template=template)
    with pytest.raises(SourceError) as error:
        prompts_of({"": TOKENS}, section(chat_template=True), model)
    assert str(error.value).startswith("validation.generation.chat_template")
    assert problem in str(error.value)


def test_end_tokens_are_those_of_generation_else_of_the_config(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    for text, ends in (
        ('{"eos_token_id": [5, 7]}', {5, 7}), ('{"eos_token_id": 9}', {9}), ("{}", {tiny.EOS}),
        ("{", {tiny.EOS}),
    ):  # fmt: skip
        file.write_text(text, encoding="utf-8")
        assert end_tokens(open_source(str(tmp_path / "model"))) == ends


# -------------------------------------------------------------------------------------- the gates


def made(result: int | None, source: int | None = 4) -> Continuation:
    return Continuation("p", "s", "r", 1.0, 1.0, length_source=source, length_result=result)


def checks_of(found: list[Continuation], **limits: Any) -> dict[str, Check]:
    text = {"data": "x.txt", "generation": {"tokens": 12}, **limits}
    validation = tiny.recipe("m", validation=text).validation
    return {check.name: check for check in continuations._checks(found, validation)}


def test_lengths_are_judged_where_a_limit_is_set_only() -> None:
    found = [made(4), made(None), made(None, None)]
    assert list(checks_of(found)) == ["repetition", "loops"]
    judged = checks_of(found, unfinished=0.5, length_change=0.3)
    unfinished, change = judged["unfinished"], judged["length_change"]
    assert (unfinished.value, unfinished.passed) == (pytest.approx(1 / 3), True)
    assert unfinished.detail == "source 1 of 3, result 2"
    assert change.value == pytest.approx((4 + 12 + 12) / (4 + 4 + 12) - 1)
    assert change.passed is False
    assert change.detail == "source 6.7 tokens, result 9.3, of at most 12"


def test_an_answer_is_over_at_its_end_token(chatty: Path) -> None:
    decode = validator.decoder_of(chatty)
    prompt, loop = [5, 6], [9, 8, 7] * 8
    for chat in (True, False):
        one = continuations._continuation(
            prompt, [4, 1, 3, 3], loop, frozenset({1, 7}), section(chat_template=chat), decode
        )
        assert (one.length_source, one.length_result) == (2, 3)
        assert (one.loop_result is None) is chat


# ------------------------------------------------------------------------------- layers that stay


def test_layers_that_fit_are_loaded_once_and_the_tokens_are_the_same(
    tiny_model: TinyModel, layer_watch: tiny.LayerWatch
) -> None:
    source = open_source(str(tiny_model("qwen3_moe")))
    read = open_tensors(source.tensors)
    model = StreamedModel(source, read)
    prompts = torch.tensor(TOKENS)[:, :8]
    alone = model.generate(prompts, 6)
    assert layer_watch.loaded == [0, 1, 2] * 6
    layer = sum(p.numel() * p.element_size() for p in model.load_layer(0).parameters())
    layer_watch.loaded.clear()
    for room, loaded in (
        (10 * layer, [0, 1, 2]),
        (2 * layer, [0, 1, 2] + [2] * 5),
        (0, [0, 1, 2] * 6),
    ):
        with resident(model, room):
            assert torch.equal(model.generate(prompts, 6), alone)
        assert layer_watch.experts_alive() == 0
        assert layer_watch.loaded == loaded
        layer_watch.loaded.clear()
    model.load_layer(0)
    assert layer_watch.loaded == [0], "afterwards all is as before"


def test_prompts_of_several_lengths_come_back_in_their_order(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("mixtral")))
    model = StreamedModel(source, open_tensors(source.tensors))
    prompts = [tuple(TOKENS[0][:8]), tuple(TOKENS[1][:5]), tuple(TOKENS[2][:8])]
    steps: list[int] = []
    found = continued(model, prompts, 7, lambda: steps.append(1))
    assert len(steps) == 14
    for prompt, ids in zip(prompts, found, strict=True):
        assert ids == model.generate(torch.tensor([prompt]), 7)[0].tolist()


def test_a_report_tells_the_lengths(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny_model("olmoe"), path)
    source = open_source(str(path))
    ids = StreamedModel(source, open_tensors(source.tensors)).generate(
        torch.tensor(TOKENS)[:, :8], 12
    )
    end = int(ids[0, 4])
    file = path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": end}), encoding="utf-8")
    text = {
        "data": "x.txt",
        "generation": {"prompts": 6, "prompt_tokens": 8, "tokens": 12},
        "unfinished": 0.25,
    }
    recipe = tiny.recipe("m", validation=text)
    report = validator.validate(
        open_source(str(path)), None, path, TOKENS, recipe, RunOptions(), reload=False
    )
    first = next((at for at, token in enumerate(ids[0].tolist()) if token == end), None)
    assert first is not None
    assert report.continuations[0].length_source == first + 1
    assert report.continuations[0].length_result == first + 1
    assert report.check("unfinished").value == 0
    assert report.check("unfinished").passed
