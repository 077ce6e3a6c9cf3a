"""BuPO inside TRL's GRPOTrainer: DDP, FSDP, ZeRO-3 and vLLM are theirs, the objective is that of bupo.py.

    accelerate launch --config_file scale/fsdp.yaml scale/trl_bupo.py --model Qwen/Qwen3-8B --internal-layer 6 --out x

Three things change in GRPOTrainer: the layer whose policy is scored, the advantage, and the denominator of the loss.
All else is configuration: the defaults of `BuPOConfig`, and `trainer_config`, which puts our settings in TRL's words.
"""

import argparse
import contextlib
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import bupo
from bupo import Config, UsageError, encode, first_layers, group_advantages, math_rewards, optimised_layer

try:
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    print(f"trl_bupo.py: {error}; run pip install -r scale/requirements.txt.", file=sys.stderr)
    sys.exit(2)


@dataclass
class BuPOConfig(GRPOConfig):
    """GRPOConfig with phase 1, and with defaults under which GRPOTrainer climbs bupo.py's objective."""

    internal_layer: int = 1  # l, from 1
    internal_steps: int = 30  # rollouts whose updates optimise pi^l; 0 is GRPO
    internal_norm: str = "final"  # or none
    scale_rewards: str = "none"  # TRL would divide by std + 1e-4; `BuPOTrainer` divides by std + 1e-6
    loss_type: str = "dapo"  # the mean over tokens; "grpo" is the mean over completions
    lr_scheduler_type: str = "constant"
    disable_dropout: bool = True
    ddp_find_unused_parameters: bool = True  # DDP would else wait for the gradients of the blocks above l

    def __post_init__(self):
        super().__post_init__()
        if self.deepspeed_plugin:  # it hands AdamW zeros, not None, for the blocks above l: decay would move them
            self.weight_decay = 0.0


