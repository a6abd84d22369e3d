"""Ask a fine-tuned model to read an order: ``python demo/ask.py runs/demo/export/model "an order, in any words"``."""

from __future__ import annotations

import sys

from data import SYSTEM
from score import answer, load, render


def main(argv: list[str]) -> int:
    """Print the model's answer to a message."""
    if len(argv) != 2:
        print(f"ask: {__doc__}", file=sys.stderr)
        return 2
    model, tokenizer = load(argv[0])
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": argv[1]}]
    print(answer(model, tokenizer, [render(tokenizer, turns)])[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
