"""Write recipes/tasks/cloze.jsonl: sentences of the reference texts that lack their last word.

    python tools/make_cloze.py

Each row has a sentence without its end, four endings and the index of the right one. The wrong ones
are last words of other sentences of the same text, so that only the sentence tells them apart. One
seed: the same texts give the same file.
"""

import json
import re
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tools" / "reference" / "text"
OUT = ROOT / "recipes" / "tasks" / "cloze.jsonl"
ROWS = 100  # of each text
WORDS = range(12, 31)  # in a sentence
ENDINGS = 4
LEAST_LETTERS = 4  # of an ending: "it" and "him" fit nearly anywhere
_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_ENDING = re.compile(rf"[a-z]{{{LEAST_LETTERS},}}")


def rows(text: str, source: str, dice: Random) -> list[dict[str, object]]:
    """ROWS sentences of a text, in its order."""
    sentences = [" ".join(s.split()) for s in _SENTENCE.split(text)]
    halves = [s.rstrip(".!?;").rpartition(" ")[::2] for s in sentences if len(s.split()) in WORDS]
    usable = [(head, last) for head, last in halves if _ENDING.fullmatch(last)]
    endings = sorted({last for _, last in usable})
    chosen = sorted(dice.sample(range(len(usable)), ROWS))
    return [row(usable[at][0], usable[at][1], endings, source, dice) for at in chosen]


def row(head: str, last: str, endings: list[str], source: str, dice: Random) -> dict[str, object]:
    others = dice.sample([word for word in endings if word != last], ENDINGS - 1)
    choices = [*others, last]
    dice.shuffle(choices)
    return {"text": head, "choices": choices, "answer": choices.index(last), "source": source}


def main() -> None:
    dice = Random(0)
    found = [
        one
        for name in ("austen", "factbook")
        for one in rows((TEXT / f"{name}-held-out.txt").read_text("utf-8"), name, dice)
    ]
    lines = (json.dumps(one, ensure_ascii=False) for one in found)
    OUT.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
