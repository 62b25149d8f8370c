"""Each measure against its definition, written out."""

import pytest
import torch

from se_compress.measures import kl_divergence, relative_distance, sink_mass


def test_relative_distance_counts_every_token_alike() -> None:
    old = torch.tensor([[[1000.0, 0.0], [0.0, 2.0]], [[3.0, 4.0], [1.0, 0.0]]])
    new = torch.tensor([[[1100.0, 0.0], [0.0, 3.0]], [[3.0, 4.0], [1.0, 1.0]]])
    expected = (0.1 + 0.5 + 0.0 + 1.0) / 4
    assert relative_distance([new], [old]) == pytest.approx(expected)
    assert relative_distance([*new[:, None]], [*old[:, None]]) == pytest.approx(expected)


def test_kl_divergence_by_hand() -> None:
    source, result = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.6, 0.3])
    expected = sum(float(p * (p / q).log()) for p, q in zip(source, result, strict=True))
    found = kl_divergence(source.log() + 3, result.log() - 1)  # logits: any constant may be added
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_sink_mass_averages_late_queries_over_sequences() -> None:
    first_key = torch.rand(2, 3, 12, generator=torch.Generator().manual_seed(0))
    expected = [
        sum(float(first_key[b, h, t]) for b in range(2) for t in range(8, 12)) / 8 for h in range(3)
    ]
    torch.testing.assert_close(sink_mass(first_key), torch.tensor(expected))
