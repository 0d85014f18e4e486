"""What is shown is what the model gets: the same tokens, in the same order, and of them the learned ones."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from llm3d.cli import app
from llm3d.commands.show import show, spelling
from llm3d.config import STAGES, make_config
from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.parallel.mesh import Mesh
from llm3d.stages.run import open_task
from llm3d.text.tokenizer import load_tokenizer
from tests import pool
from tests.corpora import documents, write_jsonl
from tests.stages.common import Ended
from tests.stages.post_training import comparisons, conversations, rankings, settings, write_model, write_rows

GREEN = r"\x1b\[(?:1;)?(?:7;)?32m(.*?)\x1b\[0m"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("show")
    write_model(made / "model")
    return made


def given(directory: Path, rows: list[Any], stage: str, **changes: Any) -> dict[str, Any]:
    train = write_rows(directory / f"{stage}.jsonl", rows)
    data = changes.pop("data", {})
    return settings(directory / "model", train, directory / "run", **{stage: {}}, data=data, **changes)


def shown(made: dict[str, Any], *options: str) -> Ended:
    """`llm3d data show CONFIG.yaml OPTIONS...`, without a terminal."""
    path = Path(made["run"]["dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(made))
    result = CliRunner().invoke(app, ["data", "show", str(path), *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Ended(result.exit_code, result.stdout, result.stderr)


CHAT = [
    {"role": "user", "content": "春眠不觉晓\n\tsay </s> <|im_end|>"},
    {"role": "assistant", "content": "Да 😀"},
]
TEXT = """\
⟨<|im_start|>⟩user↵
春眠不觉晓↵
\\tsay </s> <|im_end|>⟨<|im_end|>⟩↵
⟨<|im_start|>⟩assistant↵
⟦Да 😀⟨<|im_end|>⟩⟧↵
"""


def test_a_conversation_without_colors(directory: Path) -> None:
    made = given(directory, [{"messages": CHAT}], "sft")
    code, stdout, stderr = shown(made, "data.sequence_length=100")
    assert (code, stderr) == (0, "")
    assert f"{directory}/sft.jsonl, sample 1\n" in stdout and TEXT in stdout
    assert f"{directory}/sft.jsonl: 1 sample\n" in stdout
    found = re.search(r"\n(\d+) tokens, (\d+) learned\n", stdout)
    assert found is not None
    tokens, learned = map(int, found.groups())
    assert f"learned: {learned / tokens:.1%} of {tokens} tokens\n" in stdout
    whole = shown(made, "data.sequence_length=100", "sft.prompt_loss=true").stdout
    assert f"\n{tokens} tokens, {tokens - 1} learned\n⟨<|im_start|>⟩⟦user" in whole


def test_colors_say_what_is_learned(directory: Path) -> None:
    made = given(directory, [{"messages": CHAT}], "sft", data={"sequence_length": 100})
    config = make_config(made, None, STAGES["sft"])

    def printed(**options: Any) -> str:
        show(config, 1, "train", 1, Console(file=(said := io.StringIO()), force_terminal=True, **options))
        return said.getvalue()

    colored = printed(color_system="standard")
    said = "".join(re.findall(GREEN, colored))
    assert said == "learned" + "Да 😀<|im_end|>"
    assert "⟦" not in colored
    assert TEXT in printed(no_color=True)


def test_replies_that_are_compared(directory: Path) -> None:
    pairs = [row | {"margin": 2.5} for row in comparisons(3)]
    for stage in ("reward", "dpo"):
        code, stdout, _ = shown(given(directory, pairs, stage), "--samples", "1")
        assert code == 0
        assert re.search(r"sample \d, margin 2.5\nreply 1 of 2, rank 0: \d+ tokens, \d+ learned\n", stdout)
        assert stdout.count("reply 2 of 2, rank 1: ") == 1
        number = int(stdout.partition("sample ")[2][0]) - 1
        chosen, rejected = pairs[number]["chosen"], pairs[number]["rejected"]
        assert f"⟦{chosen}⟨<|im_end|>⟩⟧" in stdout and f"⟦{rejected}⟨<|im_end|>⟩⟧" in stdout
    _, stdout, _ = shown(given(directory, rankings(3), "reward"), "--samples", "1")
    assert re.findall(r"reply \d of 3, rank (\d)", stdout) == ["0", "0", "1"]


def packed_on_rank(made: dict[str, Any]) -> list[list[int]]:
    opened = open_task(make_config(made, None, STAGES["sft"]))
    batches = [batch for step in (1, 2) for batch in opened.data.microbatches(step, Mesh())]
    segments = [batch.tokens.tensor_split(batch.cu_seqlens[1:-1].long()) for batch in batches]
    return sorted(part.tolist() for parts in segments for part in parts)


def test_the_first_samples_are_those_of_the_first_steps(directory: Path) -> None:
    made = given(directory, conversations(20), "sft")
    _, stdout, _ = shown(made, "--samples", "8")
    numbers = [int(number) - 1 for number in re.findall(r", sample (\d+)\n", stdout)]
    samples = open_task(make_config(made, None, STAGES["sft"])).data.sets[0]
    tokens = sorted(samples[number].sequences[0].ids.tolist() for number in numbers)
    assert tokens == pool.run(packed_on_rank, 1, made)[0]


def test_all_that_was_left_out_is_counted_and_some_of_it_named(directory: Path) -> None:
    rows = [*conversations(6), {"messages": CHAT * 9}, {"messages": CHAT[:1]}]
    made = given(directory, rows, "sft", data={"sequence_length": 40})
    assert shown(made).code == 2
    code, stdout, _ = shown(made, "data.skip_bad=true", "--samples", "0")
    assert code == 0
    path = directory / "sft.jsonl"
    assert f"{path}: 3 samples, 4 left out, too long, 1 left out that cannot be used\n" in stdout
    assert f"  {path} line 8: no reply at the end\n" in stdout
    assert "learned text" not in stdout and "sample 1" not in stdout
    lengths = re.search(r"tokens a sequence: least (\d+), .* most (\d+)\n", stdout)
    assert lengths is not None and 1 < int(lengths[1]) < int(lengths[2]) <= 40
    assert (
        "1 cut" in shown(made, "data.skip_bad=true", "data.truncation=left", "data.sequence_length=75").stdout
    )


def test_packing_is_told_for_as_many_data_ranks_as_there_will_be(directory: Path) -> None:
    made = given(directory, conversations(20), "sft")
    one, two = (shown(made, f"world_size={n}", "--samples", "0").stdout.splitlines()[-1] for n in (1, 2))
    assert "tokens a step in" in one and one.split(" in ")[0] == two.split(" in ")[0] and one != two


def test_validation_data_is_shown_as_it_is_stored(directory: Path) -> None:
    made = given(directory, conversations(8), "sft")
    assert shown(made, "--split", "valid")[::2] == (
        2,
        "llm3d: data.valid: empty; name the data, or show --split train\n",
    )
    made["data"]["valid"] = made["data"]["train"]
    _, stdout, _ = shown(made, "--split", "valid", "--samples", "4")
    assert re.findall(r", sample (\d)\n", stdout) == ["1", "2", "3", "4"]
    assert "tokens a step" not in stdout


def test_pretraining_has_no_samples(directory: Path) -> None:
    made = given(directory, conversations(8), "sft")
    del made["sft"]
    code, _, stderr = shown(made)
    assert code == 2 and "--stage" in stderr
    assert shown(made, "--stage", "sft").code == 0


@pytest.mark.parametrize("kind", ["sentencepiece", "byte-level"])
def test_the_texts_of_tokens_make_up_the_text(kind: str, tmp_path: Path) -> None:
    train_tokenizer([write_jsonl(tmp_path / "text.jsonl", documents(50))], tmp_path / "made", kind, 400)
    tokenizer = load_tokenizer(tmp_path / "made")
    for text in documents(8):
        ids = tokenizer.encode(text)
        texts = [spelled for spelled, special in spelling(ids, tokenizer) if not special]
        assert len(texts) == len(ids)
        assert "".join(texts) == text.replace("\n", "↵\n").replace("\t", "\\t")
    assert tokenizer.eos_id is not None
    (end,) = spelling([tokenizer.eos_id], tokenizer)
    assert end == (tokenizer.token(tokenizer.eos_id), True)
    cut_off = tokenizer.encode("☃")[:-1]
    assert "\ufffd" in "".join(spelled for spelled, _ in spelling(cut_off, tokenizer))
