"""What a checkpoint means here it means in transformers: its tokens, bos before a text, and where generation ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm3d.commands.export import export
from llm3d.commands.generate import PromptEncoder, TextGenerator
from llm3d.config.hugging_face import token_ids
from llm3d.config.uses import config_for_generation
from llm3d.corpus.build import tokenize_corpus
from llm3d.corpus.tokenizer_training import train_tokenizer
from llm3d.parallel.mesh import Mesh, process_group
from llm3d.text.conversations import Message
from llm3d.text.templates import BUILT_IN
from llm3d.text.tokenizer import HARD_TEXTS, META_SPACE, load_tokenizer
from tests.stages.common import command, silent
from tests.stages.post_training import SHAPE, Row, comparisons, conversations, question, settings, write_rows

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
TEXT = "What comes after one? It is two, of course.\n\tdef f(x):\n        return x  # one\n"
TEXTS = (
    *HARD_TEXTS,
    f"{META_SPACE} a{META_SPACE}{META_SPACE}b",
    TEXT,
    f"{IM_START}user\n?{IM_END}\n",
    "a</s> b",
)
CHAT = [{"role": "user", "content": "What comes after  one?\n"}]
NEW_TOKENS, BEFORE = 9, 3  # of a reply; of them, those before the token that may end it

# ---- tokenizers ----


def sentencepiece_model(directory: Path, config: dict[str, Any], **options: Any) -> None:
    """As the LLaMAs 1 and 2 have it."""
    plain = {"byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 3}
    spaces = {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True}
    given = {"model_type": "bpe", "vocab_size": 310, **plain, **spaces, **options}
    with (directory / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.split("\n")), model_writer=file, hard_vocab_limit=False, **given
        )
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def with_added_tokens(directory: Path) -> None:
    sentencepiece_model(directory, {"bos_token": "<s>", "eos_token": "</s>"})
    size = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model")).vocab_size()
    added = {IM_START: size, IM_END: size + 1}
    (directory / "added_tokens.json").write_text(json.dumps(added))
    (directory / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [*added]}))


def trained(directory: Path, kind: str, vocab_size: int) -> None:
    """By `llm3d tokenizer train`; that of bytes puts bos before a text."""
    text = directory.with_suffix(".txt")
    text.write_text(TEXT * 9)
    with silent():
        train_tokenizer([text], directory, kind, vocab_size)


def saved_by_transformers(directory: Path) -> None:
    sentencepiece_model(
        directory, {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
    )
    made = transformers.AutoTokenizer.from_pretrained(directory)
    made.add_special_tokens({"additional_special_tokens": [IM_START, IM_END]})
    (directory / "tokenizer.model").unlink()
    made.save_pretrained(directory)


def without_bos(directory: Path) -> None:
    """Of bytes, as Qwen has it."""
    trained(directory, "byte-level", 290)
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    made.add_special_tokens([IM_START, IM_END])
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    made.save(str(directory / "tokenizer.json"))
    names = {"bos_token": None, "eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(names))


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "prefix": partial(sentencepiece_model, config={"add_bos_token": True, "add_eos_token": False}),
    "unigram": partial(sentencepiece_model, config={}, model_type="unigram"),
    "added": with_added_tokens,
    "no prefix": partial(trained, kind="sentencepiece", vocab_size=310),
    "bos by its processor": partial(trained, kind="byte-level", vocab_size=290),
    "null": without_bos,
    "saved": saved_by_transformers,
}
# What the generation_config.json of a model says beside.
GENERATION = {"null": {"eos_token_id": [289, 290], "repetition_penalty": 1.2}}


def write_base(directory: Path, name: str, template: str | None) -> Path:
    """A random model that knows its tokenizer's end, with a tokenizer and maybe a template."""
    directory.mkdir(parents=True)
    TOKENIZERS[name](directory)
    tokenizer = load_tokenizer(directory)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    shape = {
        **SHAPE,
        "vocab_size": tokenizer.vocab_size + 5,
        "initializer_range": 0.3,
        "max_position_embeddings": 512,
        **ends,
    }
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    network.generation_config.update(**GENERATION.get(name, {}))
    network.save_pretrained(directory)
    if template is not None:
        (directory / "chat_template.jinja").write_text(BUILT_IN[template])
    return directory


