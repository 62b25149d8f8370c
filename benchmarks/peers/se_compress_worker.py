"""se-compress at its defaults: `compress` under a plan that needs no profile (one width, nothing
protected)."""

from importlib.metadata import version
from pathlib import Path

from worker import Job, main

from se_compress.artifacts import RunOptions
from se_compress.checkpoint import allocate
from se_compress.execute import compress
from se_compress.export import export_config
from se_compress.headers import lay_out
from se_compress.policy import make_plan
from se_compress.recipe import parse_recipe
from se_compress.source import open_source
from se_compress.targets import result_slots


def quantize(job: Job) -> str:
    recipe = parse_recipe(
        {
            "model": job.model,
            "output": job.output,
            "target": "gptqmodel",
            "calibration": {"data": "the tokens of the job"},
            "policy": {"protect": "none", "bits": job.bits},
            "quantization": {"group_size": job.group_size, "symmetric": job.symmetric},
            "validation": {"data": "none"},
        },
        "the job",
    )
    source, output = open_source(job.model), Path(job.output)
    plan = make_plan(source, None, recipe)
    output.mkdir(parents=True)
    layout = lay_out(result_slots(source, plan), output, 5 * 10**9)
    allocate(layout)
    compress(source, plan, job.tokens, recipe, layout, RunOptions())
    export_config(source, plan, output)
    return version("se-compress")


if __name__ == "__main__":
    main(quantize)
