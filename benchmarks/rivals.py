"""What bupo.py is measured against: the authors' way to update, and transformers' ways to sample."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from torch import Tensor

import bupo


def authors_logps(model: bupo.Model, ids: Tensor, mask: Tensor, layer: int, temperature: float) -> Tensor:
    """log pi^l as the authors' code gets it: all blocks, all hidden states, both matrices of logits, every token."""
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    internal = model.get_output_embeddings()(model.get_decoder().norm(out.hidden_states[layer]))  # (B, T, V)
    both = [logits.float() / temperature for logits in (out.logits, internal)]  # pi's are made and not used
    logps = both[1][:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]  # (B, T-1)
    return logps[mask[:, 1:]]  # (N,)


def authors_update(model, optimizer, sequences, advantages, layer: int, config: bupo.Config, bfloat16: bool) -> None:
    """`bupo.update` the authors' way, with the same mini-batches and micro-batches."""
    model.train()
    size = config.mini_batch * config.group
    autocast, old = torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16), {}
    for begin in range(0, len(sequences), size):
        for micro in bupo.micro_batches(sequences[begin : begin + size], config.micro_tokens):
            with torch.no_grad(), autocast:
                batch = bupo.pad([sequences[begin + i] for i in micro], model.device)
                old[begin, tuple(micro)] = authors_logps(model, *batch, layer, config.temperature)
    for begin in range(0, len(sequences), size):
        tokens = sum(len(completion) for _, completion in sequences[begin : begin + size])
        for micro in bupo.micro_batches(sequences[begin : begin + size], config.micro_tokens):
            chosen = [begin + i for i in micro]
            counts = torch.tensor([len(sequences[i][1]) for i in chosen])  # (B,)
            advantage = advantages[chosen].repeat_interleave(counts).to(model.device)  # (N,)
            with autocast:
                batch = bupo.pad([sequences[i] for i in chosen], model.device)
                logps = authors_logps(model, *batch, layer, config.temperature)
            surrogate = bupo.clipped_surrogate(logps, old[begin, tuple(micro)], advantage, config.clip)
            (-surrogate.sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()


def by_generate(model, prompts, lengths, cache: str) -> list[int]:
    """`model.generate`, left-padded, which goes on until the longest row is done."""
    width, limits = max(map(len, prompts)), torch.tensor(lengths, device=model.device)
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)  # (n, T)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    done = transformers.StoppingCriteriaList([lambda ids, scores, **_: ids.shape[1] - width >= limits])
    how = dict(do_sample=True, top_k=0, top_p=1.0, pad_token_id=0, max_new_tokens=max(lengths))
    how |= dict(cache_implementation="static", disable_compile=model.device.type == "cpu") if cache == "static" else {}
    out = model.generate(ids, attention_mask=mask, stopping_criteria=done, **how)  # (n, T + new)
    return [min(n, out.shape[1] - width) for n in lengths]


def by_continuous_batching(model, prompts, lengths) -> list[int]:
    """transformers' continuous batching, with a cache that holds every sequence; 60 % of memory is its default."""
    total = sum(map(len, prompts)) + sum(lengths)
    small = dict(page_size=64, num_blocks=total // 64 + 2 * len(prompts), max_batch_tokens=512)
    cache = small if model.device.type == "cpu" else dict(max_memory_percent=0.5)
    how = transformers.ContinuousBatchingConfig(**cache)
    draws = transformers.GenerationConfig(do_sample=True, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0)
    hints = dict(generation_config=draws, continuous_batching_config=how)
    got = {}
    with model.continuous_batching_context_manager(**hints) as manager:
        asked = zip(prompts, lengths, strict=True)
        names = [manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1) for prompt, n in asked]
        while len(got) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                got[result.request_id] = len(result.generated_tokens)
            elif not manager.is_running():
                raise RuntimeError("Continuous batching stopped by itself.")
    return [got[name] for name in names]
