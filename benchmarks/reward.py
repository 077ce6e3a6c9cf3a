r"""How right is the reward? (pip install math-verify; no GPU; a few minutes)

How many re-spelled golds are accepted (should be all) and golds with one symbol changed (should be
none): ours on all of them, then ours and math-verify on a sample of 200, or as many as given. The
golds are those of the authors' problem files in ../shared/data; without them a few built-in ones.
"""

import multiprocessing
import random
import sys
from pathlib import Path

from math_verify import parse, verify

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import bupo
import test_bupo


def ours(answer: str, gold: str) -> bool:
    return bupo.math_reward(rf"\boxed{{{answer}}}", gold) == 1.0


def parse_and_verify(answer: str, gold: str) -> bool:
    return bool(verify(*(parse(rf"\boxed{{{text}}}") for text in (gold, answer))))


def math_verify(answer: str, gold: str) -> bool:
    """In a process of its own, since its own timeout does not end all calls; refuses on errors."""
    with multiprocessing.Pool(1) as pool:
        try:
            return pool.apply_async(parse_and_verify, (answer, gold)).get(timeout=10)
        except Exception:
            return False


def main(count: int) -> None:
    rng, golds = random.Random(0), [gold for _, gold in test_bupo.pairs(test_bupo.RIGHT)]
    golds = sorted(set(test_bupo.paper_golds() if test_bupo.PAPER_FILES.is_dir() else golds))
    spelled = [(text, gold) for gold in golds for text in test_bupo.respellings(gold)]
    changed = [(text, gold) for gold in golds for text in test_bupo.mutations(gold, rng)]
    for name, pairs in (("re-spelled golds", spelled), ("golds with one symbol changed", changed)):
        print(f"{len(pairs)} {name}, accepted: ours {sum(ours(*pair) for pair in pairs)}")
        sample = rng.sample(pairs, min(count, len(pairs)))
        for grader in (ours, math_verify):
            accepted = sum(grader(*pair) for pair in sample)
            print(f"{len(sample)} of them, accepted: {grader.__name__} {accepted}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
