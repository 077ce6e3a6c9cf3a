"""TRL's trainer maximizes bupo.py's objective: the same losses and gradients, in 1 process and 2.

python -m pytest -q scale/test_scale.py
"""

import functools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed: pip install -r scale/requirements.txt")

import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trl.trainer import grpo_trainer

sys.path.insert(0, str(Path(__file__).parent))

import trl_bupo
from trl_bupo import bupo

PROMPTS, GROUP, MINI_BATCH = 8, 4, 4  # a rollout of 32 sequences, for two updates of 16
LAYER = 3  # l, of 6
CASES = [  # norm, tied embeddings, rollouts: the first is phase 1, the second phase 2
    ("final", True, 1),
    ("none", False, 1),
    ("none", True, 2),
    ("final", False, 2),
]


def small_model(tied: bool = True):
    """The Qwen3 of tiny/, 6 blocks, always with the same random weights, and its tokenizer."""
    model, tokenizer = bupo.load_model("tiny")
    model.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(model.config).eval()
    bupo.check_model(model)  # as `bupo.load_model` does
    trl_bupo.own_norms(model)
    return model, tokenizer


def token_lists(seed: str, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 100) for _ in range(rng.randint(2, longest))] for _ in range(count)]


def reward(completion_ids, **_) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def in_updates(values, processes: int = 1):
    """In place of TRL's shuffle: one process and two put the same sequences into the same update.

    Of four quarters, one process of two owns 1 and 2, the other 3 and 4: so the updates are 1 and
    3, then 2 and 4.
    """
    if processes == 2:
        return values
    order = torch.arange(PROMPTS * GROUP).view(4, -1)[[0, 2, 1, 3]].flatten()
    return values[order] if isinstance(values, torch.Tensor) else [values[i] for i in order]


class Fixed(trl_bupo.BuPOTrainer):
    """The trainer with given completions in place of sampled ones."""

    def _generate_single_turn(self, prompt_ids, *_):
        completions = token_lists(f"step {self.state.global_step}", PROMPTS * GROUP, 12)
        first = self.accelerator.process_index * len(prompt_ids)
        self.prompts = prompt_ids
        return completions[first : first + len(prompt_ids)], None


