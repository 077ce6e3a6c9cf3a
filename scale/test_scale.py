"""TRL's trainer climbs bupo.py's objective: the same losses and gradients, in one process and in two.

python -m pytest -q scale/test_scale.py
"""

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

PROMPTS, GROUP, MINI_BATCH, LAYER = 8, 4, 4, 3  # a rollout of 32 sequences, for two updates of 16; l of 6
CASES = [  # norm, tied embeddings, rollouts: the first is phase 1, the second phase 2
    ("final", True, 1),
    ("none", False, 1),
    ("none", True, 2),
    ("final", False, 2),
]


def small_model(tied: bool = True):
    """The built-in Qwen3 of 6 blocks with random weights, always the same ones, and its tokenizer."""
    model, tokenizer = bupo.load_model("tiny")
    model.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    return transformers.Qwen3ForCausalLM(model.config).eval(), tokenizer


def token_lists(seed: str, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 100) for _ in range(rng.randint(2, longest))] for _ in range(count)]


def reward(completion_ids, **_) -> list[float]:
    return [float(sum(ids) % 2) for ids in completion_ids]


def in_updates(values, processes: int = 1):
    """In place of TRL's shuffle, so that one process and two put the same sequences into the same update.

    Of four quarters, one process of two owns 1 and 2, the other 3 and 4: so the updates are 1 and 3, then 2 and 4.
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


def trainer_of(folder, norm="final", tied=True, rollouts=1, internal_steps=1, average="token", **more):
    """A trainer ready to go, with SGD, and the bupo.py settings that it follows."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    grpo_trainer.shuffle_sequence_dict = lambda rollout: {
        name: tensor if tensor.ndim == 0 else in_updates(tensor, processes) for name, tensor in rollout.items()
    }
    model, tokenizer = small_model(tied)
    run = dict(model="small", out=str(folder), device="cpu", precision="float32", recompute=False)
    size = dict(prompts=PROMPTS, group=GROUP, mini_batch=MINI_BATCH, max_completion=12, steps=rollouts)
    phase = dict(internal_layer=str(LAYER), internal_steps=internal_steps, internal_norm=norm, average=average)
    config = bupo.Config(**run, **size, **phase, **{"lr": 1.0, "grad_clip": 1e9, "weight_decay": 0.0, **more})
    args = trl_bupo.trainer_config(config, 8, processes)  # one process needs two micro-batches per update
    args.optim, args.save_strategy, args.disable_tqdm = "sgd", transformers.trainer_utils.SaveStrategy.NO, True
    rows = Dataset.from_list([dict(prompt=ids) for ids in token_lists("prompts", PROMPTS, 9)])
    return Fixed(model, reward, args, rows, processing_class=tokenizer), config


