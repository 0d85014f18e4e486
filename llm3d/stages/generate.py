"""Text from a model: to a prompt, to a file of prompts, or in a conversation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm3d.config import ChatDataConfig, Config, RewardConfig, ZeroConfig
from llm3d.data.chat import read_prompts
from llm3d.data.formats import Message
from llm3d.data.order import derive_key
from llm3d.data.templates import Template, load_template
from llm3d.data.tokenizer import Tokenizer
from llm3d.errors import InputError
from llm3d.generate.engine import Generator, Reply
from llm3d.generate.sampling import Sampling
from llm3d.generate.scheduler import Request
from llm3d.generate.text import Replies
from llm3d.kernels import backend
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.stages.evaluate import latest_model
from llm3d.stages.tokenizer import open_tokenizer
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.objective import NextToken


@dataclass(frozen=True)
class Wanted:
    """What the command was asked for, one of the first three.

    prompt: a text.  prompts: a file of them.  chat: a conversation on the terminal.
    raw: texts are continued as they stand, without the chat template.
    output: a file for the replies to a file of prompts; None: standard output.
    """

    prompt: str | None = None
    prompts: str | None = None
    chat: bool = False
    raw: bool = False
    output: Path | None = None


class Written(NamedTuple):
    """A reply to a prompt, of several."""

    prompt: int
    text: str
    reason: str
    num_tokens: int
    log_probability: float  # of all its tokens


class Writer:
    """What a run's settings name, opened: its tokenizer and its template, in time its model."""

    def __init__(self, config: Config, raw: bool) -> None:
        """Raises InputError where something cannot be used."""
        if isinstance(config, RewardConfig):
            raise InputError("a reward model scores replies and writes none; name another stage's settings")
        backend.use(config.kernels.backend, device_of_this_process())
        config = generation_layout(config)
        self.config, tokenizer = open_tokenizer(config)
        if tokenizer is None:
            raise InputError("data.tokenizer: not set; name the model's tokenizer")
        self.tokenizer: Tokenizer = tokenizer
        self.template: Template | None = None
        if isinstance(config.data, ChatDataConfig) and not raw:
            self.template = load_template(config.data.template, tokenizer)
        ids = end_ids(self.config, tokenizer, self.template)
        self.replies = Replies(tokenizer, ids, config.generate.stop)

    def tokens(self, messages: Sequence[Message], where: str = "") -> list[int]:
        """What the model is to go on from. Raises InputError where nothing more has room."""
        if self.template is not None:
            tokens = self.template.encode_prompt(messages)
        else:
            text = "\n".join(message.content for message in messages)
            tokens = [*self._beginning(), *self.tokenizer.encode(text)]
        most = self.config.model.max_position_embeddings
        if not tokens:
            raise InputError(
                f"{where}an empty prompt, and the tokenizer has no token for the beginning of a text"
            )
        if len(tokens) >= most:
            raise InputError(
                f"{where}a prompt of {len(tokens):,} tokens; model.max_position_embeddings {most:,} leaves no room "
                "for a reply"
            )
        return tokens

    def _beginning(self) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos] if self.tokenizer.adds_bos and bos is not None else []

    def request(self, tokens: Sequence[int], number: int) -> Request:
        """number: of the prompt; the same number and run.seed draw the same."""
        asked = self.config.generate
        sampling = Sampling(
            asked.temperature, asked.top_k, asked.top_p, asked.min_p, asked.repetition_penalty
        )
        seed = derive_key(self.config.run.seed, number) >> 1
        ends, count = self.replies.ends, asked.num_replies
        return Request(tokens, asked.max_new_tokens, ends, sampling, count, seed)

    def written(self, prompt: int, reply: Reply) -> Written:
        text = self.replies.text(reply.tokens)
        return Written(prompt, text, reply.reason, len(reply.tokens), sum(reply.log_probabilities))

    # ---- with the model ----

    def load(self, mesh: Mesh) -> str:
        """Where the weights came from."""
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None, "the tokenizer has told it"
        model, source = latest_model(self.config, mesh, NextToken(vocab_size))
        self.mesh, self.generator = mesh, Generator(model.config.model, model.stages, mesh, model.dtype)
        return source

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        told: Callable[[Sequence[int]], None] | None = None,
    ) -> list[Written]:
        """Replies to prompts, on every rank: each data rank's share, then all.

        first: the number of the first prompt.  told: of the tokens so far, on the rank that writes, for one prompt.
        """
        mesh, asked = self.mesh, self.config.generate
        mine = range(mesh.data_rank, len(prompts), mesh.data_size)
        requests = [self.request(prompts[i], first + i) for i in mine]
        so_far: list[int] = []

        def on_token(request: int, reply: int, token: int) -> None:
            so_far.append(token)
            told(so_far)  # type: ignore[misc]

        cache_bytes = None if asked.cache_gib is None else int(asked.cache_gib * 2**30)
        with input_errors_on_all(mesh.everyone):
            found = self.generator.generate(
                requests, asked.max_sequences, cache_bytes, on_token if told else None
            )
        written = [
            self.written(i, reply) for i, replies in zip(mine, found, strict=True) for reply in replies
        ]
        everyones = gather_bytes(json.dumps(written).encode(), mesh.data)
        return sorted((Written(*w) for part in everyones for w in json.loads(part)), key=lambda w: w.prompt)


