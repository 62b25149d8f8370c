"""llm-compressor at its defaults: every expert sees every token, static activation order."""

from importlib.metadata import version

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from worker import Job, main


def quantize(job: Job) -> str:
    weights = QuantizationArgs(
        num_bits=job.bits,
        group_size=job.group_size,
        strategy="group",
        symmetric=job.symmetric,
    )
    recipe = GPTQModifier(
        config_groups={"experts": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head", r"re:.*mlp\.gate$", *(f"re:{pattern}" for pattern in job.skip)],
    )
    rows = {"input_ids": job.tokens, "attention_mask": [[1] * len(ids) for ids in job.tokens]}
    oneshot(
        model=job.model,
        dataset=Dataset.from_dict(rows),
        recipe=recipe,
        num_calibration_samples=len(job.tokens),
        max_seq_length=len(job.tokens[0]),
        moe_calibrate_all_experts=not job.routed,
        output_dir=job.output,
    )
    return version("llmcompressor")


if __name__ == "__main__":
    main(quantize)
