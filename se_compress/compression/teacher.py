"""What the source predicts of the calibration text, kept on disk: the aim of distilling.

Of each position the KEPT most likely next words with their log-probabilities; all other words count
as one. So the source does not have to be in memory beside the model that learns from it, and 8,192
tokens take 8 MB.

B sequences of T positions, K words kept, V words of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from se_compress.artifacts import ModelSource, digest_of
from se_compress.model.checkpoint import open_tensors
from se_compress.model.whole import load_whole

KEPT = 128
FILE = "source-predictions.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Of all sequences, which are of equal length.

    tokens  token ids, int64 [B, T]
    logs    log-probabilities of the words kept, float32 [B, T, K], in descending order
    words   their ids, int32 [B, T, K]
    """

    tokens: Tensor
    logs: Tensor
    words: Tensor

    @property
    def covered(self) -> float:
        """The probability that the words kept have together, mean over positions."""
        return float(self.logs.exp().sum(-1).mean())

    def divergence(self, logits: Tensor, sequences: Sequence[int]) -> Tensor:
        """KL divergence from the source, mean over the positions of some sequences, in nats.

        logits  float32 [b, T, V], of those sequences

        The words that are not kept are one word: it is less than or equal to that of all words.
        """
        members = list(sequences)
        logs = self.logs[members].to(logits.device)
        words = self.words[members].to(logits.device).long()
        theirs = logits.gather(-1, words) - logits.logsumexp(-1, keepdim=True)
        rest, their_rest = (_rest(each) for each in (logs, theirs))
        kept = (logs.exp() * (logs - theirs)).sum(-1)
        return (kept + rest * (rest.log() - their_rest.log())).mean()


def _rest(logs: Tensor) -> Tensor:
    """What log-probabilities [..., K] leave to all other words, [...]; float32 holds no less."""
    return (1 - logs.exp().sum(-1)).clamp(min=1e-6)


def predictions_of(
    source: ModelSource,
    tokens: Sequence[Sequence[int]],
    device: torch.device,
    work: Path | None,
    progress: Callable[[int, int], None],
) -> Predictions:
    """What a source predicts, from the file of an earlier run if it is of the same text and source.

    tokens    sequences of equal length
    work      directory of the file; None keeps it in memory alone
    progress  called with the sequences that are done, and all
    """
    text = torch.tensor([list(sequence) for sequence in tokens])
    mark = digest_of(source.digest, text.tolist(), KEPT, device.type)
    file = work / FILE if work else None
    kept = _load(file, mark) if file else None
    if kept is None:
        kept = _predict(source, text, device, progress)
        if file:
            _save(file, mark, kept)
    return Predictions(text, *kept)


@torch.no_grad()
def _predict(
    source: ModelSource, text: Tensor, device: torch.device, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and ids of the likeliest words; one sequence is run at a time."""
    model = load_whole(source, open_tensors(source.tensors), device)
    logs, words = [], []
    for done, sequence in enumerate(text):
        progress(done, len(text))
        found = model.logits(sequence[None].to(device))[0].log_softmax(-1)
        most = found.topk(min(KEPT, found.shape[-1]), dim=-1)
        logs.append(most.values.cpu())
        words.append(most.indices.int().cpu())
    return torch.stack(logs), torch.stack(words)


def _save(file: Path, mark: str, kept: tuple[Tensor, Tensor]) -> None:
    from safetensors.torch import save_file

    partial = file.with_name(file.name + ".writing")
    save_file({"logs": kept[0], "words": kept[1]}, partial, metadata={"of": mark})
    partial.replace(file)


def _load(file: Path, mark: str) -> tuple[Tensor, Tensor] | None:
    """None if the file is not there, is of something else, or is damaged: then it is made anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            if (tensors.metadata() or {}).get("of") != mark:
                return None
            return tensors.get_tensor("logs"), tensors.get_tensor("words")
    except (SafetensorError, OSError):
        return None
