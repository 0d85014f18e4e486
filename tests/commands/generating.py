"""`llm3d generate`, and what transformers writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from typer.testing import CliRunner

from llm3d.cli import app
from tests.stages.common import Ended, Settings

NEW_TOKENS = 12


def generate(given: Settings, directory: Path, *words: str, typed: str = "") -> Ended:
    (directory / "config.yaml").write_text(yaml.safe_dump(given))
    result = CliRunner().invoke(app, ["generate", str(directory / "config.yaml"), *words], input=typed)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


def by_transformers(model: Path, messages: list[dict[str, str]] | str) -> tuple[str, str]:
    """The reply to messages, or the continuation of a text; and why it ended."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer, network = AutoTokenizer.from_pretrained(model), LlamaForCausalLM.from_pretrained(model)
    if isinstance(messages, str):
        ids, ends = tokenizer(messages, return_tensors="pt")["input_ids"], [tokenizer.eos_token_id]
    else:
        asked: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids = torch.tensor([asked["input_ids"]])
        ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    out = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )
    tokens = out[0, ids.shape[1] :].tolist()
    text: Any = tokenizer.decode(tokens, skip_special_tokens=True)
    return text, "stop" if tokens[-1] in ends else "length"


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