# ---- checkpoints ----


def trained_on_text(base: Path, directory: Path, prepend_bos: bool | None) -> Path:
    (directory / "text.txt").write_text(f"{TEXT}\n" * 40)
    with silent():
        tokenize_corpus(
            [directory / "text.txt"], directory / "corpus", base, prepend_bos=prepend_bos, valid_fraction=0
        )
    given = settings(base, str(directory / "corpus"), directory / "run")
    return trained_by(
        "pretrain", {**given, "data": {**given["data"], "sequence_length": 16, "tokenizer": str(base)}}
    )


def trained_on_chats(base: Path, directory: Path, stage: str, **changes: Any) -> Path:
    rows = {"sft": conversations(8), "ppo": prompts(8)}.get(stage, comparisons(8))
    sequences = {"sequence_length": 256}
    if stage == "ppo":
        (directory / "rewards.py").write_text(
            "def length(prompts, replies): return [len(r) for r in replies]"
        )
        rewards = [{"function": f"{directory}/rewards.py:length"}]
        changes["ppo"] = {"advantages": "grpo", "rewards": rewards, "ema": 0.5}
        changes["generate"] = {"max_new_tokens": 4, "num_replies": 2}
    return trained_by(
        stage,
        settings(
            base, write_rows(directory / "rows.jsonl", rows), directory / "run", data=sequences, **changes
        ),
    )


def prompts(count: int) -> list[Row]:
    return [{"prompt": question(i)} for i in range(count)]


def trained_by(stage: str, given: dict[str, Any]) -> Path:
    ended = command(stage, given, "train.steps=1")
    assert ended.code == 0, ended.stderr
    return Path(given["run"]["dir"]) / "checkpoints" / "step-00000001"


def exported(checkpoint: Path, average: bool = False) -> Path:
    export(checkpoint, checkpoint.parent / "exported", average=average)
    return checkpoint.parent / "exported"


class Case(NamedTuple):
    """A kind of tokenizer, and what is trained from a model that has it; template: where it is one of chats."""

    tokenizer: str
    stage: str
    template: str | None = None

    def made(self, directory: Path) -> Path:
        """-> a directory for transformers."""
        base, stage = write_base(directory / "base", self.tokenizer, self.template), self.stage
        if stage.startswith("pretrain"):
            prepend_bos = {"with bos": True, "without bos": False}.get(stage.removeprefix("pretrain "))
            return trained_on_text(base, directory, prepend_bos) / "model"
        if stage == "lora":
            return exported(trained_on_chats(base, directory, "sft", lora={"rank": 2}))
        stage, _, how = stage.partition(" ")
        checkpoint = trained_on_chats(base, directory, stage)
        return exported(checkpoint, average=how == "averaged") if how else checkpoint / "model"


