"""The proof: one test or more for each equation of the method and each promise of the README.

python -m pytest -q test_bupo.py
"""

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported: nothing here may wait for a hub

import pytest
import torch
import transformers
from hypothesis import given, settings, strategies
from safetensors.torch import load_file, save_file
from torch import Tensor

import analyze
import bupo

torch.set_num_threads(1)  # more do not help models as small as these

PAPER_FILES = Path(__file__).parent.parent / "shared" / "data"  # the paper's problems, where somebody has put them


def small_model(family: str = "Qwen3", layers: int = 4, **settings):
    """A random model of 4 blocks, vocabulary 50, whose logits are far from uniform, and which two key heads share."""
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3)
    ends = dict(eos_token_id=1, pad_token_id=0, bos_token_id=None)
    config = getattr(transformers, f"{family}Config")(**{**shape, **heads, **ends, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        for name, weight in model.named_parameters():
            if "norm" in name:  # with weights of 1, to norm twice would be to norm once
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        return model


def random_sequences(lengths: list[tuple[int, int]], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(seed)
    return [tuple([rng.randrange(2, 50) for _ in range(n)] for n in pair) for pair in lengths]


@pytest.fixture(scope="session", autouse=True)
def short_run(request, tmp_path_factory):
    """The run that the last test looks at, begun before the first one, if it is to come: it takes a minute of a core."""
    if all("test_a_short_run" not in item.name for item in request.session.items):
        yield None
        return
    out = tmp_path_factory.mktemp("short") / "a"
    settings = flags(steps=15, internal_steps=3, eval_problems=128, eval_every=15, out=out)
    process = start(*settings)
    yield process, out
    process.kill()
    process.wait()


FAMILIES = [(family, tied) for family in ("Qwen3", "Qwen2", "Llama") for tied in (True, False)]
every_family = pytest.mark.parametrize(("family", "tied"), FAMILIES)
IDS = torch.tensor([[5, 9, 33, 2, 41, 17, 8], [7, 7, 12, 49, 3, 20, 0]])  # (2, 7)


# Internal policies (Eq. 1, 5, 6) ======================================================================================


@every_family
def test_top_layer_is_the_policy_and_lower_layers_are_its_hidden_states(family, tied):
    model = small_model(family, tie_word_embeddings=tied)
    with torch.no_grad():
        full = model(IDS, output_hidden_states=True, use_cache=False)
        assert torch.equal(bupo.policy_logits(model, bupo.internal_hidden(model, IDS, 4)), full.logits)
        for layer in range(4):
            hidden = bupo.internal_hidden(model, IDS, layer)
            assert torch.equal(hidden, full.hidden_states[layer])
            assert torch.equal(bupo.policy_logits(model, hidden), model.lm_head(model.model.norm(hidden)))
            assert torch.equal(bupo.policy_logits(model, hidden, norm=False), model.lm_head(hidden))


@every_family
def test_lower_layer_has_the_gradients_of_the_full_forward_pass(family, tied):
    model = small_model(family, tie_word_embeddings=tied)
    ours = gradients(model, bupo.policy_logits(model, bupo.internal_hidden(model, IDS, 2)))
    theirs = gradients(model, model.lm_head(model.model.norm(model(IDS, output_hidden_states=True).hidden_states[2])))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in ours)  # Eq. 14 and 15
    assert {"model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"} <= ours.keys()


def gradients(model, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits.log_softmax(-1)[..., 3].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", [0, 1, 3, 4])
def test_only_the_blocks_up_to_the_layer_run(layer):
    model, calls = small_model(), []
    for i, block in enumerate(model.model.layers, start=1):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    bupo.internal_hidden(model, IDS, layer)
    assert calls == list(range(1, layer + 1))
    assert len(model.model.layers) == 4
    assert isinstance(model.model.norm, transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm)


def test_the_model_is_whole_again_after_an_error_inside():
    model = small_model()
    with pytest.raises(RuntimeError), bupo.first_layers(model, 2, norm=False):
        raise RuntimeError
    assert len(model.model.layers) == 4
    assert not isinstance(model.model.norm, torch.nn.Identity)


@every_family
def test_residual_stream_is_the_sum_of_what_the_modules_write(family, tied):
    model, seen = small_model(family, tie_word_embeddings=tied), {}
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states  # transformers leaves hooks of its own behind
        hooks = [len(module._forward_hooks) for module in model.modules()]
        with bupo.residual_stream(model, lambda name, layer, x: seen.update({(name, layer): x})):
            model(IDS)
    for layer, block in enumerate(model.model.layers, start=1):
        before, attention, ffn = seen["layer", layer - 1], seen["attention", layer], seen["ffn", layer]
        torch.testing.assert_close(before + attention + ffn, seen["layer", layer])
        torch.testing.assert_close(seen["attention_input", layer], block.input_layernorm(before))
        torch.testing.assert_close(seen["ffn_input", layer], block.post_attention_layernorm(before + attention))
        assert torch.equal(seen["layer", layer - 1], states[layer - 1])
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


# Log-probabilities and entropies (Eq. 7) ==============================================================================

SEQUENCES = random_sequences([(3, 5), (6, 2), (2, 9), (4, 1), (5, 7)])


def naive_logps(model, prompt, completion, layer, norm, temperature) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from one unpadded sequence and its full logits."""
    ids = torch.tensor([prompt + completion])
    hidden = model(ids, output_hidden_states=True).hidden_states[layer]
    if (norm or layer == 4) and layer < 4:
        hidden = model.model.norm(hidden)  # the last hidden state is normed already
    logps = (model.lm_head(hidden)[0].float() / temperature).log_softmax(-1)[len(prompt) - 1 : -1]  # (T, V)
    return logps.gather(-1, torch.tensor(completion)[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layer", [1, 3, 4])
def test_chunked_logps_and_entropies_equal_the_naive_ones_with_gradients(layer, norm):
    model = small_model()
    ids, mask = bupo.pad(SEQUENCES, "cpu")
    logps, entropies = bupo.token_logps(model, ids, mask, layer, norm, 0.7, head_tokens=4, entropy=True)
    naive = [naive_logps(model, *pair, layer, norm, 0.7) for pair in SEQUENCES]
    expected = torch.cat([n[0] for n in naive])
    torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropies, torch.cat([n[1] for n in naive]).detach())
    weights = torch.linspace(-1, 1, len(logps))
    ours = torch.autograd.grad((weights * logps).sum(), list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad((weights * expected).sum(), list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() <= 1e-4 * b.norm()


def test_activation_recomputation_changes_no_gradient():
    model = small_model()
    ids, mask = bupo.pad(SEQUENCES, "cpu")
    plain = gradients(model.train(), bupo.token_logps(model, ids, mask, 2)[0][:, None].expand(-1, 5))
    bupo.recompute_activations(model)
    again = gradients(model.train(), bupo.token_logps(model, ids, mask, 2)[0][:, None].expand(-1, 5))
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name]) for name in plain)


def test_pad_masks_by_length_even_where_tokens_look_like_padding():
    ids, mask = bupo.pad([([0, 3], [0, 0]), ([5], [0])], "cpu")
    assert ids.tolist() == [[0, 3, 0, 0], [5, 0, 0, 0]]
    assert mask.tolist() == [[False, False, True, True], [False, True, False, False]]


def test_micro_batches_hold_every_sequence_once_within_the_budget():
    rng = random.Random(0)
    sequences = random_sequences([(rng.randrange(1, 40), rng.randrange(0, 60)) for _ in range(100)])
    lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
    groups = bupo.micro_batches(sequences, 128)
    assert sorted(itertools.chain(*groups)) == list(range(100))
    assert all(len(group) * max(lengths[i] for i in group) <= 128 for group in groups)
    assert sorted(itertools.chain(*bupo.micro_batches(sequences, 128, [3, 50, 7]))) == [3, 7, 50]
    assert bupo.micro_batches(random_sequences([(300, 200), (1, 2)]), 128) == [[1], [0]]
    assert bupo.micro_batches([], 128) == bupo.micro_batches(sequences, 128, []) == []


@pytest.mark.parametrize("norm", [True, False])
def test_entropy_profile_equals_a_direct_computation_for_any_batching(norm):
    model = small_model()
    profiles = [
        bupo.entropy_profile(model, SEQUENCES, norm, micro_tokens=m, head_tokens=h) for m, h in ((9, 3), (99, 99))
    ]
    for name in profiles[0]:
        assert profiles[0][name] == pytest.approx(profiles[1][name], rel=1e-5)
    for layer in range(5):
        entropies = torch.cat([naive_logps(model, *pair, layer, norm, 1.0)[1].detach() for pair in SEQUENCES])
        assert profiles[0]["layer"][layer] == pytest.approx(entropies.mean().item(), rel=1e-5)
    block, hidden = model.model.layers[2], {name: [] for name in ("attention_input", "attention", "ffn_input", "ffn")}

    def keep_attention(module, inputs, settings, output):
        hidden["attention_input"].append(settings["hidden_states"])
        hidden["attention"].append(output[0])

    def keep_ffn(module, inputs, output):
        hidden["ffn_input"].append(inputs[0])
        hidden["ffn"].append(output)

    block.self_attn.register_forward_hook(keep_attention, with_kwargs=True)
    block.mlp.register_forward_hook(keep_ffn)
    for prompt, completion in SEQUENCES:
        model(torch.tensor([prompt + completion]))
    for name in hidden:
        rows = torch.cat([h[0, len(p) - 1 : -1] for h, (p, _) in zip(hidden[name], SEQUENCES, strict=True)])
        logps = model.lm_head(rows).log_softmax(-1).detach()
        assert profiles[0][name][2] == pytest.approx(-(logps.exp() * logps).sum(-1).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        ([1.0, 0.9, 0.8, 0.6, 0.5, 0.4, 0.02, -0.1, 0.0, -0.5], 6),  # explores low, like Qwen3
        ([0.5] * 26 + [-0.2, -3.0], 26),  # explores almost to the top, like Llama
        ([-0.4, 0.9, 0.7, 0.05, -0.1], 3),  # the first layer does not explore yet
        ([0.2, 0.3, 0.4], 3),
        ([-1.0, -2.0, -3.0], 3),  # no layer explores: pi itself
        ([0.0, -2.0, -3.0], 3),  # nor does one that changes nothing
        ([0.9, 0.8, -0.2, 0.5, -0.1], 2),  # what explores again above is another region
        ([0.04, 0.03, 0.001, -0.2], 2),  # clearly positive: next to the largest change, not in nats
    ],
)
def test_boundary_layer(change, layer):
    assert bupo.boundary_layer(change) == layer


# The objective (Eq. 3, 9, 10) =========================================================================================


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1]])
    advantages = bupo.group_advantages(rewards)
    first, third = math.sqrt(1 / 3), math.sqrt(0.75 / 3)  # unbiased standard deviations
    assert advantages[0].tolist() == pytest.approx([s * 0.5 / (first + 1e-6) for s in (1, -1, -1, 1)])
    assert advantages[2].tolist() == pytest.approx([-0.25 / (third + 1e-6)] * 3 + [0.75 / (third + 1e-6)])
    assert advantages[1].tolist() == [0.0] * 4  # exactly, not nearly
    assert advantages[3].tolist() == [0.0] * 4
    equal = torch.tensor([[0.1], [0.3], [0.7]]).repeat(1, 8)  # the mean of eight of these is a little off in float32
    assert bupo.group_advantages(equal).tolist() == [[0.0] * 8] * 3


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.5, 2.0, 2.4, 0.0),  # gained enough: clipped at 1.2 A, no gradient
        (0.5, 2.0, 1.0, 1.0),  # lost although good: the gradient stays
        (1.5, -2.0, -3.0, -3.0),  # gained although bad: the gradient stays
        (0.5, -2.0, -1.6, 0.0),  # lost enough: clipped at 0.8 A
        (1.0, 2.0, 2.0, 2.0),  # at rho = 1 the gradient is A times that of log pi: the policy gradient
    ],
)
def test_clipped_surrogate(ratio, advantage, expected, slope):
    logps = torch.tensor([math.log(ratio) - 1.0], requires_grad=True)
    surrogate = bupo.clipped_surrogate(logps, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(expected)
    assert logps.grad.item() == pytest.approx(slope)


def test_the_phase_switches_after_exactly_internal_steps():
    assert [bupo.optimised_layer(step, 3, 6, 28) for step in range(1, 6)] == [6, 6, 6, 28, 28]
    assert bupo.optimised_layer(1, 0, 6, 28) == 28  # plain GRPO


def update_settings(**changes) -> bupo.Config:
    return bupo.Config(**{**dict(prompts=4, group=2, mini_batch=2, grad_clip=1e9), **changes})


ROLLOUT = random_sequences([(3, 5), (3, 2), (6, 9), (6, 1), (5, 7), (5, 3), (2, 4), (2, 12)])
ADVANTAGES = torch.tensor([0.7, -0.7, 0.0, 0.0, 0.7, -0.7, -0.7, 0.7])


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("layer", [2, 4])
def test_the_update_is_the_gradient_of_the_formula_for_any_micro_batches(layer, average):
    model = small_model()
    loss = 0.0
    members = range(8)
    total = sum(len(ROLLOUT[i][1]) for i in members)
    for i in members:  # at rho = 1 the surrogate is A and its gradient A grad log pi
        logps, _ = naive_logps(model, *ROLLOUT[i], layer, True, 1.0)
        weight = 1 / total if average == "token" else 1 / (len(members) * len(logps))
        loss = loss - weight * (logps - logps.detach()).exp().sum() * float(ADVANTAGES[i])
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for micro_tokens in (1, 30, 1000):
        seen = {}

        class Spy(torch.optim.SGD):
            def step(self):
                seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})  # noqa: B023

        model.zero_grad()
        config = update_settings(mini_batch=4, average=average, micro_tokens=micro_tokens)
        metrics = bupo.update(model, Spy(model.parameters(), lr=0.0), ROLLOUT, ADVANTAGES, layer, config)
        assert seen.keys() == expected.keys()
        for name in seen:
            torch.testing.assert_close(seen[name], expected[name], rtol=1e-4, atol=1e-6)
        assert metrics["first_ratio_error"] < 1e-6
        assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("layer", [2, 4])
def test_the_second_mini_batch_is_clipped_against_the_policy_before_the_first(layer):
    model, seen = small_model(), []
    before = [naive_logps(model, *pair, layer, True, 1.0)[0].detach() for pair in ROLLOUT]

    class Spy(torch.optim.SGD):
        def step(self):
            seen.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            if len(seen) == 1:  # else the model stays as the second gradient was taken of it
                super().step()

    metrics = bupo.update(model, Spy(model.parameters(), lr=0.3), ROLLOUT, ADVANTAGES, layer, update_settings())
    assert len(seen) == 2
    model.zero_grad()
    loss, clipped, total = 0.0, 0, sum(len(ROLLOUT[i][1]) for i in range(4, 8))
    for i in range(4, 8):
        ratio = (naive_logps(model, *ROLLOUT[i], layer, True, 1.0)[0] - before[i]).exp()
        plain, bounded = ratio * ADVANTAGES[i], ratio.clamp(0.8, 1.2) * ADVANTAGES[i]
        loss, clipped = loss - torch.minimum(plain, bounded).sum() / total, clipped + int((bounded < plain).sum())
    loss.backward()
    assert 0 < clipped < total
    first = sum(len(ROLLOUT[i][1]) for i in (0, 1))  # 2 and 3 have no advantage; nothing is clipped at rho = 1
    assert metrics["clipped"] == pytest.approx(clipped / (total + first))
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert seen[1].keys() == expected.keys()
    for name in expected:
        assert (seen[1][name] - expected[name]).norm() <= 1e-3 * expected[name].norm()


def test_phase_1_moves_what_is_below_the_layer_and_nothing_above():
    model = small_model(tie_word_embeddings=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    config = update_settings()
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, config)  # phase 2 first, so that momentum exists
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 2, config)
    for name, p in model.named_parameters():
        above = name.startswith(("model.layers.2.", "model.layers.3."))
        assert torch.equal(p, before[name]) == above, name


def test_completions_without_advantage_count_in_the_mean_but_are_not_run():
    """The update on all completions, two of them with advantage 0, against one that runs them all the same."""
    without, seen = small_model(), {}
    for name, advantages in (("zero", ADVANTAGES), ("tiny", ADVANTAGES + 1e-12 * (ADVANTAGES == 0))):
        model, seen[name] = small_model(), []
        model.model.embed_tokens.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o[..., 0].numel()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        bupo.update(model, optimizer, ROLLOUT, advantages, 4, update_settings(mini_batch=4, micro_tokens=1))
        seen[name, "weights"] = [p.detach() for p in model.parameters()]
    assert len(seen["zero"]) == 2 * 6  # old and new log-probabilities of six completions, in a micro-batch each
    assert len(seen["tiny"]) == 2 * 8
    for a, b, start in zip(seen["zero", "weights"], seen["tiny", "weights"], without.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        assert not torch.equal(a, start)


def test_the_entropy_of_the_policy_that_phase_1_optimises_is_over_all_completions():
    model = small_model()
    entropies = torch.cat([naive_logps(model, *pair, 2, True, 1.0)[1] for pair in ROLLOUT])
    metrics = bupo.update(model, torch.optim.SGD(model.parameters()), ROLLOUT, ADVANTAGES, 2, update_settings())
    assert metrics["layer_entropy"] == pytest.approx(entropies.mean().item(), rel=1e-5)


def test_an_update_without_any_advantage_moves_nothing():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, update_settings())
    before = [p.detach().clone() for p in model.parameters()]
    metrics = bupo.update(model, optimizer, ROLLOUT, torch.zeros(8), 4, update_settings())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert metrics["grad_norm"] == 0.0
    assert all(math.isfinite(v) for v in metrics.values() if v is not None)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_empty_and_single_token_completions_are_legal(average):
    model = small_model()
    rollout = random_sequences([(3, 0), (3, 1), (6, 0), (6, 1), (5, 0), (5, 3), (2, 1), (2, 1)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for micro_tokens in (1, 1000):
        config = update_settings(average=average, micro_tokens=micro_tokens)
        metrics = bupo.update(model, optimizer, rollout, ADVANTAGES + 0.5, 4, config)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["skipped_updates"] == 0


def test_a_gradient_that_is_not_finite_skips_the_update():
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES * math.inf, 4, update_settings())
    assert metrics["skipped_updates"] == 2
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "change", [dict(temperature=0.5), dict(internal_norm="none"), dict(clip=1e-6), dict(grad_clip=1e-3)]
)
def test_every_setting_reaches_the_update(change):
    ends = []
    for changes in ({}, change):
        model = small_model()
        bupo.update(
            model, torch.optim.SGD(model.parameters(), lr=0.1), ROLLOUT, ADVANTAGES, 2, update_settings(**changes)
        )
        ends.append(model.model.layers[1].mlp.up_proj.weight)
    assert not torch.allclose(*ends, rtol=1e-4, atol=1e-6)


def test_bfloat16_compute_moves_float32_masters_at_the_papers_learning_rate():
    """bfloat16 weights would stay where they are at 1e-6; the copy for rollouts follows the masters."""
    model = small_model(initializer_range=0.02, tie_word_embeddings=True)
    actor = bupo.bfloat16_copy(model)
    assert {p.dtype for p in actor.parameters()} == {torch.bfloat16}
    assert actor.lm_head.weight is actor.model.embed_tokens.weight
    assert actor.model.rotary_emb.inv_freq.dtype == torch.float32
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    metrics = bupo.update(model, optimizer, ROLLOUT, ADVANTAGES, 4, update_settings(mini_batch=4), bfloat16=True)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert (weight != before).float().mean() > 0.99
    assert metrics["first_ratio_error"] < 1e-3  # old and new log-probabilities come from the same forward pass
    with torch.no_grad():
        model.lm_head.weight += 1
    bupo.refresh(actor, model)
    assert torch.equal(actor.lm_head.weight, model.lm_head.weight.bfloat16())


# Rollouts =============================================================================================================

PROMPTS = [list(p) for p, _ in random_sequences([(n, 0) for n in (3, 11, 1, 7, 2, 9, 5, 4, 6, 8, 3)], seed=4)]


@pytest.mark.filterwarnings("error::FutureWarning")  # transformers renames arguments
@every_family
def test_greedy_samples_equal_generate_with_more_prompts_than_rows(family, tied):
    model = small_model(family, tie_word_embeddings=tied)
    completions = bupo.sample(model, PROMPTS, 25, {1, 7, 9, 30}, temperature=0, rows=4)
    assert len({len(c.ids) for c in completions}) > 3  # else nothing left the batch early
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        settings = dict(max_new_tokens=25, do_sample=False, eos_token_id=[1, 7, 9, 30], pad_token_id=0)
        expected = model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert completion.ids == expected
        assert completion.ended == (expected[-1] in (1, 7, 9, 30))
        assert completion.ended or len(expected) == 25


@pytest.mark.parametrize("rows", [1, 3, 16, 100])  # at 16, two padded prompts enter while others run
def test_returned_logps_and_entropies_equal_a_teacher_forced_pass(rows):
    model, prompts = small_model(), [prompt for prompt in PROMPTS for _ in range(3)]  # as groups come
    completions = bupo.sample(model, prompts, 12, {1}, 0.8, rows, torch.Generator().manual_seed(3))
    for prompt, completion in zip(prompts, completions, strict=True):
        logps, entropies = naive_logps(model, prompt, completion.ids, 4, True, 0.8)
        assert completion.logps == pytest.approx(logps.tolist(), abs=1e-4)
        assert completion.entropies == pytest.approx(entropies.tolist(), abs=1e-4)
        assert completion.ended == (completion.ids[-1] == 1)
        assert 1 not in completion.ids[:-1]


def test_a_prompt_is_read_once_for_its_whole_group():
    model, read = small_model(), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: read.append(output[..., 0].numel()))
    bupo.sample(model, [[5, 6, 7]] * 8 + [[8, 9]] * 8, 1, {1})
    assert read == [2 * 3]  # two prompts, padded to three tokens; and one token each needs no further pass


def test_rows_that_outgrow_the_cache_go_on_rightly():
    """The cache is widened in blocks of 256 columns: lengths beyond that must not matter."""
    model = small_model(layers=2, max_position_embeddings=1024)
    prompt = random_sequences([(300, 0)])[0][0]
    (completion,) = bupo.sample(model, [prompt], 290, set(), temperature=0)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=290, do_sample=False, eos_token_id=None)
    assert completion.ids == expected[0, 300:].tolist()


def test_sampled_frequencies_are_the_exact_probabilities_whatever_the_generation_settings():
    model = small_model(vocab_size=20, initializer_range=0.1)
    model.generation_config.update(do_sample=True, temperature=0.3, top_k=3, top_p=0.5, repetition_penalty=2.0)
    prompt, n = [4, 2, 6], 8000
    completions = bupo.sample(model, [prompt] * n, 2, {1}, 1.3, rows=n, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1).tolist()
        seconds = (model(torch.tensor([[*prompt, t] for t in range(20)])).logits[:, -1] / 1.3).softmax(-1).tolist()
    assert max(first) < 0.5
    expected = {(t,): first[t] for t in (1,)}
    expected |= {(a, b): first[a] * seconds[a][b] for a in range(20) if a != 1 for b in range(20)}
    observed = dict.fromkeys(expected, 0)
    for completion in completions:
        observed[tuple(completion.ids)] += 1
    rare = [key for key in expected if n * expected[key] < 5]  # pooled: chi-square needs 5 expected in each cell
    cells = [(observed[k], n * expected[k]) for k in expected if k not in rare]
    cells.append((sum(observed[k] for k in rare), n * sum(expected[k] for k in rare)))
    chi_square, freedom = sum((o - e) ** 2 / e for o, e in cells if e), len(cells) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # four standard deviations


def test_same_seed_same_samples_and_the_global_stream_is_left_alone():
    model = small_model()
    state = torch.get_rng_state()
    draws = [bupo.sample(model, PROMPTS, 9, {1}, 1.0, 4, torch.Generator().manual_seed(s)) for s in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_are_right_in_training_mode_with_activation_recomputation():
    model = small_model()
    expected = bupo.sample(model, PROMPTS, 15, {1}, temperature=0)
    bupo.recompute_activations(model)
    model.train()
    assert [c.ids for c in bupo.sample(model, PROMPTS, 15, {1}, temperature=0)] == [c.ids for c in expected]


def test_the_internal_policy_can_be_sampled():
    model = small_model()
    with bupo.first_layers(model, 2):
        completions = bupo.sample(model, PROMPTS, 6, {1}, 1.0, 4, torch.Generator().manual_seed(0))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        assert completion.logps == pytest.approx(
            naive_logps(model, prompt, completion.ids, 2, True, 1.0)[0].tolist(), abs=1e-4
        )


def test_a_sampler_that_does_not_draw_from_what_is_scored_is_noticed():
    model, config = small_model(), update_settings()
    completions = bupo.sample(model, PROMPTS * 3, 12, {1}, 1.0, 4, torch.Generator().manual_seed(0))
    sequences = [(prompt, c.ids) for prompt, c in zip(PROMPTS * 3, completions, strict=True)]
    assert bupo.sampling_error(model, sequences, completions, config) < 1e-5
    other = small_model(rms_norm_eps=0.5)
    assert bupo.sampling_error(other, sequences, completions, config) > 0.1


def test_every_end_token_counts():
    model, tokenizer = bupo.load_model("tiny")
    model.generation_config.eos_token_id = [7, 9]
    assert bupo.end_tokens(model, tokenizer) == {7, 9, tokenizer.eos_token_id}
    model.generation_config.eos_token_id = None
    assert bupo.end_tokens(model, tokenizer) == {tokenizer.eos_token_id}


# Reward ===============================================================================================================


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x \right.}", r"\left\{x \right."),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{4} and then \boxed{5", "4"),  # the last is cut off
        (r"\boxed{", None),
        ("no box 5", None),
        (r"\boxed{}", ""),
        ("", None),
        (r"} \boxed{6}", "6"),
        (r"\boxedx{6}", None),
    ],
)
def test_extract_boxed(text, content):
    assert bupo.extract_boxed(text) == content


# ruff: noqa: E501
RIGHT = r"""
5 | 5            05 | 5           5. | 5             5.0 | 5          +5 | 5         -5 | -5        $5$ | 5        0.5 | \frac{1}{2}
.5 | 1/2         \frac12 | 0.5    \dfrac{3}{4} | 3/4  \tfrac{3}{4} | 0.75               -\frac{1}{2} | \frac{-1}{2}
10,080 | 10080   10{,}080 | 10080  10\,080 | 10080    1,000,000 | 1000000               12 \text{ cm} | 12       27 miles | 27
5\text{ cm}^2 | 5                 90^\circ | 90      10\% | 10         \text{Yes} | Yes          yes | Yes          No. | No
\text{True} | true                \textbf{A} | A     (C) | C           \text{(B)} | B            \mathrm{even} | even
\sqrt{12} | 2\sqrt{3}             \sqrt2 | \sqrt{2}  x=5 | 5           2^{10} | 1024             e^{x} | e^x        x^2+2x+1 | (x+1)^2
6 + 9 i | 6+9i   \pi r^{2} | \pi r^2                 2,1 | 1,2         \{1,2\} | \{2, 1\}        (1, 2) | (1,2)
\left( 3, \frac{\pi}{2} \right) | (3,\frac{\pi}{2})  (-\infty, 2] | (-\infty,2]                  3\cdot 4 | 12      \frac{2\pi}{4} | \frac{\pi}{2}
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}              52_{8} | 52_8      \infty | \infty
\displaystyle \frac{a}{b} | \frac{a}{b}              \log 2 | \log{2}  f(x) = x^2 + c | f(x)=x^2+c                  \ln(4) | 2\ln(2)
5 cm | 5         5\mathrm{i} | 5i                   f'(x) = 2x | 2x        f'(x) = 2x | f'(x)=2x             HHT | hht
\$5 | 5           1,000 \text{ km} | 1000          5 | 5 \text{ cm}   12 inches | 12  \$10,080 | 10080   1 1/2 | 1 1/2
"""
WRONG = r"""
5 | 6            50 | 5           -5 | 5             2t | 2            52_8 | 52_1   52_8 | 52    1,2,3 | 123       0.333333 | 1/3
5 \text{ cm} | 5 \text{ m}        10 \text{ AM} | 10 \text{ PM}        [0,1) | [0,1]               (1,2) | (2,1)     A | B
yes | no         x | y            \infty | -\infty   x=5 | 6           2\pi | 2      \sqrt{2} | 2  3 | three         i | 1
5\mathrm{i} | 5  5\mathrm{e}^2 | 5                   HTH | HHT   vi | iv  7 \text{ squared} | 7                 3 xy | 3
8 f(x) | 8 f'''(x)                    g(0) = 5 | g'(0) = 0  \{1,2,3,\ldots\} | \{1,2,3\}             n' | n
1 1/2 | 5.5      1 2 | 12     100, 250 | 100250   52_{16} | 52   5 pi | 5   2 sin x | 2   5 \text{ million} | 5     (x+1)^3 | x^2+2x+1                \frac{1}{3} | 0.3  10^{10} | 10^{11}  \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&2\\3&5\end{pmatrix}
"""


def pairs(table: str) -> list[tuple[str, str]]:
    """The pairs 'given | gold' of a table whose cells are apart by two spaces or more."""
    return [tuple(pair.split(" | ")) for pair in re.split(r" {2,}|\n", table.strip()) if pair]


def test_rewards_of_right_and_wrong_answers():
    assert len(pairs(RIGHT)) + len(pairs(WRONG)) >= 60
    missed = [(given, gold) for given, gold in pairs(RIGHT) if bupo.math_reward(rf"So \boxed{{{given}}}.", gold) != 1]
    assert missed == []
    accepted = [(given, gold) for given, gold in pairs(WRONG) if bupo.math_reward(rf"So \boxed{{{given}}}.", gold) != 0]
    assert accepted == []
    assert bupo.math_reward("5", "5") == 0  # not boxed
    assert bupo.math_reward(r"\boxed{}", "5") == 0


def test_every_gold_answer_of_the_paper_is_right_against_itself():
    if not PAPER_FILES.is_dir():
        pytest.skip("the paper's problem files are not beside this checkout")
    files = sorted(PAPER_FILES.glob("*.parquet"))
    golds = [row["ground_truth"] for file in files for row in bupo.read_rows(str(file))["reward_model"]]
    assert len(golds) == 5600
    assert [gold for gold in golds if bupo.math_reward(rf"\boxed{{{gold}}}", gold) != 1] == []


def hostile_answers() -> list[str]:
    """220 answers that a model under RL might give and that stall, crash or fool careless graders."""
    rng = random.Random(0)
    shapes = [
        "9^{9^{9^{%d}}}",
        "(10^{%d})!",
        "10^{10^{%d}}",
        "%d^{%d^{%d}}",
        r"\frac{%d}{0}",
        r"\int_0^{%d} x^{x^x} dx",
    ]
    shapes += [
        r"\binom{10^{%d}}{10^5}",
        r"\sum_{k=1}^{10^{%d}} k^k",
        r"\sqrt[%d]{\sqrt{-1}^{\pi}}",
        r"\lim_{x \to %d} x^{1/0}",
    ]
    shapes += [
        "__import__('os')._exit(%d)",
        "$(kill -9 %d)",
        "'; exit %d #",
        "../../../../etc/passwd%d",
        r"\input{/etc/passwd%d}",
    ]
    answers = [shape % ((n,) * shape.count("%d")) for shape in shapes for n in (7, 30, 99, 12345)]
    for n in (50, 200, 1000):
        answers += [
            "{" * n,
            "}" * n,
            "{" * n + "1" + "}" * n,
            r"\frac{" * n + "1" + "}{2}" * n,
            "(" * n + "x" + ")" * n,
        ]
        answers += [r"\sqrt{" * n + "2" + "}" * n, "-" * n + "1", "1" + "+1" * n, "9" * n + "/" + "7" * n, r"\left" * n]
    answers += [
        "9" * 100_000,
        "1." + "0" * 50_000 + "1",
        "1e999999999",
        "0x" + "f" * 5000,
        "-" * 50_000,
        "7" + "\0",
        "\ud800",
        "\0" * 500,
    ]
    for size in (5, 17, 50):
        row = " & ".join("x" * (i % 3 + 1) for i in range(size))
        answers.append(r"\begin{pmatrix} " + r" \\ ".join([row] * size) + r" \end{pmatrix}")
        answers.append(r"\det" + answers[-1])
    for size in (10, 100, 299, 1000, 50_000):
        for alphabet in (
            "\\{}boxedfrac123_^$&",
            "0123456789^!().",
            "".join(map(chr, range(1, 255))),
            "\u0660\u0661\u00b2\u221e\u4e03",
        ):
            answers += ["".join(rng.choices(alphabet, k=size)) for _ in range(5)]
    return answers


def test_hostile_answers_neither_raise_nor_hang_nor_leave_processes_behind():
    answers = hostile_answers()
    assert len(answers) >= 200

    def timed(answer: str) -> tuple[float, float]:
        began = time.monotonic()
        return bupo.math_reward(rf"\boxed{{{answer}}}", "7"), time.monotonic() - began

    with ThreadPoolExecutor(4) as pool:
        rewards, seconds = zip(*pool.map(timed, answers), strict=True)
    assert set(rewards) == {0.0}
    assert max(seconds) < bupo.CHECK_SECONDS + 8  # on a busy machine a new checker takes seconds to start
    assert bupo.math_reward(r"\boxed{\sqrt{8}}", r"2\sqrt{2}") == 1.0  # and the checker still works
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    if children.exists():
        assert len(children.read_text().split()) <= bupo.CHECKERS + 2


def test_rewards_hold_off_the_main_thread_and_without_sigalrm(monkeypatch):
    monkeypatch.delattr(signal, "SIGALRM")
    bupo.same_value.cache_clear()
    texts = [r"\boxed{\frac{2\pi}{4}}", r"\boxed{10^{10^{11}}}", r"\boxed{x+x}", r"\boxed{x+1}"]
    rewards = []
    thread = threading.Thread(
        target=lambda: rewards.extend(bupo.math_rewards(texts, [r"\frac{\pi}{2}", "3", "2x", "2x"]))
    )
    thread.start()
    thread.join(60)
    assert rewards == [1.0, 0.0, 1.0, 0.0]


def test_a_checker_that_someone_killed_is_replaced():
    checker = bupo.AnswerChecker()
    assert checker("2x", "x+x")
    if sys.platform == "linux":
        assert re.search(r"Max address space +2147483648 ", Path(f"/proc/{checker.child.pid}/limits").read_text())
    checker.child.kill()
    checker.child.wait()
    assert checker("2x", "x+x")
    checker.child.kill()
    checker.child.communicate()


@settings(deadline=None, max_examples=300)
@given(text=strategies.text(alphabet="\\{}boxed fbox123$ax"), inside=strategies.text(alphabet="ab12+-=^_ "))
def test_the_last_box_is_found_after_any_text(text, inside):
    assert bupo.extract_boxed(text + rf" \boxed{{{inside}}}") == inside.strip()
    found = bupo.extract_boxed(text)
    assert found is None or found in text


@settings(deadline=None, max_examples=50)
@given(text=strategies.text(max_size=30), number=strategies.integers(-(10**12), 10**12))
def test_a_reward_is_0_or_1_for_any_text(text, number):
    assert bupo.math_reward(text, "7") in (0.0, 1.0)
    assert bupo.math_reward(rf"\boxed{{{text}}}", "7") in (0.0, 1.0)
    assert bupo.math_reward(rf"\boxed{{{number}}}", str(number)) == 1.0
    assert bupo.math_reward(rf"\boxed{{{number + 1}}}", str(number)) == 0.0


# Problems =============================================================================================================


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "How many?", "answer": "6 / 2 = 3\n#### 1,003"}, "How many?", "1,003"),  # GSM8K
        ({"problem": "Sum?", "solution": r"so \boxed{x^2}", "answer": "x^2"}, "Sum?", "x^2"),  # MATH-500
        ({"problem": "Sum?", "solution": r"so \boxed{\frac{1}{2}}"}, "Sum?", r"\frac{1}{2}"),  # MATH
        ({"question": "Why?", "final_answer": "Yes", "difficulty": 3.5}, "Why?", "Yes"),  # DeepMath
        ({"question": "What?", "answer": 42}, "What?", "42"),
        ({"question": "What?", "answer": 42.0}, "What?", "42"),
        ({"question": "What?", "final_answer": ["42"]}, "What?", "42"),
    ],
)
def test_load_problems_finds_the_usual_columns(tmp_path, row, question, answer):
    (problem,) = bupo.load_problems(write_rows(tmp_path / "x.jsonl", [row]))
    assert problem.messages == [{"role": "system", "content": bupo.SYSTEM}, {"role": "user", "content": question}]
    assert problem.answer == answer


def test_load_problems_reads_chat_prompts_csv_and_the_limit(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    chat = {"prompt": messages, "reward_model": {"ground_truth": "9", "style": "rule"}, "question": "other"}
    assert (
        bupo.load_problems(write_rows(tmp_path / "chat.json", [chat] * 3), limit=2) == [bupo.Problem(messages, "9")] * 2
    )
    (tmp_path / "x.csv").write_text("question,answer\na,1\nb,2\n")
    assert [p.answer for p in bupo.load_problems(str(tmp_path / "x.csv"))] == ["1", "2"]


def test_rows_without_question_or_answer_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"question": q, "answer": a} for q, a in (("a", "1"), (None, "2"), ("c", None), (" ", "4"), ("e", "5"))]
    assert [p.answer for p in bupo.load_problems(write_rows(tmp_path / "x.jsonl", rows))] == ["1", "5"]
    assert "question: question, answer: answer; 3 rows lack one" in capsys.readouterr().out
    parts = [
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"}
    ]  # nothing a text model reads
    with pytest.raises(bupo.UsageError, match="no row with both"):
        bupo.load_problems(write_rows(tmp_path / "parts.jsonl", parts))


def test_one_row_and_duplicate_rows_are_enough_to_train_on(tmp_path):
    for count in (1, 3):
        file = write_rows(tmp_path / f"{count}.jsonl", [{"question": "1+2", "answer": 3}] * count)
        assert bupo.main(flags(dataset=file, out=tmp_path / f"run-{count}", steps=1, **SHORT)) == 0


def test_the_arithmetic_task_is_right_fits_and_keeps_its_held_out_problems_apart():
    training, held_out = (bupo.load_problems(s) for s in ("arithmetic", "arithmetic-heldout"))
    texts = [{p.messages[0]["content"] for p in part} for part in (training, held_out)]
    assert not texts[0] & texts[1]
    assert 0.1 < len(held_out) / (len(training) + len(held_out)) < 0.15
    _, tokenizer = bupo.load_model("tiny")
    for problem in training + held_out:
        text = problem.messages[0]["content"]
        solution = bupo.worked_solution(text)
        assert eval(text) == int(problem.answer)
        assert bupo.extract_boxed(solution) == problem.answer
        assert all(eval(left) == int(right) for left, right in re.findall(r"([\d+-]+)=(\d+)", solution))
        assert len(solution) - len(r"\boxed{") + 2 <= 40  # tokens, with the end token: nothing is cut off
    assert len(tokenizer(bupo.worked_solution("9+9+2-1-9")).input_ids) == len("9+9=18;18+2=20;20-1=19;19-9=10[10}")


# Evaluation ===========================================================================================================


def test_pass_at_k_equals_brute_force():
    for n, c in [(5, 0), (5, 2), (5, 5), (6, 3)]:
        outcomes = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(outcomes, k))
            assert bupo.pass_at_k(n, c, k) == pytest.approx(sum(map(max, draws)) / len(draws))


def test_evaluate_counts_rightly_and_draws_from_its_own_stream(monkeypatch):
    model, tokenizer = bupo.load_model("tiny")
    problems = bupo.load_problems("arithmetic-heldout")[:3]
    results = iter([1.0, 0.0, 0.0, 0.0] + [1.0] * 4 + [0.0] * 4)
    monkeypatch.setattr(bupo, "math_rewards", lambda texts, answers: [next(results) for _ in texts])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    metrics, samples = bupo.evaluate(model, tokenizer, problems, k=4, max_new_tokens=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert metrics["eval_avg"] == pytest.approx(5 / 12)
    assert metrics["eval_se"] == pytest.approx(torch.tensor([0.25, 1.0, 0.0]).std().item() / math.sqrt(3))
    assert metrics["eval_pass"] == pytest.approx([5 / 12, (1 / 2 + 1) / 3, (3 / 4 + 1) / 3, 2 / 3])
    monkeypatch.undo()
    assert bupo.evaluate(model, tokenizer, problems, k=4, max_new_tokens=5)[1][0][1].ids == samples[0][1].ids


# Models ===============================================================================================================


@pytest.mark.parametrize("family", ["Gemma2", "GPT2", "Olmo2", "Cohere", "Granite"])
def test_models_that_are_not_llama_like_are_refused(family):
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    extra = dict(residual_multiplier=0.5) if family == "Granite" else {}
    config = getattr(transformers, f"{family}Config")(**shape, **extra, pad_token_id=0, eos_token_id=1)
    kind = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    with pytest.raises(bupo.UsageError, match="not Llama-like"):
        bupo.check_model(model)


@pytest.mark.parametrize("family", ["Qwen3", "Qwen2", "Llama", "Mistral"])
def test_llama_like_models_are_accepted(family):
    bupo.check_model(small_model(family))


def test_a_chat_template_that_refuses_the_problems_says_so(finished, tmp_path, capsys):
    model = copied(finished / "model", tmp_path / "m")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}{{ messages[0].content }}"
    (model / "chat_template.jinja").write_text(refuses)
    file = write_rows(tmp_path / "x.jsonl", [{"question": "1+1", "answer": 2}])
    arguments = dict(model=model, steps=0, eval_dataset=file, max_prompt=99, max_completion=4, eval_k=1)
    assert bupo.main(flags(out=tmp_path / "a", **arguments)) == 2
    assert "(No system role); give other messages" in capsys.readouterr().err
    assert bupo.main(flags(out=tmp_path / "a", system="", **arguments)) == 0


def test_letters_that_the_terminal_lacks_do_not_end_a_run(tmp_path):
    file = write_rows(tmp_path / "x.jsonl", [{"question": "\u03c0?", "answer": "\u03c0"}])
    arguments = flags(**{**SHORT, **dict(dataset=file, eval_dataset=file, steps=1, out=tmp_path / "a")})
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, bupo.__file__, *arguments], env=ascii_only, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prompts_without_chat_template_or_system_role():
    _, tokenizer = bupo.load_model("tiny")
    problem = bupo.Problem([{"role": "system", "content": "S"}, {"role": "user", "content": "1+1"}], "2")
    assert tokenizer.decode(bupo.encode(tokenizer, problem)) == "<|user|>S\n\n1+1<|assistant|>"
    tokenizer.chat_template = None
    assert tokenizer.decode(bupo.encode(tokenizer, problem)) == "S\n\n1+1\n\n"


# The command line =====================================================================================================

SHORT = dict(warm_up_steps=2, prompts=4, group=2, mini_batch=2, eval_problems=4, eval_k=2)
SHORT |= dict(max_completion=12, internal_steps=1)


def flags(**settings) -> list[str]:
    return [text for name, value in settings.items() for text in ("--" + name.replace("_", "-"), str(value))]


@pytest.fixture(scope="module")
def guessing(tmp_path_factory) -> dict:
    """Settings of a run that starts from a model that boxes any digit, so that each step has some signal to learn from."""
    folder = tmp_path_factory.mktemp("guessing")
    model, tokenizer = bupo.load_model("tiny")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    problems = [{"question": f"{a}+{b}", "answer": a + b} for a in range(1, 9) for b in range(1, 9) if a + b < 10]
    texts = [rf"\boxed{{{digit}}}" for digit in range(1, 10)]
    prompts = [bupo.encode(tokenizer, bupo.Problem([dict(role="user", content=p["question"])], "")) for p in problems]
    pairs = [(p, [*tokenizer(text).input_ids, tokenizer.eos_token_id]) for p in prompts[::4] for text in texts]
    for _ in range(40):
        (-bupo.token_logps(model, *bupo.pad(pairs, "cpu"), layer=6)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    bupo.save_model(model, tokenizer, folder / "model")
    (folder / "config.json").write_text(json.dumps({"model": "tiny", "internal_layer": "3"}))
    (folder / "metrics.jsonl").touch()
    file = write_rows(folder / "digits.jsonl", problems)
    return dict(
        model=folder,
        dataset=file,
        eval_dataset=file,
        prompts=8,
        group=4,
        mini_batch=4,
        eval_problems=4,
        eval_k=2,
        max_completion=12,
        internal_steps=2,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a short finished run of two steps, one in each phase."""
    out = tmp_path_factory.mktemp("run") / "a"
    assert bupo.main(flags(out=out, steps=2, **SHORT)) == 0
    return out


STEP_KEYS = {
    "step",
    "layer",
    "reward",
    "entropy",
    "layer_entropy",
    "completion_tokens",
    "truncated",
    "no_signal",
    "clipped",
}
STEP_KEYS |= {"ratio_mean", "ratio_max", "grad_norm", "rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb"}


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_writes_its_settings_metrics_completions_and_model(finished):
    config = json.loads((finished / "config.json").read_text())
    assert (config["model"], config["internal_layer"], config["lr"]) == ("tiny", "3", 1e-4)
    metrics = lines(finished / "metrics.jsonl")
    assert [(line["step"], "eval_avg" in line) for line in metrics] == [(0, True), (1, False), (2, False), (2, True)]
    assert [line["layer"] for line in metrics if "layer" in line] == [3, 6]
    assert metrics[1].keys() >= STEP_KEYS
    assert {"eval_avg", "eval_se", "eval_pass", "eval_k", "eval_problems"} <= metrics[0].keys()
    assert metrics[2]["layer_entropy"] == metrics[2]["entropy"] != metrics[1]["layer_entropy"]  # pi's in phase 2
    assert {line["step"] for line in lines(finished / "completions.jsonl")} == {0, 2}
    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "<|assistant|>" in tokenizer.chat_template
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_finished_run_can_be_evaluated_with_the_settings_of_its_origin(finished, tmp_path, capsys):
    assert (
        bupo.main(flags(model=finished, steps=0, out=tmp_path / "b", eval_problems=4, eval_k=2, max_completion=12)) == 0
    )
    (metrics,) = lines(tmp_path / "b" / "metrics.jsonl")
    assert metrics["eval_avg"] == lines(finished / "metrics.jsonl")[-1]["eval_avg"]
    assert re.search(
        r"avg@2 [\d.]+% \(standard error [\d.]+%\), pass@2 .* 4 held-out problems", capsys.readouterr().out
    )
    one = flags(model=finished, steps=0, out=tmp_path / "c", eval_problems=1, eval_k=2, max_completion=12)
    assert bupo.main(one) == 0
    assert re.search(r"avg@2 [\d.]+%, pass@2 .* 1 held-out problems", capsys.readouterr().out)  # one has no error
    assert json.loads((tmp_path / "b" / "config.json").read_text())["eval_dataset"] == "arithmetic-heldout"
    assert not (tmp_path / "b" / "model").exists()


def test_a_run_says_how_to_evaluate_it_again(guessing, tmp_path, monkeypatch, capsys):
    file = tmp_path / "held out.jsonl"
    file.write_text("".join(json.dumps({"question": f"1+{i}", "answer": str(1 + i)}) + "\n" for i in range(4)))
    changes = dict(eval_dataset=file, system="Think.", seed=3)
    assert bupo.main(flags(out=tmp_path / "a", steps=1, **{**guessing, **changes})) == 0
    command = shlex.split(re.search(r"to evaluate it again: python bupo.py (.*)", capsys.readouterr().out)[1])
    assert bupo.main([*command, "--out", str(tmp_path / "b")]) == 0
    for log in ("metrics.jsonl", "completions.jsonl"):  # the latter holds prompts and completions as token ids
        trained, again = (lines(tmp_path / name / log)[-1] for name in "ab")
        assert again == {**trained, "step": 0}


def same_run(a: Path, b: Path) -> None:
    """Two runs have the same weights and the same metrics, but for what was measured with a clock."""
    timed = {"rollout_tokens_per_s", "update_tokens_per_s", "peak_memory_gb", "seconds"}
    for file in ("metrics.jsonl", "completions.jsonl"):
        first, second = (
            [{k: v for k, v in line.items() if k not in timed} for line in lines(x / file)] for x in (a, b)
        )
        assert first == second
    models = [transformers.AutoModelForCausalLM.from_pretrained(x / "model").state_dict() for x in (a, b)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all(line["grad_norm"] > 0 for line in lines(a / "metrics.jsonl") if "layer" in line)  # each step moved them


def test_each_step_has_random_draws_of_its_own(guessing, tmp_path):
    """With one problem and a learning rate of 0, only the draws can differ."""
    file = write_rows(tmp_path / "one.jsonl", [{"question": "1+2", "answer": 3}])
    settings = {**guessing, "dataset": file, "prompts": 1, "mini_batch": 1, "group": 8, "lr": 0.0, "eval_problems": 0}
    assert bupo.main(flags(out=tmp_path / "a", steps=4, **settings)) == 0
    assert len({line["entropy"] for line in lines(tmp_path / "a" / "metrics.jsonl")}) == 4


def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(guessing, tmp_path):
    settings = dict(**guessing, eval_every=2, save_every=2)
    assert bupo.main(flags(out=tmp_path / "a", steps=4, **settings)) == 0
    assert bupo.main(flags(out=tmp_path / "b", steps=3, **settings)) == 0
    assert bupo.main(flags(resume=tmp_path / "b", steps=4)) == 0
    same_run(tmp_path / "a", tmp_path / "b")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_phase_1_of_a_run_leaves_the_upper_blocks_alone(guessing, tmp_path):
    assert bupo.main(flags(out=tmp_path / "a", steps=1, **guessing)) == 0
    before, after = weights_of(guessing["model"] / "model"), weights_of(tmp_path / "a" / "model")
    for name in before:  # layer 3 of 6
        above = name.startswith(tuple(f"model.layers.{i}." for i in (3, 4, 5)))
        assert torch.equal(before[name], after[name]) == above, name


def test_the_bfloat16_copy_follows_the_float32_masters_through_a_run(guessing, tmp_path):
    out = tmp_path / "a"
    assert bupo.main(flags(out=out, steps=2, lr=1e-2, precision="bfloat16", **guessing)) == 0
    start, masters, copy = (weights_of(f) for f in (guessing["model"] / "model", out / "checkpoint-2", out / "model"))
    for name in copy:
        assert masters[name].dtype == torch.float32
        assert torch.equal(copy[name], masters[name].bfloat16())
    assert not torch.equal(copy["model.embed_tokens.weight"], start["model.embed_tokens.weight"].bfloat16())
    model, _ = bupo.load_model(str(out))  # saved in bfloat16, which would not move at 1e-6
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_rollouts_and_updates_share_the_temperature(guessing, tmp_path):
    changes = dict(temperature=0.5, internal_steps=0)
    assert bupo.main(flags(out=tmp_path / "a", steps=1, **{**guessing, **changes})) == 0
    (step,) = (line for line in lines(tmp_path / "a" / "metrics.jsonl") if "layer" in line)
    assert step["layer_entropy"] == pytest.approx(step["entropy"], abs=1e-4)  # of what was sampled and what is scored
    assert step["first_ratio_error"] < 1e-4


def test_adamw_gets_its_settings_and_the_ramp(guessing, tmp_path, monkeypatch):
    made, rates = [], []

    class Spy(torch.optim.AdamW):
        def __init__(self, *arguments, **settings):
            made.append(settings)
            super().__init__(*arguments, **settings)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "AdamW", Spy)
    adam = dict(beta1=0.5, beta2=0.6, weight_decay=0.07, lr=1e-3, lr_ramp=2)
    assert bupo.main(flags(out=tmp_path / "a", steps=3, **adam, **guessing)) == 0
    assert [(s["betas"], s["weight_decay"]) for s in made] == [((0.5, 0.6), 0.07)]
    assert list(dict.fromkeys(rates)) == pytest.approx([5e-4, 1e-3])


def test_every_problem_comes_once_in_each_turn():
    turns = [bupo.problems_of_step(step, 8, 8, 0) for step in (1, 2, 3)]
    assert all(sorted(turn) == list(range(8)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    assert bupo.problems_of_step(1, 3, 8, 0) == [bupo.problems_of_step(step, 3, 1, 0)[0] for step in range(1, 9)]


def test_long_prompts_are_dropped_and_counted(tmp_path, capsys):
    rows = [{"question": "1" * n, "answer": 1} for n in (3, 60, 9, 61)]
    arguments = bupo.Config(max_prompt=20)
    problems = bupo.usable_problems(write_rows(tmp_path / "x.jsonl", rows), 0, bupo.load_model("tiny")[1], arguments)
    assert [len(p.messages[-1]["content"]) for p in problems] == [3, 9]
    assert "2 dropped, of more than 20 tokens" in capsys.readouterr().out


def test_a_model_loses_its_dropout(tmp_path):
    model, _ = bupo.load_model(saved_model(tmp_path / "a", attention_dropout=0.5))
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.0}


def test_recomputation_is_switched_on_by_its_flag(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(bupo, "recompute_activations", lambda model: seen.append(model))
    for flag, times in (("--no-recompute", 0), ("--recompute", 1)):
        assert bupo.main([*flags(out=tmp_path / flag, steps=1, **SHORT), flag]) == 0
        assert len(seen) == times


@pytest.fixture(scope="module")
def undisturbed(guessing, tmp_path_factory) -> Path:
    """A finished run of five steps with a checkpoint after each, to compare disturbed ones with."""
    out = tmp_path_factory.mktemp("undisturbed") / "a"
    assert bupo.main(flags(out=out, steps=5, save_every=1, eval_every=2, **guessing)) == 0
    return out


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, bupo.__file__, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, condition) -> None:
    limit = time.monotonic() + 120
    while process.poll() is None and not condition() and time.monotonic() < limit:
        time.sleep(0.001)
    assert process.poll() is None, "the run ended before it could be disturbed"


def test_a_run_that_is_killed_again_and_again_ends_like_an_undisturbed_one(guessing, undisturbed, tmp_path):
    out = tmp_path / "b"
    process = start(*flags(out=out, steps=5, save_every=1, eval_every=2, **guessing))
    wait_for(process, lambda: (out / "metrics.jsonl").exists())  # before any checkpoint
    process.kill()
    process.communicate()
    process = start(*flags(resume=out))
    wait_for(process, lambda: list(out.glob(".checkpoint-*.tmp")))  # inside a checkpoint
    process.kill()
    process.communicate()
    process = start(*flags(resume=out))
    wait_for(process, lambda: (out / "checkpoint-3").exists())
    process.terminate()  # as a cluster does: the run saves, says so and ends
    _, errors = process.communicate()
    assert process.returncode == 130
    assert f"go on with --resume {out}" in errors
    assert "Traceback" not in errors
    assert bupo.main(flags(resume=out)) == 0
    same_run(undisturbed, out)
    assert sorted(path.name for path in out.glob("*checkpoint*")) == ["checkpoint-4", "checkpoint-5"]  # the last two


def test_a_second_ctrl_c_does_not_lose_the_checkpoint_of_the_first(tmp_path, monkeypatch):
    def interrupted(run):
        if run.done:
            raise KeyboardInterrupt

    def interrupt_and_save(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        save_model(*arguments)

    save_model = bupo.save_model
    monkeypatch.setattr(bupo, "evaluate_run", interrupted)
    monkeypatch.setattr(bupo, "save_model", interrupt_and_save)
    assert bupo.main(flags(out=tmp_path / "a", steps=3, eval_every=1, save_every=9, **SHORT)) == 130
    assert (tmp_path / "a" / "checkpoint-1" / "training.pt").exists()


def copied(run: Path, to: Path) -> Path:
    return shutil.copytree(run, to)


class Hostile:
    """What a pickle can do to those who trust it: here, make a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_damaged_and_foreign_checkpoints_are_named(undisturbed, tmp_path, capsys):
    run = copied(undisturbed, tmp_path / "cut")
    for name in ("training.pt", "model.safetensors"):
        file = run / "checkpoint-5" / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        before = (run / "metrics.jsonl").read_text()
        assert bupo.main(flags(resume=run)) == 2
        assert "checkpoint-5" in capsys.readouterr().err
        assert (run / "metrics.jsonl").read_text() == before
        file.write_bytes(whole)
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, run / "checkpoint-5" / "training.pt")
    assert bupo.main(flags(resume=run)) == 2
    assert "damaged or of another model" in capsys.readouterr().err
    torch.save(Hostile(tmp_path / "ran"), run / "checkpoint-5" / "training.pt")
    assert bupo.main(flags(resume=run)) == 2
    assert not (tmp_path / "ran").exists()
    shutil.rmtree(run / "checkpoint-5")
    assert bupo.main(flags(resume=run)) == 0  # from the one before
    same_run(undisturbed, run)


def test_a_full_disk_ends_a_run_with_a_sentence_and_loses_nothing(undisturbed, tmp_path):
    resource = pytest.importorskip("resource")  # Windows has none
    run = copied(undisturbed, tmp_path / "full")
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))  # noqa: E731 - a checkpoint takes 1.3 MB
    command = [sys.executable, bupo.__file__, *flags(resume=run, steps=6)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(f"make room, then go on with --resume {run}.")
    assert "Traceback" not in done.stderr
    assert bupo.main(flags(resume=run, steps=5)) == 0
    same_run(undisturbed, run)


def test_a_disk_that_is_full_from_the_start_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch, capsys):
    def full(file, text, **_):
        file.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        assert bupo.main(flags(out=tmp_path / "a", steps=1, **SHORT)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert bupo.main(flags(out=tmp_path / "a", steps=1, **SHORT)) == 0


def test_of_two_runs_that_begin_in_one_folder_the_second_is_refused(tmp_path, monkeypatch, capsys):
    load_model, arguments = bupo.load_model, flags(out=tmp_path / "a", steps=1, **SHORT)

    def load_while_another_begins(*settings):
        monkeypatch.setattr(bupo, "load_model", load_model)
        assert bupo.main(arguments) == 0
        return load_model(*settings)

    monkeypatch.setattr(bupo, "load_model", load_while_another_begins)
    assert bupo.main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert [line["step"] for line in lines(tmp_path / "a" / "metrics.jsonl")] == [0, 1, 1]


def test_pickled_weights_are_refused(finished, tmp_path, capsys):
    run = copied(finished / "model", tmp_path / "pickled")
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(run).state_dict(), run / "pytorch_model.bin")
    (run / "model.safetensors").unlink()
    assert bupo.main(flags(model=run, steps=0, out=tmp_path / "new")) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_a_model_that_lacks_a_weight_is_refused(finished, tmp_path, capsys):
    run = copied(finished / "model", tmp_path / "lacks")
    weights = load_file(run / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    assert bupo.main(flags(model=run, steps=0, out=tmp_path / "new")) == 2
    assert "lacks 1 of its weights, such as model.layers.2.mlp.up_proj.weight" in capsys.readouterr().err


def test_code_of_a_checkpoint_is_never_run_and_no_one_is_asked(finished, tmp_path, monkeypatch, capsys):
    run = copied(finished / "model", tmp_path / "code")
    own = dict(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})
    (run / "config.json").write_text(json.dumps({**json.loads((run / "config.json").read_text()), **own}))
    code = "from transformers import Qwen3Config as Config, Qwen3ForCausalLM as Model"
    (run / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{code}\n")
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    assert bupo.main(flags(model=run, steps=0, out=tmp_path / "new")) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_cuda_is_set_up_for_sequences_of_many_lengths(monkeypatch):
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    bupo.choose_device(bupo.Config())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    bupo.choose_device(bupo.Config())
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"  # the user's own stays


MEMORY_ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cuda": torch.AcceleratorError("CUDA error: out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "python": MemoryError(),
}


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", MEMORY_ERRORS.values(), ids=MEMORY_ERRORS)
def test_running_out_of_memory_names_the_three_flags(error, monkeypatch, capsys):
    monkeypatch.setattr(bupo, "train", raising(error))
    assert bupo.main([]) == 2
    assert "--rows, --micro-tokens or --head-tokens" in capsys.readouterr().err


def test_running_out_of_memory_on_a_cpu_does_too_and_other_errors_are_not_hidden(monkeypatch, capsys):
    monkeypatch.setattr(bupo, "train", lambda *_: torch.empty(2**50))
    assert bupo.main([]) == 2
    assert "out of memory; lower --rows" in capsys.readouterr().err
    monkeypatch.setattr(bupo, "train", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        bupo.main([])


@pytest.mark.parametrize("where", ["torch.load", "transformers.AutoModelForCausalLM.from_pretrained"])
def test_a_checkpoint_is_not_called_damaged_when_memory_is_short(where, undisturbed, tmp_path, monkeypatch, capsys):
    run = copied(undisturbed, tmp_path / "a")
    monkeypatch.setattr(where, raising(torch.OutOfMemoryError("CUDA out of memory")))
    assert bupo.main(flags(resume=run)) == 2
    said = capsys.readouterr().err
    assert "out of memory" in said
    assert not re.search("damaged|cannot be loaded", said)


def test_ten_updates_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bupo, "group_advantages", lambda rewards: torch.full_like(rewards, math.nan))
    assert bupo.main(flags(out=tmp_path / "a", steps=9, **SHORT)) == 2
    assert "Ten updates in a row" in capsys.readouterr().err
    assert (tmp_path / "a" / "checkpoint-5").exists()  # two updates a step


def test_notes_tell_what_to_do():
    fine = dict(truncated=0.1, no_signal=0.2, entropy=0.5, first_ratio_error=None, sampling_error=0.02)
    assert bupo.advice(fine, 19) == set()
    assert any("no reward" in note for note in bupo.advice(fine, 20))
    for change, words in [
        (dict(truncated=0.6), "--max-completion"),
        (dict(no_signal=0.9), "--group"),
        (dict(entropy=0.01), "--lr"),
        (dict(first_ratio_error=0.5), "ratio"),
        (dict(sampling_error=0.5), "sampled"),
    ]:
        assert [words in note for note in bupo.advice({**fine, **change}, 0)] == [True]


def test_auto_finds_a_layer_and_bfloat16_runs(tmp_path, capsys):
    settings = flags(out=tmp_path / "a", steps=2, internal_layer="auto", precision="bfloat16", **SHORT)
    assert bupo.main(settings) == 0
    assert re.search(r"Boundary    layer [1-6]", capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "model")
    assert model.dtype == torch.bfloat16


def test_every_setting_is_a_flag_with_help_and_both_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        bupo.main(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--internal-steps" in text
    assert "steps of phase 1, on pi^l; 0 is plain GRPO (paper: 30 or 20) [10 | 30]" in text
    recipe = [f for f in bupo.fields(bupo.Config) if f.name in ("lr", "clip", "group", "prompts", "average", "steps")]
    assert all("paper" in f.metadata["help"] for f in recipe)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "/no/such/model"], "there is no such folder"),
        (["--model", "nobody/no-such-model"], "cannot be loaded"),
        (["--model", "{tmp}"], "no folder with a model"),
        (["--dataset", "{tmp}/none.parquet"], "does not exist"),
        (["--dataset", "nobody/no-such-data"], "cannot be loaded"),
        (["--dataset", "{tmp}/noise.parquet"], "cannot be read as parquet"),
        (["--dataset", "{tmp}/columns.jsonl"], "has no question column, only a, b"),
        (["--dataset", "{tmp}/question.jsonl"], "has no answer column"),
        (["--dataset", "{tmp}/empty.csv"], "has no rows"),
        (["--dataset", "{tmp}/nothing.csv"], "has no rows"),
        (["--steps", "0", "--eval-problems", "0"], "raise one of them"),
        (["--dataset", "{tmp}/null.jsonl"], "no row with both"),
        (["--dataset", "{tmp}/latin.csv"], "cannot be read as csv"),
        (["--dataset", "{tmp}/noise.parquet/x.json"], "does not exist"),
        (["--out", "{tmp}/noise.parquet/new"], "cannot be written"),
        (["--max-prompt", "3"], "raise --max-prompt"),
        (["--internal-layer", "7"], "must be 1 to 6"),
        (["--internal-layer", "0"], "must be 1 to 6"),
        (["--internal-layer", "low"], "a number from 1 on, or auto"),
        (["--internal-norm", "both"], "must be one of final, none"),
        (["--group", "1"], "must be a number from 2 on"),
        (["--mini-batch", "5"], "must divide --prompts 4"),
        (["--temperature", "0"], "--temperature must be"),
        (["--lr", "nan"], "--lr must be"),
        (["--beta2", "1"], "must be below 1"),
        (["--max-completion", "1000"], "max_position_embeddings"),
        (["--device", "cuda:99"], "cannot be used"),
        (["--out", "{tmp}"], "is there already"),
        (["--resume", "{tmp}/nothing"], "no run to resume"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(arguments, sentence, tmp_path, capsys):
    (tmp_path / "noise.parquet").write_bytes(b"no parquet at all")
    write_rows(tmp_path / "columns.jsonl", [{"a": 1, "b": 2}])
    write_rows(tmp_path / "question.jsonl", [{"question": "q"}])
    write_rows(tmp_path / "null.jsonl", [{"question": None, "answer": "1"}])
    (tmp_path / "empty.csv").write_text("question,answer\n")
    (tmp_path / "nothing.csv").write_text("")
    (tmp_path / "latin.csv").write_bytes("question,answer\nf\xfcnf,5\n".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    out = {} if "--out" in arguments or "--resume" in arguments else {"out": tmp_path / "new"}
    settings = {} if "--resume" in arguments else {**SHORT, **out}
    assert bupo.main([*flags(**settings), *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1, errors
    assert sentence in errors[0]
    assert errors[0].endswith(".")
    assert sorted(tmp_path.rglob("*")) == before  # nothing written, nothing lost


def test_an_unknown_flag_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        bupo.main(["--no-such-flag", "3"])
    assert stopped.value.code == 2


def test_a_run_and_what_came_of_it_know_the_model_they_began_with(finished, tmp_path):
    places = (finished, finished / "model", finished / "checkpoint-2")
    assert [bupo.origin(str(place)) for place in places] == ["tiny"] * 3
    (tmp_path / "config.json").write_text(json.dumps({"model": str(finished), "internal_layer": "3"}))
    assert bupo.origin(str(tmp_path)) == "tiny"
    assert bupo.origin("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"


def test_what_is_no_run_cannot_be_resumed(finished, capsys):
    assert bupo.main(flags(resume=finished / "checkpoint-2")) == 2  # its config.json is the model's
    assert "no run to resume" in capsys.readouterr().err


def test_a_missing_math_verify_is_said_not_scored_0(monkeypatch):
    monkeypatch.setattr(bupo, "CHECKER", "import no_such_module")
    with pytest.raises(bupo.UsageError, match="math-verify cannot be started"):
        bupo.AnswerChecker()("1", "2")


def test_fewer_steps_than_are_done_are_refused_when_resuming(finished, capsys):
    before = (finished / "metrics.jsonl").read_text()
    for steps in (0, 1):
        assert bupo.main(flags(resume=finished, steps=steps)) == 2
        assert f"--steps {steps} is less than the 2 that" in capsys.readouterr().err
    assert (finished / "metrics.jsonl").read_text() == before
    assert json.loads((finished / "config.json").read_text())["steps"] == 2


def test_a_changed_setting_is_refused_by_name_when_resuming(finished, capsys):
    assert bupo.main(flags(resume=finished, lr=1.0)) == 2
    assert "--lr cannot change in a resumed run, only --steps" in capsys.readouterr().err
    config, resume = bupo.parse(flags(resume=finished, steps=9, rows=3, micro_tokens=99))  # what memory may force
    assert (config.steps, config.rows, config.micro_tokens, config.prompts, resume) == (
        9,
        3,
        99,
        SHORT["prompts"],
        True,
    )


# Pictures (analyze.py) ================================================================================================

PROFILED = [(3, 6), (9, 2), (1, 1), (4, 11)]  # (prompt, completion) lengths


def naive_policy(model, hidden, norm):
    return torch.log_softmax(model.lm_head(model.model.norm(hidden) if norm else hidden), -1)


def naive_entropy(logps):
    return -(logps.exp() * logps).sum(-1)


@torch.no_grad()
def naive_measures(model, prompt, completion) -> dict:
    """{(name, layer): (N,)} of one completion: an unpadded forward pass that keeps all, and the formulas as printed."""
    attention, ffn, hooks = [], [], []
    for block in model.model.layers:
        hooks.append(block.self_attn.register_forward_hook(lambda m, i, out: attention.append(out[0])))
        hooks.append(block.mlp.register_forward_hook(lambda m, i, out: ffn.append(out)))
    full = model(torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
    for hook in hooks:
        hook.remove()
    pi, stream, found = torch.log_softmax(full.logits, -1), full.hidden_states[0], {}
    for layer in range(len(ffn) + 1):
        if layer:
            block, a, f = model.model.layers[layer - 1], attention[layer - 1], ffn[layer - 1]
            middle = stream + a
            inputs = block.input_layernorm(stream), block.post_attention_layernorm(middle)
            for name, write, read, onto in (("attention", a, inputs[0], stream), ("ffn", f, inputs[1], middle)):
                found[name, layer] = naive_entropy(naive_policy(model, write, norm=False))
                found[f"{name}_input", layer] = naive_entropy(naive_policy(model, read, norm=False))
                found[f"{name}_change", layer] = found[name, layer] - found[f"{name}_input", layer]
                found[f"{name}_cosine", layer] = (write * onto).sum(-1) / write.norm(dim=-1) / onto.norm(dim=-1)
            stream = middle + f
        policy, top = naive_policy(model, stream, norm=True), layer == len(ffn)
        assert torch.allclose(policy, pi if top else naive_policy(model, full.hidden_states[layer], True), atol=1e-4)
        found["policy", layer] = naive_entropy(policy)
        found["policy_without_norm", layer] = naive_entropy(policy if top else naive_policy(model, stream, norm=False))
        found["kl", layer] = (pi.exp() * (pi - policy)).sum(-1)
        found["top1", layer] = (pi.argmax(-1) == policy.argmax(-1)).float()
        for name in ("", "_without_norm") if layer else ():
            before, after = found[f"policy{name}", layer - 1], found[f"policy{name}", layer]
            found[f"layer_change{name}", layer] = after - before
    positions = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return {key: values[0, positions] for key, values in found.items()}


@every_family
def test_analyze_every_number_equals_a_direct_computation(family, tied):
    model, sequences = small_model(family, tie_word_embeddings=tied), random_sequences(PROFILED)
    found = analyze.profile(model, sequences, head_tokens=3)
    naive = [naive_measures(model, *sequence) for sequence in sequences]
    assert {(n, k) for n, measure in found["measures"].items() for k in measure["layer"]} == naive[0].keys()
    for name, measure in found["measures"].items():
        for layer, mean, error in zip(*measure.values(), strict=True):
            values = [one[name, layer].double() for one in naive]
            tokens, overall = sum(map(len, values)), torch.cat(values).mean()
            residuals = torch.stack([(v - overall).sum() for v in values])
            assert mean == pytest.approx(float(overall), abs=1e-4), (name, layer)
            assert error == pytest.approx(float((residuals**2).sum() * 4 / 3) ** 0.5 / tokens, abs=1e-4), (name, layer)
    assert (found["tokens"], found["completions"], found["max_entropy"]) == (20, 4, pytest.approx(math.log(50)))
    assert found["boundary_layer"] == bupo.boundary_layer(found["measures"]["ffn_change"]["mean"])


def test_analyze_agrees_with_the_sampler_and_with_entropy_profile():
    model, prompts = small_model(), [prompt for prompt, _ in random_sequences(PROFILED)]
    completions = bupo.sample(model, prompts, 12, {1}, generator=torch.Generator().manual_seed(0))
    sequences = [(prompt, c.ids) for prompt, c in zip(prompts, completions, strict=True)]
    found = analyze.profile(model, sequences)["measures"]
    entropies = [entropy for c in completions for entropy in c.entropies]
    assert found["policy"]["mean"][-1] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert found["kl"]["mean"][-1] == pytest.approx(0, abs=1e-5)
    assert found["top1"]["mean"][-1] == 1
    theirs = bupo.entropy_profile(model, sequences)
    for ours, name in (("policy", "layer"), ("attention", "attention"), ("ffn", "ffn"), ("ffn_input", "ffn_input")):
        assert found[ours]["mean"] == pytest.approx(theirs[name], abs=1e-5)
    raw = bupo.entropy_profile(model, sequences, norm=False, names=("layer",))["layer"]
    assert found["policy_without_norm"]["mean"] == pytest.approx(raw, abs=1e-5)


def test_analyze_kl_counts_a_bias_of_the_head():
    model, (sequence,) = small_model(), random_sequences([(3, 5)])
    model.lm_head = torch.nn.Linear(32, 50)
    found, naive = analyze.profile(model, [sequence])["measures"], naive_measures(model, *sequence)
    assert found["kl"]["mean"] == pytest.approx([float(naive["kl", k].mean()) for k in range(5)], abs=1e-5)
    assert found["kl"]["se"] == [None] * 5  # one completion tells nothing of the error


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("norm", [True, False])
def test_analyze_one_layer_equals_a_direct_computation(layer, norm):
    model, sequences = small_model(), random_sequences(PROFILED)
    measure = analyze.partial(analyze.measure_one_layer, layer=layer, norm=norm, head_tokens=3)
    found = analyze.averages(analyze.with_changes(analyze.token_sums(model, sequences, measure, 30)), sequences)
    want = {}
    for prompt, completion in sequences:
        positions = slice(len(prompt) - 1, len(prompt) + len(completion) - 1)
        with torch.no_grad():
            ids = torch.tensor([prompt + completion])
            hidden = {k: bupo.internal_hidden(model, ids, k)[0, positions] for k in range(5)}
            policy = {k: naive_policy(model, h, norm or k == 4) for k, h in hidden.items()}
        for k in range(max(2, layer + 1), 5):
            want.setdefault(("cosine", k), []).append(torch.cosine_similarity(hidden[layer], hidden[k], dim=-1))
        for k in {1: (2, 3, 4), 3: (4,)}[layer]:
            kl = (policy[layer].exp() * (policy[layer] - policy[k])).sum(-1)
            want.setdefault(("kl", k), []).append(kl)
        change = naive_entropy(policy[layer]) - naive_entropy(policy[layer - 1])
        want.setdefault(("layer_change", layer), []).append(change)
        want.setdefault(("nll", 4), []).append(-policy[4].gather(-1, torch.tensor(completion)[:, None])[:, 0])
        for name in ("attention_change", "ffn_change"):
            want.setdefault((name, layer), []).append(naive_measures(model, prompt, completion)[name, layer])
    for (name, k), values in want.items():
        mean = found[name]["mean"][found[name]["layer"].index(k)]
        assert mean == pytest.approx(float(torch.cat(values).mean()), abs=1e-4), (name, k)
    assert found["cosine"]["layer"] == sorted(k for name, k in want if name == "cosine")
    assert found["kl"]["layer"] == sorted(k for name, k in want if name == "kl")


def test_analyze_does_not_depend_on_batches_chunks_or_padding():
    model, sequences = small_model(), random_sequences(PROFILED)
    whole, split = analyze.profile(model, sequences), analyze.profile(model, sequences, micro_tokens=1, head_tokens=1)
    for name, measure in whole["measures"].items():
        assert measure["mean"] == pytest.approx(split["measures"][name]["mean"], abs=1e-5)
        assert measure["se"] == pytest.approx(split["measures"][name]["se"], abs=1e-5)


def test_analyze_never_holds_more_logits_than_a_chunk():
    model, sequences, sizes = small_model(), random_sequences(PROFILED), []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits[..., 0].numel()))
    analyze.profile(model, sequences, head_tokens=3)
    assert max(sizes) == 3
    assert sum(sizes) == 20 * (1 + 5 + 4 + 4 * 4)  # pi; pi^0..pi^4; without the norm but at L; the modules


def test_analyze_removes_its_hooks_when_something_fails():
    model = small_model()
    head, model.lm_head = model.lm_head, torch.nn.Identity()  # no attribute `weight`
    with pytest.raises(AttributeError):
        analyze.profile(model, random_sequences(PROFILED))
    model.lm_head, seen = head, []

    def fail(name, layer, values):
        seen.append(name)
        if name == "ffn":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        analyze.measure_all_layers(model, *bupo.pad(random_sequences(PROFILED), "cpu"), fail)
    assert seen
    assert not any(module._forward_hooks for module in model.modules())


def test_analyze_standard_error_is_that_of_independent_completions():
    rng, means, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        counts = torch.randint(1, 30, (40,), generator=rng).double()
        sums = counts * (2 + torch.randn(40, generator=rng).double())  # the tokens of a completion are all alike
        mean, error = analyze.mean_and_error(sums, counts)
        means.append(mean)
        errors.append(error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.12)


def saved_model(folder, family="Qwen3", **settings):
    """A random model of the built-in one's vocabulary with its tokenizer, in the Hugging Face layout."""
    tokenizer = bupo.tiny_model(0)[1]
    model = small_model(family, vocab_size=len(tokenizer), max_position_embeddings=4096, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def plotted(figure) -> list[float]:
    """Every number that the lines and error bars of a figure show."""
    shown = []
    for axis in figure.axes:
        for line in axis.lines:
            if len(line.get_xdata()) > 2 or line.get_marker() not in ("None", None, ""):
                shown += [float(v) for v in line.get_ydata() if v is not None]
        for band in axis.collections:
            shown += [float(v) for path in band.get_paths() for v in path.vertices[:, 1]]
    return shown


def numbers_in(value) -> list[float]:
    if isinstance(value, dict | list):
        return [n for v in (value.values() if isinstance(value, dict) else value) for n in numbers_in(v)]
    return [float(value)] if isinstance(value, int | float) else []


def assert_json_has_all(figure, file):
    """Each plotted number is in the file, as it is, as a percentage, or as a mean and its error."""

    def pairs(value):
        if isinstance(value, dict) and "mean" in value:
            yield from ((m, e) for m, e in zip(value["mean"], value["se"], strict=True) if e is not None)
        for v in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from pairs(v)

    data = json.loads(file.read_text())
    known = [*numbers_in(data), *(m + s * e for m, e in pairs(data) for s in (-1, 1))]
    known = torch.tensor([*known, *(100 * k for k in known)], dtype=torch.float64)
    shown = plotted(figure)
    assert len(shown) > 20
    for number in shown:
        assert float((known - number).abs().min()) < 1e-6, number


@pytest.fixture
def figures(monkeypatch):
    """The figures that the command line draws, kept."""
    kept, close = [], analyze.plt.close
    monkeypatch.setattr(analyze.plt, "close", lambda figure: (kept.append(figure), close(figure)))
    return kept


def test_analyze_profiles_models_side_by_side(tmp_path, capsys, figures):
    models = [saved_model(tmp_path / "a"), saved_model(tmp_path / "b", "Llama", layers=2)]
    flags = ["--dataset", "arithmetic", "--problems", "3", "--max-completion", "5", "--device", "cpu"]
    assert analyze.main(["--model", *models, *flags, "--out", str(tmp_path / "made" / "both.png")]) == 0
    said = capsys.readouterr().out
    data = json.loads((tmp_path / "made" / "both.json").read_text())
    assert [(m["model"], m["layers"], m["completions"]) for m in data["models"]] == [("a", 4, 3), ("b", 2, 3)]
    for model in data["models"]:
        assert f"--internal-layer {model['boundary_layer']}" in said
    assert (tmp_path / "made" / "both.png").stat().st_size > 10_000
    assert len(figures[0].axes) == 10  # 4 panels each, one with an axis on either side
    assert_json_has_all(figures[0], tmp_path / "made" / "both.json")


def test_analyze_scores_the_token_ids_of_a_file(tmp_path, monkeypatch, capsys):
    sequences = random_sequences(PROFILED)
    lines = [dict(step=i, prompt_ids=p, ids=ids, completion="other words") for i, (p, ids) in enumerate(sequences)]
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    source = ["--completions", "completions.jsonl", "--problems", "3", "--device", "cpu", "--max-completion", "9"]
    assert analyze.main(["--model", saved_model(tmp_path / "a"), *source]) == 0
    (found,) = json.loads((tmp_path / "a-layers.json").read_text())["models"]
    ours = analyze.profile(bupo.load_model(str(tmp_path / "a"))[0], sequences[-3:])["measures"]  # the newest
    assert found["measures"]["policy"]["mean"] == pytest.approx(ours["policy"]["mean"], abs=1e-5)
    assert found["tokens"] == 14
    assert "Completions 3 of completions.jsonl, of training step 1, 2, 3" in capsys.readouterr().out


def fabricated_run(folder, seed=0, steps=4, metrics=True, **changes):
    folder.mkdir()
    config = dict(model="x", seed=seed, out=str(folder), steps=steps, internal_layer="auto", internal_steps=2)
    (folder / "config.json").write_text(json.dumps({**config, "internal_norm": "final", **changes}))
    lines = [dict(step=0, eval_avg=0.25, eval_se=0.05, eval_k=4)]
    for step in range(1, steps + 1):
        layer = 3 if step <= changes.get("internal_steps", 2) else 6
        lines.append(dict(step=step, layer=layer, reward=0.1 * step + 0.2 * seed, entropy=1.0, layer_entropy=2.0))
        lines[-1]["completion_tokens"] = 10.0 * step
    if metrics:
        lines.append(dict(step=steps, eval_avg=0.5 + 0.1 * seed, eval_se=0.05, eval_k=4))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines[: None if metrics else 1])))
    return str(folder)


def test_analyze_draws_runs_with_seeds_as_one(tmp_path, capsys, figures):
    runs = [fabricated_run(tmp_path / "s0"), fabricated_run(tmp_path / "s1", seed=1, steps=5)]
    runs += [fabricated_run(tmp_path / "grpo", internal_steps=0), fabricated_run(tmp_path / "lr", lr=2, beta=1)]
    assert analyze.main(["--runs", *runs, "--out", str(tmp_path / "curves")]) == 0
    both, grpo, lr = json.loads((tmp_path / "curves.json").read_text())["settings"]
    assert both["label"] == "BuPO, layer 3 for 2 steps, 2 seeds"
    assert grpo["label"] == "GRPO"
    assert "layer 3" in lr["label"]
    assert both["curves"]["reward"]["step"] == [1, 2, 3, 4]  # what both have reached
    assert both["curves"]["reward"]["mean"] == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert both["curves"]["reward"]["se"] == pytest.approx([0.1] * 4)  # of 0.1 and 0.3: std 0.1414, over the root of 2
    assert both["curves"]["eval_avg"] == dict(step=[0], mean=[0.25], se=[0.0])
    assert grpo["curves"]["eval_avg"] == dict(step=[0, 4], mean=[0.25, 0.5], se=[0.05, 0.05])
    assert grpo["curves"]["reward"]["se"] == [None] * 4
    assert "GRPO: held-out accuracy 50.0 % (standard error 5.0) at step 4" in capsys.readouterr().out
    assert_json_has_all(figures[0], tmp_path / "curves.json")


def test_analyze_follows_a_layer_through_checkpoints(tmp_path, figures):
    start = saved_model(tmp_path / "start")
    run = fabricated_run(tmp_path / "run", model=start, eval_dataset="arithmetic", device="cpu", max_completion=5)
    for step in (2, 10):  # the first is the start itself, the second another model
        saved_model(tmp_path / "run" / f"checkpoint-{step}", rms_norm_eps=1e-6 if step == 2 else 0.5)
    assert analyze.main(["--layers-over-training", run, "--problems", "3", "--out", str(tmp_path / "over")]) == 0
    found = json.loads((tmp_path / "over.json").read_text())
    first, second, third = found["points"]
    assert [p["step"] for p in found["points"]] == [0, 2, 10]
    assert (found["layer"], found["layers"]) == (3, 4)
    assert first["measures"] == second["measures"] != third["measures"]
    nll, perplexity = first["measures"]["nll"], first["measures"]["perplexity"]
    assert perplexity["mean"] == [pytest.approx(math.exp(nll["mean"][0]))]
    assert_json_has_all(figures[0], tmp_path / "over.json")


def test_analyze_calls_a_checkpoint_by_its_run_too(tmp_path, monkeypatch):
    run = Path(fabricated_run(tmp_path / "run"))
    (run / "checkpoint-2").mkdir()
    monkeypatch.chdir(run)
    assert analyze.short_name("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"
    assert [analyze.short_name(name) for name in (".", "checkpoint-2", str(run))] == ["run", "run/checkpoint-2", "run"]
    options = analyze.parse(["--model", "checkpoint-2", "."])
    assert analyze.prepare_out(options) == Path("run-checkpoint-2_run-layers")


def test_analyze_counts_layers_from_1_and_names_models_in_full(monkeypatch):
    model, name = small_model(), "somebody/" + "a-model-with-a-name-" * 4
    found = dict(model=name, **analyze.profile(model, random_sequences(PROFILED)))
    figure = analyze.draw_profiles([found, found])
    figure.canvas.draw()
    for axis in figure.axes:
        left, ticks = axis.get_xlim()[0], axis.get_xticks()
        assert 0 < left < 1 == ticks[0]
        assert ticks[-1] <= 4
        words = [text for text in (axis.title, axis._left_title, axis.xaxis.label) if text.get_text()]
        assert all(figure.bbox.containsx(x) for text in words for x in text.get_window_extent().intervalx)
    titles = [part._suptitle for part in figure.subfigs]
    assert all(title.get_text().replace("\n", "").startswith(name) for title in titles)
    boxes = [title.get_window_extent() for title in titles]
    assert figure.bbox.x0 <= boxes[0].x0 < boxes[0].x1 < boxes[1].x0 < boxes[1].x1 <= figure.bbox.x1
    analyze.plt.close(figure)


def test_analyze_shows_a_run_at_a_glance(tmp_path, figures):
    start = saved_model(tmp_path / "start")
    run = fabricated_run(tmp_path / "run", model=start, eval_dataset="arithmetic", device="cpu", max_completion=5)
    for step in (2, 4):  # the first is the start itself, the second another model
        saved_model(tmp_path / "run" / f"checkpoint-{step}", rms_norm_eps=1e-6 if step == 2 else 0.5)
    assert analyze.main(["--overview", run, "--problems", "3", "--out", str(tmp_path / "glance")]) == 0
    found = json.loads((tmp_path / "glance.json").read_text())
    flows = [point["measures"]["policy"]["mean"] for point in found["points"]]
    assert [point["step"] for point in found["points"]] == [0, 2, 4]
    assert len(flows[0]) == 5
    assert flows[0] == flows[1] != flows[2]
    assert found["curves"]["curves"]["reward"]["mean"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert_json_has_all(figures[0], tmp_path / "glance.json")


def test_analyze_samples_from_internal_policies(tmp_path, capsys):
    flags = ["--dataset", "arithmetic", "--problems", "2", "--max-completion", "6", "--device", "cpu"]
    assert analyze.main(["--model", saved_model(tmp_path / "a"), "--sample-layer", "1", "3", *flags]) == 0
    said = capsys.readouterr().out
    assert said.startswith("\na\n")  # whose layers they are
    for who in ("layer 1: ", "layer 3: ", "layer 4, the policy itself: "):
        assert said.count(who) == 2
    model, tokenizer = bupo.load_model(str(tmp_path / "a"))
    config = analyze.config_for(str(tmp_path / "a"), analyze.parse(flags))
    problems = bupo.load_problems("arithmetic", 2)
    with bupo.first_layers(model, 3):
        prompts, completions = analyze.complete(model, tokenizer, problems, config)
    for prompt, completion in zip(prompts, completions, strict=True):  # drawn from pi^3, and from nothing else
        logps, _ = bupo.token_logps(model, *bupo.pad([(prompt, completion.ids)], "cpu"), layer=3)
        assert completion.logps == pytest.approx(logps.tolist(), abs=1e-4)
        assert " ".join(bupo.decode(tokenizer, completion).split()) in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--runs", "nowhere"], "nowhere is not the folder of a run"),
        (["--runs", "empty"], "has no training steps"),
        (["--model", "nowhere/at/all"], "cannot be loaded"),
        (["--model", "gemma"], "is not Llama-like"),
        (["--model", "a", "--completions", "text.jsonl"], "lacks prompt_ids"),
        (["--model", "a", "--completions", "large.jsonl"], "token ids that the model lacks"),
        (["--model", "a", "--completions", "not.jsonl"], "not a file of JSON lines"),
        (["--model", "a", "--completions", "nowhere.jsonl"], "cannot be read"),
        (["--model", "a", "--sample-layer", "5"], "has layers 1 to 4"),
        (["--model", "a", "--max-completion", "9999"], "max_position_embeddings"),
        (["--model", "a", "--out", "not.jsonl/x"], "cannot be written"),
        (["--problems", "0"], "--problems must be"),
        (["--layer", "2"], "--layers-over-training"),
        (["--layers-over-training", "empty"], "keeps no checkpoints"),
        (["--overview", "empty"], "keeps no checkpoint of the end of phase 1"),
        (["--layers-over-training", "run"], "optimised no internal layer; name one from 1 to 3"),
        (["--layers-over-training", "run", "--layer", "0"], "no internal layer 0; name one from 1 to 3"),
        (["--layers-over-training", "run", "--layer", "4"], "no internal layer 4; name one from 1 to 3"),
        (["--runs", "run", "--sample-layer", "1"], "--runs has no use for --sample-layer"),
        (["--runs", "run", "--dataset", "x"], "--runs has no use for --dataset"),
        (["--runs", "run", "run/../run"], "of one setting and one seed"),
        (["--model", "a", "--sample-layer", "1", "--out", "x"], "--sample-layer has no use for --out"),
        (["--model", "a", "--out", "."], "--out . is a folder"),
        (["--model", "a", "--out", "new/"], "--out new/ is a folder"),
    ],
)
def test_analyze_says_in_one_sentence_what_is_wrong(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "a" in arguments:
        saved_model(tmp_path / "a")
    if "gemma" in arguments:
        saved_model(tmp_path / "gemma", "Gemma2")
    if "empty" in arguments:
        fabricated_run(tmp_path / "empty", metrics=False)
    if "run" in arguments:  # of plain GRPO, with a checkpoint
        start = saved_model(tmp_path / "start")
        fabricated_run(tmp_path / "run", model=start, internal_steps=0, device="cpu", max_completion=6)
        saved_model(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "text.jsonl").write_text('{"step": 0, "completion": "1+1"}\n')
    (tmp_path / "large.jsonl").write_text('{"step": 0, "prompt_ids": [1], "ids": [2, 1000]}\n')
    (tmp_path / "not.jsonl").write_text("1+1\n")
    if "--out" in arguments:
        arguments = [*arguments, "--max-completion", "6", "--dataset", "arithmetic"]
    assert analyze.main(arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("analyze.py: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("*.png"))


# The whole ============================================================================================================


def test_a_short_run_of_the_built_in_task_raises_held_out_accuracy(short_run):
    """From the command line, as a user does. One fixed seed; 15 steps with the phase switch after 3."""
    process, out = short_run
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    metrics = lines(out / "metrics.jsonl")
    before, after = (line for line in metrics if "eval_avg" in line)
    assert after["eval_avg"] > before["eval_avg"] + 0.08
    assert before["eval_avg"] > 0.25  # the warm-up left something to reinforce
    assert all(line["first_ratio_error"] < 1e-3 for line in metrics if line.get("first_ratio_error") is not None)
    assert all(line["sampling_error"] < 1e-4 for line in metrics if "reward" in line)
