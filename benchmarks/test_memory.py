"""The bytes that memory.py counts tensor by tensor, and the micro-batches that bupo.py chooses."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # memory.py adds the folder above

import memory
import pytest
import torch

import bupo


@pytest.mark.parametrize("name", memory.SHAPES)
@pytest.mark.parametrize(("masters", "most"), [("cuda", 16384), ("cpu", 32768)])
def test_micro_batches_are_as_large_as_fit_by_the_count(name, masters, most):
    """Beside the gradients, and before the first step the moments, of masters on the GPU."""
    config = bupo.Config(max_prompt_tokens=1, max_new_tokens=255)
    c, numbers, found = memory.qwen3(memory.SHAPES[name], tied=name != "Qwen3-8B"), 10**9, []
    beside, weights = masters == "cuda", [torch.empty(numbers, device="meta")]
    for free in range(10**9, 60 * 10**9, 10**8):
        tokens, _ = memory.chosen(c, weights, masters, False, free, config)
        counted = 8 * numbers * beside + memory.update(c, numbers, beside, tokens, config)
        assert tokens == 4096 or counted <= 0.9 * free
        assert tokens in (4096, most) or counted >= 0.97 * 0.9 * free
        found.append(tokens)
    assert found == sorted(found)
    assert (found[0], found[-1]) == (4096, most)
    assert len(set(found)) > 2