def generation_layout(config: Config) -> Config:
    """The settings as text is written: one stage a rank, whole rows, weights that stay."""
    parallel = config.parallel
    layers = None if parallel.chunks > 1 else parallel.layers_per_stage
    plain = {"chunks": 1, "schedule": "1f1b", "sequence": False, "layers_per_stage": layers}
    update = {"parallel": parallel.model_copy(update=plain), "zero": ZeroConfig(stage=0), "recompute": "none"}
    return config.model_copy(update=update)


def end_ids(config: Config, tokenizer: Tokenizer, template: Template | None) -> set[int]:
    """Tokens that end a reply: the model's, the tokenizer's, and the template's."""
    of_model = config.model.eos_token_id
    several = of_model if isinstance(of_model, tuple) else (of_model,)
    known = (*several, tokenizer.eos_id, template.end_id if template else None)
    return {token for token in known if token is not None}


# ---- the command ----


def check(config: Config, wanted: Wanted) -> tuple[Writer, list[list[int]], list[Any]]:
    """Open what the settings name, and read the prompts: their tokens, and how they are shown.

    Raises InputError where something cannot be used.
    """
    asked = [wanted.prompt is not None, wanted.prompts is not None, wanted.chat]
    if sum(asked) != 1:
        raise InputError("give one of --prompt, --prompts and --chat")
    if wanted.output is not None and wanted.prompts is None:
        raise InputError("--output is for the replies to --prompts")
    if wanted.output is not None and (wanted.output.is_dir() or not wanted.output.parent.is_dir()):
        raise InputError(f"--output: {wanted.output}: name a file in a directory that exists")
    writer = Writer(config, wanted.raw)
    if wanted.chat and writer.template is None:
        raise InputError(
            "--chat needs a chat template, which settings of sft or dpo name; --prompt continues a text"
        )
    if wanted.prompt is not None:
        return writer, [writer.tokens([Message("user", wanted.prompt)])], [wanted.prompt]
    if wanted.prompts is None:
        return writer, [], []
    records = read_prompts(wanted.prompts)
    tokens = [writer.tokens(record.messages, f"{record.where}: ") for record in records]
    shown = [_shown(record.messages) for record in records]
    return writer, tokens, shown


def _shown(messages: Sequence[Message]) -> Any:
    """A prompt of one message is its text."""
    return messages[0].content if len(messages) == 1 else [message._asdict() for message in messages]


