"""How long the reward takes: 1,024 completions of about 4 kB, fair ones and with 5 % hostile ones.

python benchmarks/reward.py
"""

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bupo

GOLDS = [
    "5",
    "-3",
    r"\frac{3}{4}",
    r"2\sqrt{3}",
    "Yes",
    r"(3,\frac{\pi}{2})",
    "x^2+2x+1",
    r"\infty",
    "[0,1)",
    "1,2,3",
    "e^{-1}",
]
HOSTILE = [
    "9^{9^{9^{%d}}}",
    "(10^{%d})!",
    "10^{10^{%d}}",
    r"\binom{10^{%d}}{10^5}",
    r"\int_0^{%d} x^{x^x} dx",
    "%d^{%d^{99}}",
]


def completions(hostile: float, rng: random.Random) -> tuple[list[str], list[str]]:
    """1,024 texts with a box at the end: about half right, in other spellings, the rest wrong; and their golds."""
    texts, golds = [], []
    for i in range(1024):
        gold = rng.choice(GOLDS)
        given = rng.choice([gold, rf"\text{{{gold}}}", gold.replace("frac", "dfrac"), f"{gold}+{rng.randint(1, 99)}"])
        if rng.random() < hostile:
            shape = rng.choice(HOSTILE)
            given = shape % ((i + 20,) * shape.count("%d"))
        texts.append("We work it out step by step. " * 140 + rf"\boxed{{{given}}}")
        golds.append(gold)
    return texts, golds


if __name__ == "__main__":
    rng = random.Random(0)
    bupo.math_reward(r"\boxed{x+x}", "2x")  # starts a checker, which is not what is timed
    for hostile in (0.0, 0.05):
        texts, golds = completions(hostile, rng)
        bupo.same_value.cache_clear()
        began = time.perf_counter()
        rewards = bupo.math_rewards(texts, golds)
        seconds = time.perf_counter() - began
        print(f"{hostile:4.0%} hostile: {seconds:5.1f} s for 1,024 completions, {sum(rewards):.0f} right")
