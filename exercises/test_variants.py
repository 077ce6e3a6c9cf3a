"""Exercises 11 to 13: does a variant of bupo.py what its name says? Ours, or one that you wrote.

python -m pytest -q exercises/test_variants.py
VARIANT=my/bupo.py python -m pytest -q exercises/test_variants.py -k clip_higher
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import check


@pytest.fixture
def variant(request, tmp_path):
    """The variant that a test is named after, as a module: $VARIANT, or ours."""
    name = request.function.__name__.removeprefix("test_").replace("_", "-")
    file = Path(os.environ.get("VARIANT", tmp_path / "variant.py"))
    if "VARIANT" not in os.environ:
        file.write_text(check.variant(name), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("variant", file)
    module = sys.modules["variant"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_clip_higher(variant):
    """The gradient ends at rho = 1 - eps as before, but only at 1 + 1.4 eps above."""
    ratios = [0.79, 0.81, 1.19, 1.21, 1.27, 1.29]
    for advantage, moving in ((1.0, [1, 1, 1, 1, 1, 0]), (-1.0, [0, 1, 1, 1, 1, 1])):
        logps = torch.tensor(ratios).log().requires_grad_()
        surrogate = variant.clipped_surrogate(logps, torch.zeros(6), torch.tensor(advantage), 0.2)
        surrogate.sum().backward()
        expected = [advantage * ratio * moves for ratio, moves in zip(ratios, moving, strict=True)]
        assert logps.grad.tolist() == pytest.approx(expected)


def test_no_std(variant):
    """The advantage is R - mean, and exactly 0 in a group of equal rewards."""
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1]])
    advantages = variant.group_advantages(rewards).tolist()
    assert advantages[0] == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages[1] == pytest.approx([0.5, 0.5, -0.5, -0.5])
    assert advantages[2] == advantages[3] == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rate(variant, dtype):
    """AdamW's first step moves a weight by the learning rate: above layer 3 by a tenth of it."""
    model, _ = variant.load_model("tiny")
    names = [name for name, _ in model.named_parameters()]
    optimizer = variant.MasterAdamW(model, torch.device("cpu"), dtype, "auto")
    before = [master.detach().clone() for master in optimizer.masters]
    hidden = variant.internal_hidden(model, torch.arange(20)[None], 6)
    variant.policy_logits(model, hidden).log_softmax(-1)[..., 7].mean().backward()
    optimizer.step(1e-3)
    for name, master, old in zip(names, optimizer.masters, before, strict=True):
        above = any(f".layers.{i}." in name for i in (3, 4, 5))
        moved = (master - old).abs().max().item()
        assert moved == pytest.approx(1e-4 if above else 1e-3, rel=0.05), name
