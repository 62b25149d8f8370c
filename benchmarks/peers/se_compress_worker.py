"""se-compress at its defaults, or refined: `compress` under a plan that needs no profile (one
width, nothing protected)."""

from importlib.metadata import version
from pathlib import Path

from worker import Job, main

from se_compress.compression.execute import compress
from se_compress.opening.source import open_source
from se_compress.planning.policy import make_plan
from se_compress.recipe import parse_recipe


def quantize(job: Job) -> str:
    quantization: dict[str, object] = {"group_size": job.group_size, "symmetric": job.symmetric}
    if job.refine:
        quantization["refine"] = {"steps": job.refine}
    recipe = parse_recipe(
        {
            "model": job.model,
            "output": job.output,
            "target": "gptqmodel",
            "calibration": {"data": "the tokens of the job"},
            "policy": {"protect": "none", "bits": job.bits},
            "quantization": quantization,
            "distill": {"steps": job.distill} if job.distill else None,
            "validation": {"data": "none"},
        },
        "the job",
    )
    source, output = open_source(job.model), Path(job.output)
    plan = make_plan(source, None, recipe)
    compress(source, plan, job.tokens, recipe, output)
    return version("se-compress")


if __name__ == "__main__":
    main(quantize)
