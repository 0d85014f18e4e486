"""What is exported is the model that was trained: transformers and PEFT give the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.text.tokenizer import load_tokenizer
from tests import pool
from tests.closeness import assert_same_logits
from tests.stages.common import Ended, command
from tests.stages.post_training import (
    comparisons,
    conversations,
    settings,
    train_on_rank,
    write_model,
    write_rows,
)

TOKENS = torch.arange(2, 200, 9)[None]
ADAPTERS: dict[str, dict[str, Any]] = {
    "sft": {"rank": 4},
    "dpo": {"rank": 3, "alpha": 5, "rslora": True, "targets": ["q_proj", "v_proj", "down_proj"]},
    "reward": {"rank": 4, "alpha": 16},
}


def export(*words: object) -> Ended:
    result = CliRunner().invoke(app, ["export", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files, a model in several files, and a run of every stage that trains adapters of it."""
    made = tmp_path_factory.mktemp("export")
    base = write_model(made / "base")
    whole = transformers.LlamaForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    whole.save_pretrained(base, max_shard_size="30KB")
    chats = write_rows(made / "chats.jsonl", conversations(20))
    pairs = write_rows(made / "pairs.jsonl", comparisons(20))
    for stage, lora in ADAPTERS.items():
        given = settings(base, chats if stage == "sft" else pairs, made / stage, lora=lora)
        pool.run(train_on_rank, 1, stage, given)
    pool.run(train_on_rank, 2, "sft", settings(base, chats, made / "all", parallel={"tensor": 2}))
    return made


def checkpoint(directory: Path, stage: str) -> Path:
    return directory / stage / "checkpoints" / "step-00000004"


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model.eval()(tokens).logits


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_merged_model_is_the_base_with_its_adapters(directory: Path, stage: str, tmp_path: Path) -> None:
    source, base, output = checkpoint(directory, stage), directory / "base", tmp_path / "merged"
    assert export(source, "--output", output) == (
        0,
        f"{output}: the adapters of {source} merged into {base}\n",
        "",
    )
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    expected = logits(peft.PeftModel.from_pretrained(plain, source / "adapter"))
    found = logits(transformers.AutoModelForCausalLM.from_pretrained(output))
    assert_same_logits(found, expected)
    assert (expected - before).abs().max() > 1e-2
    files = sorted(path.name for path in base.glob("*.safetensors"))
    assert len(files) > 1 and sorted(path.name for path in output.glob("*.safetensors")) == files
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        merged, given = (json.loads((path / name).read_text()) for path in (output, base))
        end = load_tokenizer(source / "adapter").eos_id  # the template's
        assert merged.pop("eos_token_id") == [given.pop("eos_token_id"), end]
        given.pop("_from_model_config", None)  # the file itself counts now
        assert merged == given


