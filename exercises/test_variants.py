"""Exercises 11 to 15: does a variant of bupo.py what its name says? Ours, or one that you wrote.

python -m pytest -q exercises/test_variants.py
VARIANT=my/bupo.py python -m pytest -q exercises/test_variants.py -k clip_higher
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))

import check


def load(file: Path):
    """A bupo.py as a module."""
    spec = importlib.util.spec_from_file_location("variant", file)
    module = sys.modules["variant"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def variant(request, tmp_path):
    """The variant that a test is named after, as a module: $VARIANT, or ours."""
    name = request.function.__name__.removeprefix("test_").replace("_", "-")
    file = Path(os.environ.get("VARIANT", tmp_path / "variant.py"))
    if "VARIANT" not in os.environ:
        file.write_text(check.variant(name), encoding="utf-8")
    return load(file)


def small_model():
    """A random model of 6 blocks, as tiny/ has them, whose policies differ from layer to layer."""
    shape = dict(vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=6)
    heads = dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.Qwen3Config(**shape, **heads, tie_word_embeddings=True)
        return transformers.Qwen3ForCausalLM(config).eval()


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
    """AdamW's first step moves a weight by the learning rate: above layer 4 by a tenth of it."""
    model = small_model()
    names = [name for name, _ in model.named_parameters()]
    optimizer = variant.MasterAdamW(model, torch.device("cpu"), dtype, "auto")
    before = [master.detach().clone() for master in optimizer.masters]
    hidden = variant.internal_hidden(model, torch.arange(20)[None], 6)
    variant.policy_logits(model, hidden).log_softmax(-1)[..., 7].mean().backward()
    optimizer.step(1e-3)
    for name, master, old in zip(names, optimizer.masters, before, strict=True):
        above = any(f".layers.{i}." in name for i in (4, 5))
        moved = (master - old).abs().max().item()
        assert moved == pytest.approx(1e-4 if above else 1e-3, rel=0.05), name


ROLLOUT = [([3, 9, 4], [5, 7]), ([3, 9, 4], [8, 2, 6, 1]), ([2, 5], [4, 4, 9]), ([2, 5], [7])]
ADVANTAGES = torch.tensor([0.7, -0.7, -0.7, 0.7])
WAY = dict(prompts_per_step=2, group_size=2, mini_batch=2, internal_steps=0)


