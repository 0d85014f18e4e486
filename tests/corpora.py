"""Texts that tests make corpora and tokenizers of."""

import json
from pathlib import Path

SENTENCES = (
    "It was the best of times, it was the worst of times;",
    "we had everything before us, we had nothing before us.\n\n    def double(x):\n\t    return 2 * x  # 1234567",
    "春眠不觉晓、处处闻啼鸟。\n夜来风雨声、花落知多少。",
    "Ça va? Да, конечно! 😀😀 résumé naïve",
)


def documents(count: int) -> list[str]:
    return [f"{SENTENCES[i % 4]} {i} {SENTENCES[(i * 7 + 1) % 4]}" * (1 + i % 3) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path