def test_an_adapter_names_a_base_that_peft_loads_from_anywhere(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run that starts from a checkpoint, which it was given by a path from where it was started."""
    monkeypatch.chdir(directory)
    base = checkpoint(directory, "all")
    given = settings(base.relative_to(directory), "chats.jsonl", tmp_path / "run", lora={"rank": 2})
    assert command("sft", given, "train.steps=1").code == 0
    adapter = tmp_path / "run" / "checkpoints" / "step-00000001" / "adapter"
    monkeypatch.chdir(tmp_path)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base / "model")
    assert torch.equal(logits(alone), logits(peft.PeftModel.from_pretrained(plain, adapter)))
    assert export(adapter.parent, "--output", "merged").code == 0
    weights = base / "model" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, said = export(adapter.parent, "--output", "other")
    weights.write_bytes(content)
    assert code == 2 and "damaged" in said, "a base in a checkpoint is checked as one"


def test_a_merged_reward_model_scores_as_the_base_with_its_adapters(directory: Path, tmp_path: Path) -> None:
    source, output = checkpoint(directory, "reward"), tmp_path / "merged"
    assert export(source, "--output", output).code == 0
    scorer = transformers.AutoModelForSequenceClassification
    base = scorer.from_pretrained(directory / "base", num_labels=1, pad_token_id=0)
    merged, said = scorer.from_pretrained(output, output_loading_info=True)
    assert type(merged).__name__ == "LlamaForSequenceClassification"
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert merged.config.pad_token_id not in (None, merged.config.eos_token_id)
    expected = logits(peft.PeftModel.from_pretrained(base, source / "adapter"))
    assert_same_logits(logits(merged), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_merged_is_rounded_once_and_stored_as_the_base_is(
    directory: Path, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Of a tied model in one file; its adapters, like a PEFT directory, lie by themselves and name another base."""
    base, output = tmp_path / "base", tmp_path / "merged"
    adapter = shutil.copytree(checkpoint(directory, "dpo") / "adapter", tmp_path / "adapter")
    write_model(base, tie_word_embeddings=True)
    transformers.LlamaForCausalLM.from_pretrained(base).to(dtype).save_pretrained(base)
    assert export(adapter, "--output", output, "--base", base).code == 0
    before, after = (load_file(path / "model.safetensors") for path in (base, output))
    factors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = 0
    for name, weight in before.items():
        a, b = (factors.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "AB")
        expected = weight if a is None or b is None else (weight.float() + 5 / 3**0.5 * (b @ a)).to(dtype)
        torch.testing.assert_close(after[name], expected, rtol=0 if a is None else 1e-2, atol=0)
        changed += a is not None
    assert changed == 4 * 3


def test_a_whole_model_is_copied(directory: Path, tmp_path: Path) -> None:
    source, output = checkpoint(directory, "all"), tmp_path / "copied"
    assert export(source, "--output", output) == (0, f"{output}: the model of {source}\n", "")
    files = {path.name: path.read_bytes() for path in (source / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in output.iterdir()} == files
    assert "chat_template.jinja" in files
    transformers.AutoModelForCausalLM.from_pretrained(output)


def test_what_is_exported_can_be_trained_on(directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert export(checkpoint(directory, "sft"), "--output", output).code == 0
    given = settings(output, str(directory / "chats.jsonl"), tmp_path / "run", train={"steps": 1})
    code, _, said = command("sft", given)
    assert code == 0 and f"parameters from {output}" in said
    of_adapters = settings(checkpoint(directory, "sft"), str(directory / "chats.jsonl"), tmp_path / "run")
    code, _, said = command("sft", of_adapters)
    assert code == 2 and "`llm3d export`" in said


def test_an_export_is_replaced_only_where_that_is_asked_for(directory: Path, tmp_path: Path) -> None:
    source, output = checkpoint(directory, "sft"), tmp_path / "merged"
    assert export(source, "--output", output).code == 0
    (output / "config.json").write_text("{}")
    assert export(source, "--output", output).code == 2
    assert (output / "config.json").read_text() == "{}"
    assert export(source, "--output", output, "--overwrite").code == 0
    assert json.loads((output / "config.json").read_text())["model_type"] == "llama"
    assert list(tmp_path.iterdir()) == [output]


def broken_copy(directory: Path, tmp_path: Path, file: str, **changes: Any) -> Path:
    """A PEFT directory with other settings, or with tensors cut short."""
    adapter = shutil.copytree(checkpoint(directory, "sft") / "adapter", tmp_path / "adapter")
    path = adapter / file
    if changes:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    else:
        path.write_bytes(path.read_bytes()[:-100])
    return adapter


def test_what_cannot_be_exported_is_said_in_a_line(directory: Path, tmp_path: Path) -> None:
    config, weights = "adapter_config.json", "adapter_model.safetensors"
    source, output = checkpoint(directory, "sft"), tmp_path / "output"
    small = write_model(tmp_path / "small", hidden_size=16, intermediate_size=12, num_hidden_layers=2)
    damaged = shutil.copytree(source, tmp_path / "damaged")
    content = bytearray((damaged / "adapter" / weights).read_bytes())
    content[-5] ^= 1
    (damaged / "adapter" / weights).write_bytes(content)
    cases: list[tuple[list[object], str]] = [
        (
            [directory],
            "no checkpoint (no manifest.json) and no Hugging Face directory",
        ),
        ([tmp_path / "nothing"], "nothing: no such file or directory"),
        ([source, "--base", "nothing"], "--base: nothing is no directory here"),
        ([source, "--base", tmp_path], "config.json: no such file"),
        ([source, "--base", source], "holds adapters and no whole model"),
        ([source, "--base", small], "cannot be merged into"),
        (
            [checkpoint(directory, "all"), "--base", directory / "base"],
            "holds a whole model, which needs none",
        ),
        ([damaged], "damaged"),
        ([broken_copy(directory, tmp_path / "1", weights)], "damaged"),
        ([broken_copy(directory, tmp_path / "5", config)], "not valid JSON"),
        ([broken_copy(directory, tmp_path / "2", config, use_dora=True)], "use_dora true is not"),
        ([broken_copy(directory, tmp_path / "3", config, base_model_name_or_path=None)], "names no model"),
        (
            [broken_copy(directory, tmp_path / "4", config, target_modules="all")],
            "target_modules 'all' leaves out",
        ),
    ]
    for words, said in cases:
        code, stdout, stderr = export(*words, "--output", output)
        assert (code, stdout) == (2, ""), (words, stderr)
        assert said in stderr and stderr.count("\n") == 1, stderr
        assert not output.exists() and not list(tmp_path.glob(".output*"))
    for taken in (directory / "base", source):
        code, _, stderr = export(source, "--output", taken, "--overwrite")
        assert code == 2 and "is what is exported" in stderr