def check_one_block(module, dtype=torch.float32) -> None:
    """Updates move every weight of block 4, and not a bit of any other, masters included."""
    model, config = small_model(), module.Config(**WAY)
    optimizer = module.MasterAdamW(model, torch.device("cpu"), dtype, "auto")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masters = [master.detach().clone() for master in optimizer.masters]
    for _ in range(2):  # in the second step there is momentum
        module.update(model, optimizer, ROLLOUT, ADVANTAGES, 6, 1e-2, config)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("model.layers.3.")}
    changed = zip(before, masters, optimizer.masters, strict=True)
    assert moved == {name for name, old, new in changed if not torch.equal(old, new)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block(variant, dtype):
    check_one_block(variant, dtype)


class Spy:
    """An optimizer that keeps the gradients of the one step it is asked for."""

    def __init__(self, model):
        self.model, self.found = model, {}

    def step(self, lr: float) -> float:
        parameters = self.model.named_parameters()
        self.found = {name: p.grad.clone() for name, p in parameters if p.grad is not None}
        self.zero_grad()
        return 1.0

    def zero_grad(self) -> None:
        self.model.zero_grad()


def check_align(module, average: str = "token", tokens: int = 1000) -> None:
    """The gradient is that of the formula: at rho = 1, the mean over completion tokens of
    - A log pi + beta A JS(pi^4, pi), with beta = 1 and pi in the second term a constant."""
    model, loss = small_model(), 0.0
    total = sum(len(completion) for _, completion in ROLLOUT)
    for (prompt, completion), advantage in zip(ROLLOUT, ADVANTAGES.tolist(), strict=True):
        ids, speaking = torch.tensor([prompt + completion]), slice(len(prompt) - 1, -1)
        output = model(ids, output_hidden_states=True)
        logits = output.logits[0, speaking]  # (T, V)
        log_pi = logits.log_softmax(-1)[range(len(completion)), completion]  # (T,)
        low = model.lm_head(model.model.norm(output.hidden_states[4][0, speaking])).softmax(-1)
        top = logits.softmax(-1).detach()  # (T, V)
        mean = (low + top) / 2
        js = (low * (low / mean).log() + top * (top / mean).log()).sum(-1) / 2  # (T,)
        assert js.min() > 0.01  # nats: pi^4 is not pi
        weight = 1 / total if average == "token" else 1 / (len(ROLLOUT) * len(completion))
        loss = loss + weight * advantage * (js - log_pi).sum()
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    config = module.Config(**WAY, loss_average=average, micro_batch_tokens=str(tokens))
    spy = Spy(model)
    module.update(model, spy, ROLLOUT, ADVANTAGES, 6, 0.0, config)
    assert spy.found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (spy.found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize(("average", "tokens"), [("token", 1000), ("sequence", 1000), ("token", 1)])
def test_align(variant, average, tokens):
    check_align(variant, average, tokens)


FREEZE = "model.requires_grad_(False)  # embeddings, norm and lm_head, too"
BLOCKS, FROZEN = "for block in model.get_decoder().layers", "block.requires_grad_(False)"
OVER = "divergence(model, *states, mask, config)"
WRONG = [  # variant, what is wrong, text of ours, what the mistake puts in its place
    ("one-block", "embeddings and norm learn, too", FREEZE, f"{BLOCKS}: {FROZEN}"),
    ("one-block", "blocks above learn, too", FREEZE, f"{BLOCKS}[:3]: {FROZEN}"),
    (
        "one-block",
        "only the embeddings frozen",
        FREEZE,
        f"{check.EMBEDDINGS}.requires_grad = False",
    ),
    ("one-block", "counted from 0", "layers[4 - 1].requires", "layers[4].requires"),
    ("one-block", "only attention learns", "[4 - 1].requires", "[4 - 1].self_attn.requires"),
    ("align", "gradient into the teacher", "teacher.detach()", "teacher"),
    ("align", "the student is the constant", "teacher = teacher.d", "student = student.d"),
    ("align", "prompts counted", OVER, f"{OVER.replace('mask', 'mask | True')}.mean()"),
    ("align", "at the token, not before it", "[:, :-1][mask[:, 1:]] for", "[mask] for"),
    ("align", "pushed apart when it is good", "surrogate - 1.0", "surrogate + 1.0"),
    ("align", "always pulled together", "pull = advantage *", "pull = advantage.abs() *"),
    ("align", "without the advantage", "pull = advantage *", "pull ="),
    ("align", "bad ones left out", "pull = advantage *", "pull = advantage.clamp(min=0) *"),
    ("align", "a sum, not a mean", "1.0 * pull", "pull / weight"),
    ("align", "a layer too low", "keep_states(model, 4,", "keep_states(model, 3,"),
    ("align", "pi^l without norm", 'config.internal_norm == "final", True', "False, True"),
    ("align", "KL(pi, mean) alone", "for p in (student, teacher)", "for p in (teacher, teacher)"),
    ("align", "twice the divergence", "(student, teacher)) / 2", "(student, teacher))"),
]


@pytest.mark.parametrize(("name", "mistake", "old", "new"), WRONG, ids=[w[1] for w in WRONG])
def test_a_mistake_is_noticed(name, mistake, old, new, tmp_path):
    source = check.variant(name)
    assert source.count(old) == 1
    (tmp_path / "variant.py").write_text(source.replace(old, new), encoding="utf-8")
    module = load(tmp_path / "variant.py")
    with pytest.raises(AssertionError):
        (check_one_block if name == "one-block" else check_align)(module)
