r"""Make the model and the task of this folder: python tiny/make.py (two minutes on one core).

Others, to see how much depends on the base model: python tiny/make.py --seed 1 --out base-1

The task: 3 or 4 additions and subtractions of digits, from left to right in 0..20. The model: a
Qwen3 of 6 blocks, 327 thousand parameters, whose tokens are characters and \boxed{. It is taught
what an answer looks like, so that RL has some reward to learn from: 40 % of its examples work the
problem out, 60 % are careless: \boxed{n} at once, n off by up to 3. Which of the two pays is for RL
to find out: accuracy and length rise together.
"""

import argparse
import json
import math
import shutil
import sys
import zlib
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from tqdm import tqdm

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))
from bupo import Problem, encode, extract_boxed, pad, token_logps  # noqa: E402


def arithmetic(heldout: bool) -> dict[str, str]:
    r"""Questions and worked solutions: '7-1+3' -> '7-1=6;6+3=9\boxed{9}'. A guess is rarely right;
    writing down the partial results makes it easy. About an eighth of the questions is held out."""
    rng = Random(0)
    solutions: dict[str, str] = {}
    while len(solutions) < 20000:
        value = rng.randint(1, 9)
        question, lines = str(value), []
        for _ in range(rng.choice((3, 4))):
            digit = rng.randint(1, 9)
            change = rng.choice([x for x in (digit, -digit) if 0 <= value + x <= 20])
            lines.append(f"{value}{change:+d}={value + change}")
            question, value = f"{question}{change:+d}", value + change
        solutions[question] = ";".join(lines) + rf"\boxed{{{value}}}"
    return {q: s for q, s in solutions.items() if (zlib.crc32(q.encode()) % 8 == 0) == heldout}


def new_model(seed: int) -> tuple:
    """A model with random weights, and its tokenizer."""
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    tokens = [*special, r"\boxed{", "\n", *map(chr, range(32, 127))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(special)
    backend.add_tokens([r"\boxed{"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    config = transformers.Qwen3Config(vocab_size=len(tokens), num_hidden_layers=6, hidden_size=64)
    config.intermediate_size, config.num_attention_heads, config.head_dim = 192, 4, 16
    config.num_key_value_heads, config.max_position_embeddings = 4, 512
    config.tie_word_embeddings, config.initializer_range = True, 0.08
    config.pad_token_id, config.eos_token_id = 0, 1
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(config).eval(), tokenizer


def pretrain(model, tokenizer, steps: int, seed: int) -> None:
    """Supervised learning on careful and careless solutions."""
    rng, solutions = Random(seed), list(arithmetic(False).items())
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in tqdm(range(1, steps + 1), "pretraining"):
        batch = []
        for question, worked in rng.sample(solutions, 32):
            guess = max(0, int(extract_boxed(worked)) + rng.randint(-3, 3))
            text = worked if rng.random() < 0.4 else rf"\boxed{{{guess}}}"
            prompt = encode(tokenizer, Problem([dict(role="user", content=question)], ""))
            batch.append((prompt, [*tokenizer(text).input_ids, tokenizer.eos_token_id]))
        logps, _ = token_logps(model, *pad(batch, "cpu"), len(model.model.layers))
        (-logps.mean()).backward()
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, step / 50) * cosine
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a model folder like tiny/ itself.")
    parser.add_argument("--seed", type=int, default=0, help="of weights and examples, not of data")
    parser.add_argument("--out", type=Path, default=TINY, help="the folder to write [tiny/ itself]")
    args = parser.parse_args()
    if args.out.resolve() != TINY and args.out.exists():
        sys.exit(f"make.py: {args.out} is there already; remove it, or give another --out.")
    if args.seed and args.out.resolve() == TINY:
        sys.exit("make.py: tiny/ itself has seed 0; give --out for another one.")
    torch.set_num_threads(1)  # more make so small a model slower
    model, tokenizer = new_model(args.seed)
    pretrain(model, tokenizer, steps=700, seed=args.seed)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    if args.out.resolve() != TINY:
        shutil.copy(TINY / "settings.json", args.out)
    for name, heldout, count in (("train", False, 4000), ("heldout", True, 1000)):
        rows = [
            dict(question=question, answer=int(extract_boxed(solution)))
            for question, solution in list(arithmetic(heldout).items())[:count]
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(text)


if __name__ == "__main__":
    main()
