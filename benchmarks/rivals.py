"""What bupo.py is measured against: the authors' update, transformers' sampling, TRL's trainer."""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import bupo

DEVICE, DTYPE = bupo.choose_device(bupo.Config())
GPU = DEVICE.type == "cuda"
PAGES = dict(page_size=64, max_batch_tokens=8192 if GPU else 512)  # of continuous batching


def plain_model(folder: str, dtype: torch.dtype) -> Any:
    """The model as transformers has it, without a checkpoint's top-k and top-p."""
    how = dict(dtype=dtype, attn_implementation="sdpa")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how).to(DEVICE)
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def authors_logps(model, ids: Tensor, mask: Tensor, layer: int, *rest: Any) -> tuple[Tensor, ...]:
    """log pi^l (N,) as in their code: all blocks, all hidden states, both full logit matrices.
    `bupo.update` also logs entropies: zeros in their place cost nothing."""
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    internal = bupo.policy_logits(model, out.hidden_states[layer])  # (B, T, V)
    both = [logits.float() for logits in (out.logits, internal)]  # pi's go unused
    logps = both[1][:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    logps = logps[mask[:, 1:]]  # (N,)
    return logps, torch.zeros_like(logps)


def authors_update(model, optimizer, sequences, advantages, layer, lr, config) -> None:
    """`bupo.update` their way, which scores the first mini-batch before its update, too."""
    first = sequences[: config.mini_batch * config.group_size]
    with torch.no_grad():
        authors_logps(model, *bupo.pad(first, model.device), layer)
    with mock.patch.object(bupo, "token_logps", authors_logps):
        bupo.update(model, optimizer, sequences, advantages, layer, lr, config)


def by_generate(model, prompts: list[list[int]], lengths: list[int], cache: str) -> list[int]:
    """`model.generate`, left-padded, which continues until the longest row is done."""
    width, limits = max(map(len, prompts)), torch.tensor(lengths, device=model.device)
    rows = [([0] * (width - len(p)) + p, [0] * (width - len(p)) + [1] * len(p)) for p in prompts]
    ids, mask = torch.tensor(rows, device=model.device).unbind(1)  # (n, T) each
    stop = [lambda ids, scores, **_: ids.shape[1] - width >= limits]
    how = dict(attention_mask=mask, stopping_criteria=transformers.StoppingCriteriaList(stop))
    if cache == "static":
        how |= dict(cache_implementation="static", disable_compile=not GPU)
    draw = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=max(lengths))
    out = model.generate(ids, **how, **draw)  # (n, T + new)
    return [min(n, out.shape[1] - width) for n in lengths]


def by_continuous_batching(model, prompts: list[list[int]], lengths: list[int]) -> list[int]:
    """The engine of `generate_batch`, which takes no length for each row, but here one can. Its
    cache is as large as all sequences: its default is most of the memory."""
    blocks = (sum(map(len, prompts)) + sum(lengths)) // 64 + 2 * len(prompts)
    cache = dict(PAGES, num_blocks=blocks)
    draw = dict(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    how = dict(generation_config=transformers.GenerationConfig(**draw))
    how["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**cache)
    got = {}
    with model.continuous_batching_context_manager(**how) as manager:
        asked = [dict(max_new_tokens=n, eos_token_id=-1) for n in lengths]
        names = [manager.add_request(p, **a) for p, a in zip(prompts, asked, strict=True)]
        while len(got) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                got[result.request_id] = len(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("Continuous batching stopped by itself.")
    return [got[name] for name in names]


def bupo_steps(turn: Any, s: dict[str, Any]) -> None:
    """Steps of `bupo.train` as plain GRPO. Rewards are 0, 1, 0, 1, ..., and no token is an end."""
    rewards, draw = itertools.cycle((0.0, 1.0)), bupo.problems_of_step
    bupo.problems_of_step = lambda *given: turn.begin() or draw(*given)
    bupo.log = lambda file, record: turn.end() or record
    given = [bupo.Problem(*p) for p in s["problems"]]
    bupo.load_problems = lambda _, limit, *__: given[:limit]
    bupo.math_reward, bupo.end_tokens = lambda *_: next(rewards), lambda *_: set()
    bupo.save_checkpoint = lambda *_: None
    size = {name: s[name] for name in ("prompts_per_step", "group_size", "mini_batch", "steps")}
    size |= dict(max_new_tokens=s["tokens"], max_prompt_tokens=256)
    how = dict(internal_steps=0, eval_problems=0, gradient_checkpointing=False)
    with tempfile.TemporaryDirectory() as out:
        bupo.train(bupo.Config(s["model"], **size, **how, out=out))


def trl_steps(turn: Any, s: dict[str, Any], continuous: bool) -> None:
    """The same steps by TRL's GRPOTrainer, with its own generation or continuous batching."""
    import datasets
    import trl

    updates = s["prompts_per_step"] // s["mini_batch"]
    # Continuous batching takes no minimum, so no token is the end; its default cache is too large.
    ends: dict[str, Any] = dict(eos_token_id=-1) if continuous else dict(min_new_tokens=s["tokens"])
    cache = dict(PAGES, num_blocks=128)
    generation = dict(generation_kwargs=ends, use_transformers_continuous_batching=continuous)
    generation |= dict(transformers_continuous_batching_config=cache if continuous else None)

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if any(len(ids) != s["tokens"] for ids in completion_ids):
            raise RuntimeError("TRL gave completions of other lengths than asked for.")
        return [float(i % 2) for i in range(len(completion_ids))]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            return None if state.global_step % updates else turn.begin()

        def on_step_end(self, args, state, control, **_):
            return None if state.global_step % updates else turn.end()

    size = dict(num_generations=s["group_size"], max_completion_length=s["tokens"])
    size |= dict(steps_per_generation=updates, max_steps=updates * s["steps"])
    size["per_device_train_batch_size"] = s["mini_batch"] * s["group_size"]
    method = dict(beta=0.0, loss_type="bnpo", top_k=0, learning_rate=1e-6)  # as ours
    how = dict(gradient_checkpointing=False, bf16=DTYPE.itemsize == 2, use_cpu=not GPU)
    quiet = dict(save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True)
    with tempfile.TemporaryDirectory() as out:
        trl.GRPOTrainer(
            model=plain_model(s["model"], torch.float32),
            reward_funcs=reward,
            args=trl.GRPOConfig(output_dir=out, **size, **method, **how, **quiet, **generation),
            train_dataset=datasets.Dataset.from_list([dict(prompt=p) for p, _ in s["problems"]]),
            processing_class=transformers.AutoTokenizer.from_pretrained(s["model"]),
            callbacks=[Clock()],
        ).train()
