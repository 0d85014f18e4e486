"""Generate text from a checkpoint, from Python.

    python examples/generate.py RUN "Once upon a time" [section.key=value ...]

RUN is a run directory, a checkpoint, or a Hugging Face directory.
"""

from __future__ import annotations

import sys

from llm3d import api


def main() -> None:
    path, prompt, *overrides = sys.argv[1:]
    (replies,) = api.generate(path, [prompt], overrides)
    for reply in replies:
        print(prompt + reply)


if __name__ == "__main__":
    main()
