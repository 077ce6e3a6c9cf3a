"""Steps of plain GRPO, by TRL's GRPOTrainer or by bupo.py: what `speed.py` compares, each in its own process.

    python benchmarks/trl_step.py '{"way": "bupo", "model": "FOLDER", "dataset": "FILE", ...}'

Both get the same model, problems, group, mini-batches and lengths: an end token ends no completion. The rewards are 0,
1, 0, 1, ... whatever was sampled, so that every completion has an advantage and takes part in the update. Checkpoints
and checking answers are left out. The last line it prints is JSON: the seconds of each step, and peak memory in bytes.
"""

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from measure import BFLOAT16, DEVICE, memory

import bupo


def alternating_rewards(completions: list, *_, **__) -> list[float]:
    return [float(i % 2) for i in range(len(completions))]


def bupo_seconds(s: dict) -> list[float]:
    """Seconds of each step of `bupo.train` with --internal-steps 0."""
    bupo.math_rewards = alternating_rewards
    bupo.end_tokens = lambda model, tokenizer: set()
    bupo.save_checkpoint = bupo.write_folder = lambda *_: None
    data = dict(model=s["model"], dataset=s["dataset"], train_problems=s["prompts"], eval_problems=0, system="")
    size = dict(prompts=s["prompts"], group=s["group"], mini_batch=s["mini_batch"], max_completion=s["tokens"])
    size["max_prompt"] = s["max_prompt"]
    with tempfile.TemporaryDirectory() as out:
        bupo.train(bupo.Config(**data, **size, internal_steps=0, steps=s["steps"], recompute=False, out=out))
        return [json.loads(line)["seconds"] for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def trl_settings(s: dict) -> dict:
    """GRPOConfig for the same work: in the `trl` way its default generation, else continuous batching."""
    generation = dict(generation_kwargs=dict(min_new_tokens=s["tokens"]))
    if s["way"] == "trl continuous":
        # Its engine takes no minimum, so no token id is the end. Its default cache is 60 % of a CPU's memory.
        cache = dict(num_blocks=128, page_size=64, max_batch_tokens=512) if DEVICE.type == "cpu" else {}
        generation = dict(use_transformers_continuous_batching=True, transformers_continuous_batching_config=cache)
        generation["generation_kwargs"] = dict(eos_token_id=-1)
    updates = s["prompts"] // s["mini_batch"]
    return dict(
        per_device_train_batch_size=s["mini_batch"] * s["group"],
        gradient_accumulation_steps=1,
        steps_per_generation=updates,
        max_steps=updates * s["steps"],
        num_generations=s["group"],
        max_completion_length=s["tokens"],
        num_iterations=1,
        beta=0.0,
        epsilon=0.2,
        loss_type="bnpo",  # the mean over a mini-batch's tokens, as bupo.py's
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=BFLOAT16,
        **generation,
    )


def trl_seconds(s: dict) -> list[float]:
    """Seconds of each step: a rollout and all its updates, from one end of a step to the next."""
    import datasets
    import trl

    model, tokenizer = bupo.load_model(s["model"], DEVICE)
    problems = [dict(prompt=p.messages) for p in bupo.load_problems(s["dataset"], system="")]
    ends = []

    def rewards(completion_ids: list[list[int]], **_) -> list[float]:
        if any(len(ids) != s["tokens"] for ids in completion_ids):
            raise RuntimeError("TRL gave completions of other lengths than asked for.")
        return alternating_rewards(completion_ids)

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            ends.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        quiet = dict(output_dir=out, save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
        settings = trl.GRPOConfig(**trl_settings(s), **quiet, use_cpu=DEVICE.type == "cpu")
        parts = dict(
            train_dataset=datasets.Dataset.from_list(problems), processing_class=tokenizer, callbacks=[Clock()]
        )
        trl.GRPOTrainer(model=model, reward_funcs=rewards, args=settings, **parts).train()
    ends = ends[:: s["prompts"] // s["mini_batch"]]
    return [after - before for before, after in itertools.pairwise(ends)]


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    seconds = bupo_seconds(settings) if settings["way"] == "bupo" else trl_seconds(settings)
    print(json.dumps(dict(seconds=seconds, peak=memory(peak=True))))
