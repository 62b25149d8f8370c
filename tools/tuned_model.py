"""Tune a reference model a little, for base-against-tuned studies (recipes/studies/tuned.yaml):

    python tools/tuned_model.py models/smollm2-moe models/smollm2-moe-tuned

STEPS steps of AdamW on the project's own code and chats (tools/study_text.py), all weights but the
routers, in float32; the result is saved in bfloat16, tokenizer included. Equal calls on one machine
give equal weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tools" / "reference" / "text"
STEPS, ROWS, LENGTH, RATE = 20, 2, 256, 3e-5


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune a reference model a little.")
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    text = (TEXT / "code.txt").read_text() + (TEXT / "chats.jsonl").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    weights = []
    for name, weight in model.named_parameters():
        weight.requires_grad_(".mlp.gate." not in name)
        weights += [weight] if weight.requires_grad else []
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    for step in range(STEPS):
        begins = torch.randint(len(ids) - LENGTH, (ROWS,)).tolist()
        batch = torch.stack([ids[begin : begin + LENGTH] for begin in begins])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {STEPS}: loss {loss.item():.3f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    for file in arguments.model.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, arguments.output / file.name)


if __name__ == "__main__":
    main()