def trainer_of(folder, norm="final", tied=True, rollouts=1, decay=0.0, **more):
    """A trainer ready to go, with SGD, and the bupo.py settings that it follows."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    grpo_trainer.shuffle_sequence_dict = lambda rollout: {
        name: tensor if tensor.ndim == 0 else in_updates(tensor, processes)
        for name, tensor in rollout.items()
    }
    model, tokenizer = small_model(tied)
    run = dict(out=str(folder), device="cpu", precision="float32", steps=rollouts, lr=1.0)
    size = dict(prompts_per_step=PROMPTS, group_size=GROUP, mini_batch=MINI_BATCH)
    phase = dict(internal_layer=str(LAYER), internal_steps=1, internal_norm=norm)
    config = bupo.configure("tiny", **{**run, **size, **phase, **more})
    args = trl_bupo.trainer_config(config, 8, processes)  # 2 micro-batches, if it is one process
    args.optim, args.max_grad_norm, args.disable_tqdm = "sgd", 1e9, True
    args.weight_decay = args.weight_decay and decay  # BuPOConfig has made it 0 under ZeRO-3
    args.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    rows = Dataset.from_list([dict(prompt=ids) for ids in token_lists("prompts", PROMPTS, 9)])
    return Fixed(model, reward, args, rows, tokenizer), config


def recorded(model, work, monkeypatch) -> list[tuple[float, dict]]:
    """The loss and the gradients (None where there are none) of each update that `work` makes."""
    loss, updates, backward = [], [], torch.Tensor.backward

    def record_loss(self, *args, **settings):
        loss.append(float(self.detach()))
        return backward(self, *args, **settings)

    def record_update(*_):
        parameters = model.named_parameters()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in parameters}
        updates.append((sum(loss), gradients))
        loss.clear()

    handle = register_optimizer_step_pre_hook(record_update)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", record_loss)
        work()
    handle.remove()
    return updates


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize(("norm", "internal_steps"), [("final", 1), ("none", 1), ("final", 0)])
def test_losses_and_gradients_are_those_of_bupo(
    tmp_path, monkeypatch, norm, internal_steps, average
):
    """Two updates on one rollout; the second clips ratios that the first has moved."""
    settings = dict(internal_steps=internal_steps, loss_average=average)
    trainer, config = trainer_of(tmp_path, norm, **settings)
    theirs = recorded(trainer.model, trainer.train, monkeypatch)

    model, _ = small_model()
    completions = token_lists("step 0", PROMPTS * GROUP, 12)
    rewards = torch.tensor(reward(completions)).view(-1, GROUP)
    advantages = in_updates(bupo.group_advantages(rewards).flatten())
    sequences = in_updates(list(zip(trainer.prompts, completions, strict=True)))
    optimizer = bupo.MasterAdamW(model, torch.device("cpu"), torch.float32, "auto")
    optimizer.adam = torch.optim.SGD(optimizer.masters)
    monkeypatch.setattr(bupo, "GRAD_CLIP", 1e9)
    layer, said = LAYER if internal_steps else 6, {}
    rest = optimizer, sequences, advantages, layer, config.lr, config
    ours = recorded(model, lambda: said.update(bupo.update(model, *rest)), monkeypatch)

    assert trainer.vllm_importance_sampling_correction == (layer == 6)  # on in TRL; never for pi^l
    assert said["clip_fraction"] > 0.05  # else the old log-probabilities could be anything
    assert len(ours) == len(theirs) == 2
    for (loss, gradients), (their_loss, their_gradients) in zip(ours, theirs, strict=True):
        assert abs(loss - their_loss) < 1e-5
        for name, gradient in gradients.items():
            assert (gradient is None) == (their_gradients[name] is None), name
            if gradient is not None:
                assert (gradient - their_gradients[name]).abs().max() < 1e-5, name
    assert abs(ours[1][0]) > 1e-3


def test_settings_reach_trl(tmp_path):
    config = bupo.configure("any/model", out=str(tmp_path), device="cpu", internal_layer="6")
    args = trl_bupo.trainer_config(config, 8, 1)
    assert (args.internal_layer, args.internal_steps, args.internal_norm) == (6, 30, "final")
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (1e-6, 0.01, 1.0)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (args.epsilon, args.beta, args.temperature, args.top_p, args.top_k) == (0.2, 0, 1, 1, 0)
    assert (args.max_steps, args.generation_batch_size, args.num_generations) == (1200, 256, 8)
    assert (args.max_completion_length, args.gradient_accumulation_steps) == (2048, 8)
    assert (args.lr_scheduler_type, args.warmup_steps, args.num_iterations) == ("constant", 0, 1)


def test_a_run_from_end_to_end(tmp_path, monkeypatch):
    """A completion ends where the template ends a turn, here at <unk>, which neither the generation
    config nor the tokenizer calls an end. A checkpoint resumes, loads, and brings its settings."""
    model, tokenizer = small_model()
    closed = "{% if m.role == 'assistant' %}<unk>{% endif %}{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{% endfor %}", closed)
    end, run = tokenizer.unk_token_id, tmp_path / "run"
    assert end not in (model.generation_config.eos_token_id, tokenizer.eos_token_id)
    says_end = torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)) * 1000.0
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + says_end)

    start = f"--internal-layer 3 --device cpu --prompts-per-step 4 --mini-batch 4 --out {run}"
    with monkeypatch.context() as patch:
        patch.setattr(bupo, "load_model", lambda name: (model, tokenizer))
        assert trl_bupo.main(f"{start} --steps 1".split()) == 0
        assert trl_bupo.main(f"--resume {run} --steps 2".split()) == 0
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = [(h["layer"], h["completions/mean_length"]) for h in history if "layer" in h]
    assert found == [(3, 1), (3, 1)]
    assert [folder.name for folder in bupo.checkpoints(run)] == ["checkpoint-1", "checkpoint-2"]
    bupo.load_model(str(run / "checkpoint-2"))
    config = bupo.configure(str(run / "checkpoint-2"), steps=0)
    assert (config.system, config.max_new_tokens, config.eval_problems) == ("", 40, 256)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--internal-layer 3 --micro-batch 7",
            "--micro-batch 7 times the number of processes, 1, must divide",
        ),
        ("--internal-layer 3 --device cuda", "--device must be auto or cpu, not cuda"),
        ("--internal-layer auto", "--internal-layer must be a number here"),
        ("--resume {out}", "{out} has no settings.json"),
        ("--internal-layer 9", "1 to 6"),
        ("--internal-layer 3 --max-new-tokens 600", "512"),
    ],
)
def test_bad_input_gets_one_sentence(tmp_path, capsys, flags, sentence):
    run = ["--model", "tiny", "--out", str(tmp_path / "run")]
    assert trl_bupo.main([*run, *flags.format(out=tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert sentence.format(out=tmp_path) in said
    assert said.count("\n") == 1


def train_cases(folder: Path, decay: float) -> str:
    """Train each of CASES and save the model; returns the kind of model that was trained.

    Weight decay moves every weight that has a gradient, even one of 0.
    """
    for number, case in enumerate(CASES):
        trainer, _ = trainer_of(folder / str(number), *case, decay=decay)
        trainer.train()
        trainer.save_model()
    return type(trainer.model_wrapped).__name__


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
LAUNCH += ["--mixed_precision", "no", "--main_process_port", "0"]
KINDS = [
    ("ddp", "DistributedDataParallel"),
    ("fsdp", "FSDPQwen3ForCausalLM"),
    ("zero3", "DeepSpeedEngine"),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of what one process trains, by weight decay."""

    @functools.cache
    def folder(decay: float) -> Path:
        train_cases(out := tmp_path_factory.mktemp("one"), decay)
        return out

    return folder