class BuPOTrainer(GRPOTrainer):
    """GRPOTrainer whose first `internal_steps` rollouts optimise pi^l. Prompts are token ids. For training only."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.layer = self.num_layers = len(self.accelerator.unwrap_model(self.model).get_decoder().layers)

    def _tokenize_prompts(self, prompts):
        return prompts, None, {}  # bupo.encode has applied the chat template

    def _generate_and_score_completions(self, inputs):
        """A rollout: choose the layer that all its updates optimise, and turn R - mean, TRL's, into our advantage."""
        updates = max(1, self.args.steps_per_generation * self.num_iterations // self.args.gradient_accumulation_steps)
        step, phase_1 = 1 + self.state.global_step // updates, (self.args.internal_steps, self.args.internal_layer)
        self.layer = optimised_layer(step, *phase_1, self.num_layers)
        self._metrics["train"]["layer"].append(self.layer)
        # vLLM's correction weighs tokens by pi of the trainer / pi of vLLM, which says nothing about pi^l.
        correction = self.args.vllm_importance_sampling_correction and self.layer == self.num_layers
        self.vllm_importance_sampling_correction = correction

        output = super()._generate_and_score_completions(inputs)
        centred = self.accelerator.gather(output["advantages"]).view(-1, self.num_generations)  # (problems, group)
        advantages = group_advantages(centred).flatten().chunk(self.accelerator.num_processes)
        return {**output, "advantages": advantages[self.accelerator.process_index]}

    def _get_per_token_logps_and_entropies(self, model, *args, **settings):
        """log pi^l, new and old alike: `model` without its upper blocks, called through DDP or FSDP as ever."""
        with policy_of_layer(self.accelerator.unwrap_model(model), self.layer, self.args.internal_norm == "final"):
            return super()._get_per_token_logps_and_entropies(model, *args, **settings)

    def _prepare_inputs(self, generation_batch):
        """The denominator: the tokens of this update, of all processes. TRL's is the mean over a rollout's updates."""
        inputs = super()._prepare_inputs(generation_batch)
        size, rollout = self.args.gradient_accumulation_steps, self.args.steps_per_generation  # micro-batches
        first = self._step % rollout // size * size
        own = sum(micro["completion_mask"].sum() for micro in self._buffered_inputs[first : first + size])
        return {**inputs, "num_items_in_batch": self.accelerator.reduce(own, "sum") * rollout / size}


@contextlib.contextmanager
def policy_of_layer(model, layer: int, norm: bool):
    """`first_layers`, but an unwanted norm runs as the identity: FSDP gathers lm_head when the norm is called."""
    final_norm = model.get_decoder().norm
    forward = final_norm.forward
    if not norm and layer < len(model.get_decoder().layers):
        final_norm.forward = lambda hidden: hidden
    try:
        with first_layers(model, layer):
            yield
    finally:
        final_norm.forward = forward


def micro_batches(config: Config, size: int, processes: int) -> int:
    """How many micro-batches of `size` sequences each process has in an update."""
    sequences = config.mini_batch * config.group
    if size < 1 or sequences % (size * processes):
        total = f"--mini-batch times --group, {sequences}"
        raise UsageError(f"--micro-batch {size} times the number of processes, {processes}, must divide {total}.")
    if config.internal_steps and config.internal_layer == "auto":
        raise UsageError("--internal-layer must be a number here; python analyze.py --model MODEL finds one.")
    return sequences // (size * processes)


def trainer_config(config: Config, size: int, processes: int, vllm: str = "off") -> BuPOConfig:
    """bupo.py's settings in TRL's words. A step of ours is a rollout: prompts / mini_batch updates, TRL's steps."""
    count, updates = micro_batches(config, size, processes), config.prompts // config.mini_batch
    layer = int(config.internal_layer) if config.internal_steps else 1
    phase_1 = dict(internal_layer=layer, internal_steps=config.internal_steps, internal_norm=config.internal_norm)
    batch = dict(per_device_train_batch_size=size, gradient_accumulation_steps=count, num_generations=config.group)
    draws = dict(max_completion_length=config.max_completion, temperature=config.temperature)
    engine = dict(use_vllm=vllm != "off", vllm_mode="server" if vllm == "server" else "colocate")
    adam = dict(learning_rate=config.lr, adam_beta1=config.beta1, adam_beta2=config.beta2)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    log = dict(logging_steps=updates, save_steps=config.save_every * updates, save_total_limit=config.keep or None)
    return BuPOConfig(
        **(phase_1 | batch | draws | engine | adam | log),
        max_steps=config.steps * updates,
        steps_per_generation=count * updates,
        loss_type="dapo" if config.average == "token" else "grpo",
        epsilon=config.clip,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_clip,
        gradient_checkpointing=config.recompute,
        bf16=config.precision == "bfloat16" or (config.precision == "auto" and on_gpu),
        use_cpu=config.device == "cpu",
        seed=config.seed,
        output_dir=config.out,
        report_to="none",
    )


def train(config: Config, size: int, vllm: str, resume: str | None) -> None:
    """Train as `config` says; --out then holds TRL's checkpoints, trainer_state.json (the log) and model/."""
    processes, out = int(os.environ.get("WORLD_SIZE", 1)), Path(config.out)
    micro_batches(config, size, processes)  # before anything slow
    if not config.out:
        raise UsageError("Name a new or empty folder with --out.")
    if config.device not in ("auto", "cpu"):
        raise UsageError(f"--device must be auto or cpu, not {config.device}: each process gets its own GPU.")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in bupo.py
    bupo.run_folder(config, bool(resume))
    if resume and not bupo.checkpoints(out):
        raise UsageError(f"There is no checkpoint in {out}; start anew with --out.")
    model, tokenizer = bupo.load_model(config.model)  # before TrainingArguments, under which ZeRO-3 would load parts
    bupo.check_against_model(config, model, tokenizer)
    problems = bupo.usable_problems(config.dataset, config.train_problems, tokenizer, config)
    if len(problems) < config.prompts:
        raise UsageError(f"{config.dataset} has {len(problems)} usable problems; lower --prompts, {config.prompts}.")
    rows = [dict(prompt=encode(tokenizer, p, config.thinking), answer=p.answer) for p in problems]

    def reward(completion_ids, answer, **_):
        return math_rewards(tokenizer.batch_decode(completion_ids, skip_special_tokens=True), answer)

    args = trainer_config(config, size, processes, vllm)
    trainer = BuPOTrainer(model, reward, args, Dataset.from_list(rows), processing_class=tokenizer)
    if trainer.is_world_process_zero():
        bupo.prepare_folder(out, config, {})
    trainer.train(resume_from_checkpoint=bool(resume))
    trainer.save_state()
    trainer.save_model(str(out / "model"))
    trainer.accelerator.end_training()  # the processes part in good order


NOT_HERE = """eval_dataset eval_every eval_problems eval_k eval_temperature lr_ramp rows micro_tokens head_tokens
warm_up_steps"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence for what the user can mend."""
    parser = argparse.ArgumentParser(description="BuPO on several GPUs: flags of bupo.py, and three more.")
    for f in (f for f in fields(Config) if f.name not in NOT_HERE.split()):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar="")
        text = f"{f.metadata['help']} [{f.metadata['other']}]".replace("%", "%%")
        default = dict(required=True) if f.name == "model" else dict(default=argparse.SUPPRESS)
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **default, **kind)
    parser.add_argument("--micro-batch", metavar="", type=int, default=8, help="sequences per process and pass [8]")
    parser.add_argument("--vllm", choices=("off", "colocate", "server"), default="off", help="vLLM's rollouts [off]")
    parser.add_argument("--resume", metavar="", help="folder of a run to go on with; give its other flags again")
    given = vars(parser.parse_args(arguments))
    own = [given.pop(name) for name in ("micro_batch", "vllm", "resume")]
    given |= dict(out=own[-1]) if own[-1] else {}
    try:
        if os.environ.get("RANK", "0") == "0":
            train(Config(**given), *own)
        else:  # one process speaks for all
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                train(Config(**given), *own)
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"trl_bupo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