def recorded(model, work, monkeypatch) -> list[tuple[float, dict]]:
    """The loss and the gradients (None where there are none) of each update that `work` makes."""
    loss, updates, backward = [], [], torch.Tensor.backward

    def record_loss(self, *args, **settings):
        loss.append(float(self.detach()))
        return backward(self, *args, **settings)

    def record_update(*_):
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
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
def test_losses_and_gradients_are_those_of_bupo(tmp_path, monkeypatch, norm, internal_steps, average):
    """Two updates on one rollout, of which the second clips ratios that the first has moved."""
    trainer, config = trainer_of(tmp_path, norm, internal_steps=internal_steps, average=average)
    theirs = recorded(trainer.model, trainer.train, monkeypatch)

    model, _ = small_model()
    completions = token_lists("step 0", PROMPTS * GROUP, 12)
    advantages = bupo.group_advantages(torch.tensor(reward(completions)).view(-1, GROUP)).flatten()
    sequences = in_updates(list(zip(trainer.prompts, completions, strict=True)))
    layer, said = LAYER if internal_steps else 6, {}
    rest = (sequences, in_updates(advantages), layer, config)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    ours = recorded(model, lambda: said.update(bupo.update(model, optimizer, *rest)), monkeypatch)

    assert trainer.vllm_importance_sampling_correction == (layer == 6)  # TRL's default, but never of pi^l
    assert said["clipped"] > 0.05  # else the old log-probabilities could be anything
    assert len(ours) == len(theirs) == 2
    for (loss, gradients), (their_loss, their_gradients) in zip(ours, theirs, strict=True):
        assert abs(loss - their_loss) < 1e-5
        assert {n for n in gradients if gradients[n] is None} == {n for n in gradients if their_gradients[n] is None}
        for name, gradient in gradients.items():
            if gradient is not None:
                assert (gradient - their_gradients[name]).abs().max() < 1e-5, name
    assert abs(ours[1][0]) > 1e-3


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--internal-layer 3 --micro-batch 7", "--micro-batch 7 times the number of processes, 1, must divide"),
        ("--internal-layer 3 --device cuda:1", "--device must be auto or cpu, not cuda:1"),
        ("--internal-layer auto", "--internal-layer must be a number here"),
        ("--internal-layer 3 --resume {out}", "There is no checkpoint in"),
        ("--internal-layer 9 --dataset arithmetic", "--internal-layer must be 1 to 6"),
    ],
)
def test_bad_input_is_told_in_a_sentence(tmp_path, capsys, flags, sentence):
    assert trl_bupo.main(["--model", "tiny", "--out", str(tmp_path / "run"), *flags.format(out=tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def train_cases(folder: Path, weight_decay: float) -> str:
    """Train each of CASES and save the model. Weight decay moves every weight that has a gradient, be it zero.

    Returns the kind of model that was trained.
    """
    for number, case in enumerate(CASES):
        trainer, _ = trainer_of(folder / str(number), *case, weight_decay=weight_decay)
        trainer.train()
        trainer.save_model()
    return type(trainer.model_wrapped).__name__


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--mixed_precision", "no"]


KINDS = [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPQwen3ForCausalLM"), ("zero3", "DeepSpeedEngine")]


@pytest.mark.parametrize(("how", "kind"), KINDS)
def test_two_processes_train_as_one(tmp_path, how, kind):
    """Each with half the batch, with real gloo communication. No weight above l moves in phase 1."""
    if how == "zero3":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install deepspeed")
    wrap = ["--multi_gpu"] if how == "ddp" else ["--config_file", str(Path(__file__).with_name(f"{how}.yaml"))]
    command = [*LAUNCH, *wrap, "--main_process_port", "0", __file__, str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"2 processes with a {kind}" in done.stdout
    train_cases(tmp_path / "one", weight_decay=0.0 if how == "zero3" else 0.1)  # `BuPOConfig` allows none with ZeRO-3
    for number, (norm, tied, rollouts) in enumerate(CASES):
        case = f"norm {norm}, {'tied' if tied else 'untied'}, {rollouts} rollouts"
        start = small_model(tied)[0].state_dict()
        load = transformers.Qwen3ForCausalLM.from_pretrained
        one, two = (load(tmp_path / folder / str(number)).state_dict() for folder in ("one", "two"))
        for name in one:
            assert (one[name] - two[name]).abs().max() < 1e-5, (case, name)
            fixed = any(f".layers.{i}." in name for i in range(LAYER, 6))
            fixed = rollouts == 1 and (fixed or (name == "model.norm.weight" and norm == "none"))
            assert torch.equal(two[name], start[name]) == fixed, (case, name)


def take_for_gpus(state: PartialState, *args, start=PartialState.__init__, **settings) -> None:
    """PartialState.__init__, but two CPU processes count as two GPUs: accelerate offers FSDP for no others."""
    start(state, *args, **settings)
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":  # one of two processes
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState.__init__ = take_for_gpus
    model = train_cases(Path(sys.argv[1]), weight_decay=0.1)
    torch.distributed.destroy_process_group()
    print(f"{os.environ['WORLD_SIZE']} processes with a {model}", flush=True)