@pytest.mark.parametrize(("how", "kind"), KINDS)
def test_two_processes_train_as_one(tmp_path, alone, how, kind):
    """Each with half the batch, over gloo. No weight above l moves in phase 1."""
    if how == "zero3":
        reason = "DeepSpeed is not installed: pip install deepspeed"
        pytest.importorskip("deepspeed", reason=reason)
    wrap = ["--config_file", str(Path(__file__).with_name(f"{how}.yaml"))]
    wrap = ["--multi_gpu"] if how == "ddp" else wrap
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*LAUNCH, *wrap, __file__, str(tmp_path)]
    settings = dict(env=environment, capture_output=True, text=True, timeout=600)
    done = subprocess.run(command, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 processes with a {kind}" in done.stdout
    single = alone(0.0 if how == "zero3" else 0.1)
    for number, (norm, tied, rollouts) in enumerate(CASES):
        case = f"norm {norm}, {'tied' if tied else 'untied'}, {rollouts} rollouts"
        start = small_model(tied)[0].state_dict()
        load = transformers.Qwen3ForCausalLM.from_pretrained
        one, two = (load(folder / str(number)).state_dict() for folder in (single, tmp_path))
        for name in one:
            assert (one[name] - two[name]).abs().max() < 1e-5, (case, name)
            fixed = any(f".layers.{i}." in name for i in range(LAYER, 6))
            fixed = fixed or (name == "model.norm.weight" and norm == "none")
            assert torch.equal(two[name], start[name]) == (fixed and rollouts == 1), (case, name)


def take_for_gpus(state: PartialState, *args, start=PartialState.__init__, **settings) -> None:
    """PartialState.__init__, but two CPU processes count as two GPUs: FSDP is offered to no others.

    (By accelerate.)
    """
    start(state, *args, **settings)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":  # one of two processes
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState.__init__ = take_for_gpus
    model = train_cases(Path(sys.argv[1]), decay=0.1)
    torch.distributed.destroy_process_group()
    print(f"{os.environ['WORLD_SIZE']} processes with a {model}", flush=True)
