"""A widened model computes what its source does."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.widened_model import widen

SOURCE = Path(__file__).parents[2] / "examples/tiny/base"


def test_a_widened_model_computes_what_its_source_does(tmp_path: Path) -> None:
    num_parameters = widen(SOURCE, "5M", tmp_path / "model", torch.float32)
    assert 5e6 < num_parameters < 6e6
    ids = torch.randint(0, 770, (2, 40), generator=torch.Generator().manual_seed(0))
    small, large = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (SOURCE, tmp_path / "model")
    )
    assert small.std() > 1
    torch.testing.assert_close(large, small, atol=1e-3, rtol=1e-4)
