"""BuPO inside TRL's GRPOTrainer: DDP, FSDP, ZeRO-3 and vLLM are TRL's, the objective is bupo.py's.

    accelerate launch --config_file scale/fsdp.yaml scale/trl_bupo.py --model Qwen/Qwen3-8B \
        --internal-layer 6 --out runs/x

Four things change in GRPOTrainer: the layer whose policy is scored, the advantage, the denominator
of the loss, and the tokens that end a completion. All else is configuration: the defaults of
`BuPOConfig`, and `trainer_config`, which says our settings in TRL's words.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import bupo
from bupo import Config, UsageError, encode, group_advantages, math_reward, optimized_layer

try:
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    print(f"trl_bupo.py: {error}; run pip install -r scale/requirements.txt.", file=sys.stderr)
    sys.exit(2)


@dataclass
class BuPOConfig(GRPOConfig):
    """GRPOConfig with phase 1; under its defaults GRPOTrainer maximizes bupo.py's objective."""

    internal_layer: int = 1  # l, from 1
    internal_steps: int = 30  # rollouts whose updates optimize pi^l; 0 is GRPO
    internal_norm: str = "final"  # or none
    scale_rewards: str = "none"  # TRL divides by std + 1e-4; `BuPOTrainer` divides by std + 1e-6
    loss_type: str = "dapo"  # the mean over tokens; "grpo" is the mean over completions
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.01
    disable_dropout: bool = True
    ddp_find_unused_parameters: bool = True  # else DDP waits for gradients of the blocks above l

    def __post_init__(self):
        super().__post_init__()
        if self.deepspeed_plugin:  # AdamW gets zeros, not None, above l: decay would move weights
            self.weight_decay = 0.0


