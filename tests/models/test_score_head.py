"""transformers as the oracle of rewards: the saved reward model scores padded batches as ours scores packed ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm3d.text.conversations import Message
from llm3d.text.templates import load_template
from llm3d.text.tokenizer import load_tokenizer
from tests import pool
from tests.models.adapted import trained_and_said_on_rank
from tests.stages.post_training import answer, comparisons, question, settings, write_model, write_rows

CONVERSATIONS = [
    [
        {"role": "user", "content": question(i)},
        {"role": "assistant", "content": answer(i) + " indeed" * (i % 3)},
    ]
    for i in range(7)
]
END, BEGIN, EOT = 281, 280, 286


def pad_token(directory: Path, token: str | None) -> None:
    """What the tokenizer's own settings say is its padding token."""
    file = directory / "tokenizer_config.json"
    stored = {name: value for name, value in json.loads(file.read_text()).items() if name != "pad_token"}
    file.write_text(json.dumps(stored if token is None else stored | {"pad_token": token}))


# The tokenizer's padding token, the model's, the template, and the layout that trains.
CASES: dict[str, tuple[str | None, dict[str, Any], str, int, dict[str, Any]]] = {
    "unset": (None, {}, "chatml", 1, {}),
    "end": ("<|end_of_text|>", {"pad_token_id": END}, "alpaca", 1, {}),
    "end of the tokenizer": (
        "<|end_of_text|>",
        {},
        "alpaca",
        2,
        {"parallel": {"tensor": 2, "sequence": True}},
    ),
    "end of many": ("<|eot_id|>", {"pad_token_id": EOT, "eos_token_id": [END, EOT]}, "llama3", 1, {}),
    "its own": ("<|im_start|>", {"pad_token_id": 282}, "llama3", 2, {"parallel": {"pipeline": 2}}),
    "tied": (None, {"tie_word_embeddings": True}, "llama3", 2, {"zero": {"stage": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_rewards_that_were_trained(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

    padding, changes, template, world_size, layout = CASES[case]
    base = write_model(tmp_path / "base", template, max_position_embeddings=512, **changes)
    pad_token(base, padding)
    train = write_rows(tmp_path / "train.jsonl", comparisons(8))
    data = {"sequence_length": 300}
    given = settings(base, train, tmp_path / "run", data=data, **layout)
    tokens = load_template("auto", load_tokenizer(base))
    ids = [tokens.encode([Message(**turn) for turn in turns]).tokens.tolist() for turns in CONVERSATIONS]
    ours = pool.run(trained_and_said_on_rank, world_size, "reward", given, ids)[-1]
    assert ours.std() > 1e-2, "the rewards differ"

    directory = tmp_path / "run/checkpoints/step-00000002/model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, report = AutoModelForSequenceClassification.from_pretrained(directory, output_loading_info=True)
    assert isinstance(model, LlamaForSequenceClassification) and model.num_labels == 1
    assert not any(report.values()), report
    # As users do: the tokenizer that was saved pads.
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs: Any = tokenizer.apply_chat_template(
            CONVERSATIONS, tokenize=True, padding=True, return_dict=True, return_tensors="pt"
        )
        mask = inputs["attention_mask"].bool()
        assert [row[kept].tolist() for row, kept in zip(inputs["input_ids"], mask, strict=True)] == ids
        torch.testing.assert_close(rewards(model, inputs), ours, rtol=1e-5, atol=1e-5)


def rewards(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, 0]
