"""GPTQModel at its defaults: tokens go to their own experts, desc_act off, group-aware order."""

from gptqmodel import GPTQModel, QuantizeConfig, __version__
from worker import Job, main


def quantize(job: Job) -> str:
    config = QuantizeConfig(
        bits=job.bits,
        group_size=job.group_size,
        sym=job.symmetric,
        dynamic={f"-:{pattern}": {} for pattern in job.skip},
    )
    model = GPTQModel.load(job.model, config)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job.tokens])
    model.save(job.output)
    return str(__version__)


if __name__ == "__main__":
    main(quantize)