class BuPOTrainer(GRPOTrainer):
    """GRPOTrainer whose first `internal_steps` rollouts optimize pi^l.

    Prompts are token ids. For training only: it has no evaluation.
    """

    def __init__(self, model, reward, args, data, tokenizer):
        ends = sorted(bupo.end_tokens(model, tokenizer))  # TRL alone would not know all of them
        model.generation_config.eos_token_id = ends
        if args.use_vllm:  # which ends where the files of the model say, and at these
            args.generation_kwargs = dict(stop_token_ids=ends)
        super().__init__(model, reward, args, data, processing_class=tokenizer)
        blocks = self.accelerator.unwrap_model(self.model).get_decoder().layers
        self.layer = self.num_layers = len(blocks)

    def _tokenize_prompts(self, prompts):
        return prompts, None, {}  # bupo.encode has applied the chat template

    def _generate_and_score_completions(self, inputs):
        """A rollout: choose the layer that all its updates optimize, and normalize R - mean."""
        size = self.args.gradient_accumulation_steps
        updates = max(1, self.args.steps_per_generation * self.num_iterations // size)
        step, phase_1 = self.state.global_step // updates + 1, self.args.internal_steps
        self.layer = optimized_layer(step, phase_1, self.args.internal_layer, self.num_layers)
        self._metrics["train"]["layer"].append(self.layer)
        # vLLM's correction weighs tokens by pi of the trainer / pi of vLLM: no statement on pi^l.
        correct = self.args.vllm_importance_sampling_correction and self.layer == self.num_layers
        self.vllm_importance_sampling_correction = correct

        output = super()._generate_and_score_completions(inputs)
        centered = self.accelerator.gather(output["advantages"])  # R - mean, of all processes
        advantages = group_advantages(centered.view(-1, self.num_generations)).flatten()
        own = advantages.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        return {**output, "advantages": own}

    def _get_per_token_logps_and_entropies(self, model, *args, **settings):
        """log pi^l, new and old: TRL's, of a model without its upper blocks."""
        norm = self.args.internal_norm == "final"
        with first_layers(self.accelerator.unwrap_model(model), self.layer, norm):
            return super()._get_per_token_logps_and_entropies(model, *args, **settings)

    def _prepare_inputs(self, generation_batch):
        """The denominator: the tokens of this update. TRL's is the mean over a rollout's."""
        inputs = super()._prepare_inputs(generation_batch)
        size, rollout = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        first = self._step % rollout // size * size  # of the update's micro-batches
        micros = self._buffered_inputs[first : first + size]
        own = sum(micro["completion_mask"].sum() for micro in micros)
        tokens = self.accelerator.reduce(own, "sum")  # of all processes
        return {**inputs, "num_items_in_batch": tokens * rollout / size}


@contextlib.contextmanager
def first_layers(model, layer: int, norm: bool) -> Iterator[None]:
    """Inside, a forward pass of `model`, also through DDP or FSDP, is that of pi^layer.

    It has the first `layer` blocks, and below the top a final norm only if `norm`. An unwanted norm
    is called all the same, as the identity: FSDP gathers lm_head when it is. A backward pass may
    follow outside.
    """
    decoder = model.get_decoder()
    blocks, final_norm = decoder.layers, decoder.norm
    forward = final_norm.forward
    decoder.layers = blocks[:layer]
    if not norm and layer < len(blocks):
        final_norm.forward = lambda hidden: hidden
    try:
        yield
    finally:
        decoder.layers, final_norm.forward = blocks, forward


def own_norms(model) -> None:
    """Give norms their own forward pass again: bupo.py's holds on to weights that FSDP replaces."""
    for module in model.modules():
        vars(module).pop("forward", None)


def micro_batches(config: Config, size: int, processes: int) -> int:
    """How many micro-batches of `size` sequences each process has in an update."""
    sequences = config.mini_batch * config.group_size
    if size < 1 or sequences % (size * processes):
        problem = f"--micro-batch {size} times the number of processes, {processes}"
        raise UsageError(f"{problem}, must divide --mini-batch times --group-size, {sequences}.")
    if config.internal_steps and config.internal_layer == "auto":
        fix = "python analyze.py --model MODEL finds one"
        raise UsageError(f"--internal-layer must be a number here; {fix}.")
    return sequences // (size * processes)


def trainer_config(config: Config, size: int, processes: int, vllm: str = "off") -> BuPOConfig:
    """bupo.py's settings in TRL's words; a step of ours is a rollout, TRL's is an update."""
    count = micro_batches(config, size, processes)
    updates = config.prompts_per_step // config.mini_batch
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return BuPOConfig(
        internal_layer=int(config.internal_layer) if config.internal_steps else 1,
        internal_steps=config.internal_steps,
        internal_norm=config.internal_norm,
        loss_type="dapo" if config.loss_average == "token" else "grpo",
        epsilon=config.clip,
        num_generations=config.group_size,
        temperature=config.temperature,
        max_completion_length=config.max_new_tokens,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=count,
        steps_per_generation=count * updates,
        max_steps=config.steps * updates,
        learning_rate=config.lr,
        max_grad_norm=bupo.GRAD_CLIP,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.precision == "bfloat16" or (config.precision == "auto" and on_gpu),
        use_cpu=config.device == "cpu",
        use_vllm=vllm != "off",
        vllm_mode="server" if vllm == "server" else "colocate",
        logging_steps=updates,
        save_steps=config.save_every * updates,
        save_total_limit=config.keep or None,
        seed=config.seed,
        output_dir=config.out,
        report_to="none",
    )


def train(config: Config, size: int, vllm: str, resume: bool) -> None:
    """Train as `config` says; --out gets settings.json, TRL's checkpoints and trainer_state.json.
    The last checkpoint is the model."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    micro_batches(config, size, processes)  # before anything slow
    if not config.out:
        raise UsageError("Name a new or empty folder with --out.")
    if config.device not in ("auto", "cpu"):
        fix = "each process gets its own GPU"
        raise UsageError(f"--device must be auto or cpu, not {config.device}: {fix}.")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in bupo.py
    if config.threads:
        torch.set_num_threads(config.threads)
    bupo.run_folder(config, resume)
    # Before TrainingArguments, under which ZeRO-3 would load parts.
    model, tokenizer = bupo.load_model(config.model)
    own_norms(model)
    _, problems = bupo.usable_problems(replace(config, eval_problems=0), model, tokenizer)
    if len(problems) < config.prompts_per_step:
        found = f"{config.dataset} has {len(problems)} usable problems"
        raise UsageError(f"{found}; lower --prompts-per-step, {config.prompts_per_step}.")
    rows = [dict(prompt=encode(tokenizer, p), answer=p.answer) for p in problems]

    def reward(completion_ids, answer, **_):
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        return [math_reward(text, gold) for text, gold in zip(texts, answer, strict=True)]

    args = trainer_config(config, size, processes, vllm)
    data = Dataset.from_list(rows)
    trainer = BuPOTrainer(model, reward, args, data, tokenizer)
    if trainer.is_world_process_zero():
        bupo.write_settings(config)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    trainer.accelerator.end_training()  # the processes part in good order


NOT_HERE = """eval_dataset eval_every eval_problems eval_k lr_warmup_steps rollout_rows
micro_batch_tokens optimizer_device"""


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one sentence for what the user can fix."""
    parser = argparse.ArgumentParser(description="BuPO on several GPUs: bupo.py's flags, 3 more.")
    for f in (f for f in fields(Config) if f.name not in NOT_HERE.split()):
        kind = dict(type=type(f.default), metavar="")
        if isinstance(f.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        text = f"{f.metadata['help']} [{f.default}]".replace("%", "%%")  # as argparse wants it
        name = "--" + f.name.replace("_", "-")
        parser.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)
    text = "sequences per process and pass [8]"
    parser.add_argument("--micro-batch", metavar="", type=int, default=8, help=text)
    engines = "off", "colocate", "server"
    parser.add_argument("--vllm", choices=engines, default="off", help="vLLM's rollouts [off]")
    text = "folder of a run; flags given change it; --micro-batch and --vllm again"
    parser.add_argument("--resume", metavar="", help=text)
    given = vars(parser.parse_args(arguments))
    size, vllm, folder = given.pop("micro_batch"), given.pop("vllm"), given.pop("resume")
    first = os.environ.get("RANK", "0") == "0"  # the process that speaks for all
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.ExitStack() as stack:
            if not first:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            if folder:
                config = Config(**{**bupo.read_settings(folder), **given, "out": folder})
            else:
                config = bupo.configure(**given)
            train(config, size, vllm, bool(folder))
    except UsageError as error:
        if first:
            print(f"trl_bupo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
