"""auto-round by its own recipe with its extensions, at 200 steps a block, or rounding alone."""

from importlib.metadata import version
from pathlib import Path

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader
from worker import Job, main


def quantize(job: Job) -> str:
    """`job.skip` are regular expressions here as well; the calibration text is that of the job."""
    rows = [
        {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), dtype=torch.long)}
        for ids in job.tokens
    ]
    rounder = AutoRound(
        job.model,
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        iters=job.tuned,
        dataset=DataLoader(rows, batch_size=8),  # type: ignore[arg-type]
        nsamples=len(rows),
        seqlen=len(job.tokens[0]),
        device_map="cpu",
        enable_alg_ext=job.tuned > 0,
        layer_config={pattern: {"bits": 16} for pattern in job.skip},
        enable_torch_compile=False,
    )
    rounder.quantize_and_save(job.output, format="auto_gptq")
    for file in Path(job.output).glob("*/*"):  # it adds a folder of the scheme's name
        file.rename(Path(job.output) / file.name)
    return version("auto-round")


if __name__ == "__main__":
    main(quantize)
