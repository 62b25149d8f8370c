"""Write the texts of recipes/studies that are neither fiction nor encyclopaedia, from what is here:

    python tools/study_text.py

code.txt       modules of this project, one after the other
documents.txt  its documents, as Markdown
chats.jsonl    sums, asked and answered: chats for a chat template

They are committed as they were when this was run last; a study names its text by a digest. All
of it is the project's own, under its licence.
"""

import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "tools" / "reference" / "text"
BYTES = 60_000
CHATS = 400


def joined(files: list[Path]) -> str:
    """The files one after the other, cut at BYTES."""
    return "\n\n".join(file.read_text(encoding="utf-8") for file in files)[:BYTES] + "\n"


def chats() -> str:
    dice = random.Random(0)
    lines = []
    for _ in range(CHATS):
        a, b, c = (dice.randrange(2, 90) for _ in range(3))
        question = (
            f"A shop has {a} boxes of {b} apples, and sells {c} apples. How many are left?"
            if a * b > c
            else f"What is {a} plus {b} plus {c}?"
        )
        left = a * b - c if a * b > c else a + b + c
        answer = (
            f"{a} times {b} is {a * b}; less {c}, {left} are left." if a * b > c else f"{left}."
        )
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines) + "\n"


def main() -> None:
    code = sorted((ROOT / "se_compress").rglob("*.py"))
    documents = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    documents += [ROOT / "benchmarks" / "FINDINGS.md", ROOT / "recipes" / "README.md"]
    texts = {
        "code.txt": joined(code[:: max(1, len(code) // 20)]),
        "documents.txt": joined(documents),
        "chats.jsonl": chats(),
    }
    for name, text in texts.items():
        (OUTPUT / name).write_text(text, encoding="utf-8")
        print(f"{OUTPUT / name}: {len(text):,} bytes")


if __name__ == "__main__":
    main()
