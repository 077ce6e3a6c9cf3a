r"""GRPO and BuPO on a real pretrained model, for a few steps on a CPU: small sums, each asked after one worked example.

    python benchmarks/real_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct       # or a folder; some minutes a run

Two runs of bupo.py that differ in --internal-steps alone. They are in runs/real-model; what they say is drawn to
assets/real-model.png. Held-out problems are none of the training problems.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXAMPLE = ("What is 14 + 3?", r"14 + 3 = \boxed{17}")
RUNS = {"grpo": ["--internal-steps", "0"], "bupo": ["--internal-steps", "4"]}


def problems() -> list[dict]:
    """All sums a + b of a from 1 to 20 and b from 1 to 9, shuffled, in the chat form that bupo.py reads."""
    sums = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    random.Random(0).shuffle(sums)
    question, worked = EXAMPLE
    shown = [dict(role="user", content=question), dict(role="assistant", content=worked)]
    return [dict(prompt=[*shown, dict(role="user", content=f"What is {a} + {b}?")], answer=str(a + b)) for a, b in sums]


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO and BuPO on a real model, on a CPU.")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--internal-layer", default="28", help="SmolLM2 has 30, and no boundary layer")
    parser.add_argument("--steps", default="12")
    parser.add_argument("--folder", type=Path, default=Path("runs/real-model"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = problems()
    for name, part in (("held-out", rows[:64]), ("training", rows[64:])):
        (options.folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = ["--model", options.model, "--steps", options.steps, "--internal-layer", options.internal_layer]
    settings += ["--dataset", str(options.folder / "training.jsonl"), "--system", "You are a careful calculator."]
    settings += [
        "--eval-dataset",
        str(options.folder / "held-out.jsonl"),
        "--eval-problems",
        "64",
        "--eval-every",
        "10",
    ]
    settings += ["--prompts", "4", "--mini-batch", "2", "--max-completion", "24", "--lr", "2e-5", "--no-recompute"]
    settings += ["--save-every", options.steps]
    for name, own in RUNS.items():
        out = options.folder / name
        where = ["--resume", str(out)] if (out / "config.json").exists() else ["--out", str(out), *settings, *own]
        if not (out / "model").exists():
            subprocess.run([sys.executable, str(ROOT / "bupo.py"), *where], check=True)
    runs = [str(options.folder / name) for name in RUNS]
    out = str(ROOT / "assets" / "real-model.png")
    subprocess.run([sys.executable, str(ROOT / "analyze.py"), "--runs", *runs, "--out", out], check=True)


if __name__ == "__main__":
    main()