def run(config: Config, wanted: Wanted) -> None:
    """Write what is wanted, from the run's latest checkpoint or the model that the settings name."""
    with process_group() as device:
        if device.type == "cpu":
            keep_freed_memory()
        with input_errors_on_all(whole_world()):
            writer, prompts, shown = check(config, wanted)
        mesh = Mesh(config.parallel.tensor, config.parallel.pipeline, device)
        source = writer.load(mesh)
        if mesh.rank == 0:
            print(source, file=sys.stderr)
        if wanted.chat:
            converse(writer)
        elif wanted.prompt is not None:
            reply_to_one(writer, prompts)
        else:
            reply_to_many(writer, prompts, shown, wanted.output)


class _Screen:
    """A reply on standard output, as it is written; on rank 0 alone."""

    def __init__(self, replies: Replies, mesh: Mesh) -> None:
        self.replies, self.speaks, self.shown = replies, mesh.rank == 0, ""

    def told(self, tokens: Sequence[int]) -> None:
        if self.speaks:
            self.show(self.replies.settled(tokens))

    def show(self, text: str) -> None:
        if self.speaks:
            print(text[len(self.shown) :], end="", flush=True)
            self.shown = text

    def end(self, text: str) -> None:
        self.show(text)
        if self.speaks:
            print()


def reply_to_one(writer: Writer, prompts: Sequence[Sequence[int]]) -> None:
    """As it is written, if it is one; else each with its number."""
    screen = _Screen(writer.replies, writer.mesh)
    if writer.config.generate.num_replies == 1:
        (written,) = writer.write(prompts, told=screen.told)
        screen.end(written.text)
        return
    for number, written in enumerate(writer.write(prompts), 1):
        if writer.mesh.rank == 0:
            print(f"--- reply {number} ---\n{written.text}")


def reply_to_many(
    writer: Writer, prompts: Sequence[Sequence[int]], shown: Sequence[Any], output: Path | None
) -> None:
    """A line of JSON for each reply: its prompt, its text, why it ended, how long and how likely it is."""
    started = time.perf_counter()
    written = writer.write(prompts)
    seconds = time.perf_counter() - started
    with input_errors_on_all(writer.mesh.everyone):
        if writer.mesh.rank == 0:
            lines = [
                json.dumps({"prompt": shown[w.prompt], **_fields(w)}, ensure_ascii=False) for w in written
            ]
            _put("".join(line + "\n" for line in lines), output)
            tokens = sum(w.num_tokens for w in written)
            said = f"{len(written):,} replies, {tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
            print(said, file=sys.stderr)


def _fields(written: Written) -> dict[str, Any]:
    return {
        "reply": written.text,
        "reason": written.reason,
        "tokens": written.num_tokens,
        "log_probability": round(written.log_probability, 2),
    }


def _put(text: str, output: Path | None) -> None:
    """A file is there whole or not at all."""
    if output is None:
        print(text, end="")
        return
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(output)
    except OSError as error:
        raise InputError(f"--output: {output}: {error.strerror}; name a file that can be written") from None


def converse(writer: Writer) -> None:
    """Until the user's input ends; the model reads all that was said before."""
    mesh, messages = writer.mesh, list[Message]()
    for number in range(2**31):
        said = _next_line(mesh)
        if said is None:
            return
        messages.append(Message("user", said))
        with input_errors_on_all(mesh.everyone):
            tokens = writer.tokens(messages)
        screen = _Screen(writer.replies, mesh)
        (written,) = writer.write([tokens], number, screen.told)
        screen.end(written.text)
        messages.append(Message("assistant", written.text))


def _next_line(mesh: Mesh) -> str | None:
    """What the user says next, on every rank; None at the end."""
    line = b""
    if mesh.rank == 0:
        while not line:
            print("> ", end="", file=sys.stderr, flush=True)
            read = sys.stdin.readline()
            line = read.strip().encode()
            if not read:
                break
    said = gather_bytes(line, mesh.everyone)[0].decode()
    return said or None