CASES = [
    Case("prefix", "pretrain"),
    Case("unigram", "pretrain without bos"),
    Case("no prefix", "pretrain with bos"),
    Case("bos by its processor", "pretrain without bos"),
    Case("bos by its processor", "pretrain with bos"),
    Case("null", "pretrain"),
    Case("saved", "pretrain"),
    Case("saved", "sft", "chatml"),
    Case("added", "sft", "chatml"),
    Case("bos by its processor", "sft exported", "alpaca"),
    Case("prefix", "lora", "llama2"),
    Case("null", "lora", "chatml"),
    Case("null", "dpo", "chatml"),
    Case("no prefix", "dpo exported", "llama2"),
    Case("null", "ppo", "chatml"),
    Case("added", "ppo averaged", "chatml"),
    Case("added", "reward", "chatml"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case.tokenizer}, {case.stage}")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        directory = tmp_path_factory.mktemp("case")
        return request.param, shutil.copytree(request.param.made(directory), directory / "saved")


# ---- the law ----


def encoder_of(directory: Path, raw: bool) -> PromptEncoder:
    asked = ["generate.temperature=0", f"generate.max_new_tokens={NEW_TOKENS}"]
    return PromptEncoder(config_for_generation(directory, asked, 1).config, raw)


def test_its_tokens_are_the_same_in_transformers(case: tuple[Case, Path]) -> None:
    (made, directory), ours = case, load_tokenizer(case[1])
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    source = load_tokenizer(directory.parent / "base")
    assert ours.encode_batch(TEXTS) == source.encode_batch(TEXTS)
    for text in TEXTS:
        begins = [ours.bos_id] if ours.adds_bos else []
        assert theirs(text, split_special_tokens=True)["input_ids"] == [*begins, *ours.encode(text)]
        assert theirs(text, split_special_tokens=True, add_special_tokens=False)["input_ids"] == ours.encode(
            text
        )
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (
        ours.bos_id,
        ours.eos_id,
        ours.vocab_size,
    )
    if made.stage == "reward":
        return
    assert encoder_of(directory, raw=True).tokens([Message("user", TEXT)]) == theirs(TEXT)["input_ids"]
    if made.template is not None:
        of_chat: Any = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
        theirs_of_chat = of_chat["input_ids"]
        assert encoder_of(directory, raw=False).tokens([Message(**CHAT[0])]) == theirs_of_chat


def test_it_stops_where_it_stops_in_transformers(case: tuple[Case, Path]) -> None:
    """Whatever special token it writes. Only a reward model writes nothing."""
    made, directory = case
    if made.stage == "reward":
        assert not (directory / "generation_config.json").exists()
        return
    tokenizer, stopped = load_tokenizer(directory), set[int]()
    of_base = json.loads((directory.parent / "base" / "generation_config.json").read_text())["eos_token_id"]
    ends = {*token_ids(of_base, tokenizer.eos_id)}
    original = load_file(directory / "model.safetensors")
    encoder = encoder_of(directory, raw=made.template is None)
    prompt = encoder.tokens([Message("user", TEXT)])
    special = sorted({*tokenizer.special_tokens.values()})
    for token in special:
        save_file(
            writing(original, directory, prompt, token, special),
            directory / "model.safetensors",
            {"format": "pt"},
        )
        network = transformers.AutoModelForCausalLM.from_pretrained(directory)
        written = network.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS)
        theirs = written[0, len(prompt) :].tolist()
        with process_group() as device:
            writer = TextGenerator(encoder, Mesh(1, 1, device))
            ((reply,),) = writer.generator.generate([encoder.request(prompt, 0)], 1, None, None)
        assert reply.tokens == theirs and theirs[BEFORE] == token
        if len(theirs) <= BEFORE + 1:
            stopped.add(token)
    save_file(original, directory / "model.safetensors", {"format": "pt"})
    assert ends and stopped == ends
    assert made.template != "chatml" or tokenizer.special_id(IM_END) in ends


@torch.no_grad()
def writing(
    weights: dict[str, Tensor], directory: Path, prompt: list[int], token: int, special: list[int]
) -> dict[str, Tensor]:
    """The model's weights with other output rows: its reply to a prompt has the token as the first special one."""
    network = transformers.AutoModelForCausalLM.from_pretrained(directory).float()
    network.load_state_dict(weights, strict=False)
    before = network.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=BEFORE, suppress_tokens=special
    )
    states = network.model(before).last_hidden_state[0, -BEFORE - 1 :]
    wanted = torch.full((BEFORE + 1, len(special)), -100.0)
    wanted[BEFORE, special.index(token)] = 100.0
    head = weights["lm_head.weight"].clone()
    missing = wanted - states @ head[special].T
    head[special] += torch.linalg.lstsq(states, missing, driver="gelsd").solution.T
    return weights | {"lm_head.weight": head}
