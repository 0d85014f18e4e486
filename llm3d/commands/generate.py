"""Text from a model: to a prompt, to a file of prompts, or in a conversation."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llm3d.checkpoint.starting import latest_checkpoint_or_start, load_latest
from llm3d.config import Config
from llm3d.config.uses import generation_layout, has_template
from llm3d.data.chat import PlacedPrompt, read_prompts
from llm3d.data.run_tokenizer import end_ids, open_tokenizer, with_saved_bos
from llm3d.errors import InputError
from llm3d.generate.cuda_graphs import graphs_for
from llm3d.generate.engine import Generator, Reply
from llm3d.generate.scheduler import Request, request_for
from llm3d.kernels.settings import use_settings
from llm3d.parallel.agreement import input_errors_on_all
from llm3d.parallel.collectives import gather_bytes
from llm3d.parallel.mesh import Mesh, device_of_this_process, process_group, whole_world
from llm3d.text.conversations import Fields, Message
from llm3d.text.streaming import Detokenizer, StreamPrinter
from llm3d.text.templates import Template, load_template
from llm3d.text.tokenizer import Tokenizer
from llm3d.text.unicode import has_half_a_pair
from llm3d.train.host_memory import keep_freed_memory
from llm3d.train.objective import NextToken
from llm3d.train.trainer import ShardedModel
from llm3d.wording import counted

_PORTION = 16  # times generate.max_sequences: prompts between two times that replies are written to a file


@dataclass(frozen=True)
class GenerateOptions:
    """What the command was asked for, one of the first three.

    prompt: a text.  prompts: a file of them.  chat: a conversation on the terminal.
    raw: texts are continued as they stand, without the chat template.
    output: a file for the replies to a file of prompts; None: standard output.
    overwrite: replace it where it exists.
    """

    prompt: str | None = None
    prompts: str | None = None
    chat: bool = False
    raw: bool = False
    output: Path | None = None
    overwrite: bool = False


class PromptEncoder:
    """What a run's settings name, opened: its tokenizer and its template, which make tokens of prompts."""

    def __init__(self, config: Config, raw: bool) -> None:
        """Raises InputError where something cannot be used."""
        if config.head == "score":
            raise InputError("a reward model scores replies and writes none; name another stage's settings")
        use_settings(config, device_of_this_process(config.run.device))
        self.config, tokenizer = open_tokenizer(generation_layout(config))
        if tokenizer is None:
            raise InputError("data.tokenizer: not set; name the model's tokenizer")
        self.tokenizer = with_saved_bos(self.config, tokenizer)
        self.template: Template | None = None
        if not raw:
            self.template = template_of(config, tokenizer)
        ids = end_ids(self.config, tokenizer, self.template)
        self.detokenizer = Detokenizer(tokenizer, ids, config.generate.stop)

    def tokens(self, messages: Sequence[Message], template_kwargs: Fields | None = None) -> list[int]:
        """What the model is to go on from. Raises InputError where it cannot.

        template_kwargs: what the chat template reads beside messages: tools, documents, enable_thinking, ...
        """
        if any(has_half_a_pair(message.content) for message in messages):
            raise InputError("a prompt that is not valid UTF-8")
        if self.template is not None:
            tokens = self.template.encode_prompt(messages, template_kwargs)
        else:
            text = "\n".join(message.content for message in messages)
            tokens = [*self._beginning(), *self.tokenizer.encode(text)]
        most = self.config.model.max_position_embeddings
        if not tokens:
            raise InputError("an empty prompt, and no token that begins a text")
        if len(tokens) >= most:
            raise InputError(
                f"a prompt of {counted(len(tokens), 'token')}; model.max_position_embeddings {most:,} leaves no room "
                "for a reply"
            )
        return tokens

    def _beginning(self) -> list[int]:
        bos = self.tokenizer.bos_id
        return [bos] if self.tokenizer.adds_bos and bos is not None else []

    def tokens_of(self, prompt: PlacedPrompt) -> list[int]:
        try:
            return self.tokens(prompt.messages, prompt.template_kwargs)
        except InputError as error:
            raise InputError(f"{prompt.where}: {error}") from None

    def request(self, tokens: Sequence[int], number: int) -> Request:
        """number: of the prompt."""
        return request_for(self.config, self.detokenizer, tokens, number)


def template_of(config: Config, tokenizer: Tokenizer) -> Template | None:
    """What prompts are put into: as the settings say, and for those of pretraining as the model's own files do."""
    if config.template is not None:
        return load_template(config.template, tokenizer)
    has_own = tokenizer.directory is not None and has_template(tokenizer.directory)
    return load_template("auto", tokenizer) if has_own else None


class Completion(NamedTuple):
    """A reply to a prompt, of several."""

    prompt: int
    text: str
    reason: str
    num_tokens: int
    log_probability: float  # of all its tokens


class TextGenerator:
    """A run's model, which writes. Every rank holds one and calls it at the same time.

    source: where the weights came from.
    """

    def __init__(self, encoder: PromptEncoder, mesh: Mesh) -> None:
        self.encoder, self.config, self.mesh = encoder, encoder.config, mesh
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None, "the tokenizer has told it"
        checkpoint = latest_checkpoint_or_start(self.config, mesh)
        model = ShardedModel(self.config, mesh, NextToken(vocab_size))
        self.source, _ = load_latest(model, checkpoint)
        graphs = graphs_for(mesh.device, self.config.generate.cuda_graphs)
        self.generator = Generator(model.config.model, model.stages, mesh, model.dtype, graphs)

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        first: int = 0,
        on_progress: Callable[[Sequence[int]], None] | None = None,
    ) -> list[Completion]:
        """Replies to prompts, in order, on every rank; each data rank writes its share.

        first: the number of the first prompt.
        on_progress: told of the tokens so far, on the ranks that write, for one prompt.
        """
        mesh, settings = self.mesh, self.config.generate
        requests = [self.encoder.request(tokens, first + i) for i, tokens in enumerate(prompts)]
        self.generator.check(requests, settings.cache_bytes)  # the same on every rank
        mine = range(mesh.data_rank, len(prompts), mesh.data_size)
        so_far: list[int] = []

        def on_token(request: int, reply: int, token: int) -> None:
            so_far.append(token)
            if on_progress is not None:
                on_progress(so_far)

        with input_errors_on_all(mesh.everyone):
            reply_groups = self.generator.generate(
                [requests[i] for i in mine],
                settings.max_sequences,
                settings.cache_bytes,
                on_token if on_progress else None,
            )
        written = [
            self._written(i, reply)
            for i, replies in zip(mine, reply_groups, strict=True)
            for reply in replies
        ]
        everyones = gather_bytes(json.dumps(written).encode(), mesh.data)
        return sorted(
            (Completion(*w) for part in everyones for w in json.loads(part)), key=lambda w: w.prompt
        )

    def _written(self, prompt: int, reply: Reply) -> Completion:
        text = self.encoder.detokenizer.text(reply.tokens)
        return Completion(prompt, text, reply.reason, len(reply.tokens), sum(reply.log_probabilities))


# ---- the command ----


class Opened(NamedTuple):
    """prompts, shown: of each its tokens, and how it appears beside its replies; none for a conversation."""

    encoder: PromptEncoder
    prompts: list[list[int]]
    shown: list[Any]


def check(config: Config, options: GenerateOptions) -> Opened:
    """Open what the settings name, and read the prompts. Raises InputError where something cannot be used."""
    if sum([options.prompt is not None, options.prompts is not None, options.chat]) != 1:
        raise InputError("give one of --prompt, --prompts and --chat")
    if options.output is not None:
        _check_output(options)
    encoder = PromptEncoder(config, options.raw)
    if options.chat and encoder.template is None:
        raise InputError(
            "--chat needs a chat template, which this model has not; name one with --stage sft data.template=NAME, or "
            "let --prompt continue a text"
        )
    if options.prompt is not None:
        return Opened(encoder, [encoder.tokens([Message("user", options.prompt)])], [options.prompt])
    if options.prompts is None:
        return Opened(encoder, [], [])
    prompts, _ = read_prompts(options.prompts, config.columns)
    return Opened(encoder, [encoder.tokens_of(prompt) for prompt in prompts], [p.shown for p in prompts])


def _check_output(options: GenerateOptions) -> None:
    output = options.output
    assert output is not None
    if options.prompts is None:
        raise InputError("--output is for the replies to --prompts")
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"--output: {output}: name a file in a directory that exists")
    if output.exists() and not options.overwrite:
        raise InputError(f"--output: {output} exists; name another one, or allow --overwrite")


def run(config: Config, options: GenerateOptions) -> None:
    """Generate what the options ask for, from the run's latest checkpoint or the model that the settings name."""
    with process_group(config.run.device) as device:
        if device.type == "cpu":
            keep_freed_memory()
        with input_errors_on_all(whole_world()):
            opened = check(config, options)
        writer = TextGenerator(opened.encoder, Mesh(config.parallel.tensor, config.parallel.pipeline, device))
        if writer.mesh.rank == 0:
            template = opened.encoder.template
            print(writer.source, *(template.remarks if template else ()), sep="\n", file=sys.stderr)
        if options.chat:
            converse(writer)
        elif options.prompt is not None:
            reply_to_one(writer, opened.prompts)
        else:
            reply_to_many(writer, opened, options.output)


def reply_to_one(writer: TextGenerator, prompts: Sequence[Sequence[int]]) -> None:
    """As it is written, if it is one; else each with its number."""
    if writer.config.generate.num_replies == 1:
        show_as_written(writer, prompts)
        return
    for number, written in enumerate(writer.write(prompts), 1):
        if writer.mesh.rank == 0:
            print(f"--- reply {number} ---\n{written.text}")


def show_as_written(writer: TextGenerator, prompts: Sequence[Sequence[int]], number: int = 0) -> str:
    """The reply, on every rank; rank 0 has shown it."""
    shown, speaks = StreamPrinter(writer.encoder.detokenizer), writer.mesh.rank == 0

    def show_progress(tokens: Sequence[int]) -> None:
        if speaks:
            print(shown.more(tokens), end="", flush=True)

    written, *_ = writer.write(prompts, number, show_progress)
    if speaks:
        print(shown.up_to(written.text))
    return written.text


def reply_to_many(writer: TextGenerator, opened: Opened, output: Path | None) -> None:
    """A line of JSON for each reply: its prompt, its text, why it ended, how long and how likely it is."""
    prompts, mesh = opened.prompts, writer.mesh
    portion = _PORTION * writer.config.generate.max_sequences * mesh.data_size
    started, num_replies, num_tokens = time.perf_counter(), 0, 0
    with lines_of(output, mesh) as lines:
        for first in range(0, len(prompts), portion):
            written = writer.write(prompts[first : first + portion], first)
            num_replies += len(written)
            num_tokens += sum(w.num_tokens for w in written)
            for w in written if lines is not None else ():
                row = {"prompt": opened.shown[first + w.prompt], **_fields(w)}
                print(json.dumps(row, ensure_ascii=False), file=lines, flush=True)
    if mesh.rank == 0:
        rate = num_tokens / (time.perf_counter() - started)
        totals = f"{counted(num_replies, 'reply', 'replies')}, {counted(num_tokens, 'token')}"
        print(f"{totals}, {rate:,.0f} tokens/s", file=sys.stderr)


def _fields(written: Completion) -> dict[str, Any]:
    return {
        "reply": written.text,
        "reason": written.reason,
        "tokens": written.num_tokens,
        "log_probability": round(written.log_probability, 2),
    }


@contextmanager
def lines_of(output: Path | None, mesh: Mesh) -> Iterator[TextIO | None]:
    """Where rank 0 writes; None on the others. A file has its name when all is in it, and another one before."""
    if output is None or mesh.rank:
        with input_errors_on_all(mesh.everyone):
            pass
        yield None if mesh.rank else sys.stdout
        return
    partial = output.with_name(f".{output.name}.partial")
    with input_errors_on_all(mesh.everyone):
        try:
            file = partial.open("w", encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"--output: {output}: {error.strerror}; name a file that can be written"
            ) from None
    try:
        with file:
            yield file
        partial.replace(output)
    except BaseException:
        if partial.stat().st_size:
            print(f"llm3d: what was written before is in {partial}", file=sys.stderr)
        else:
            partial.unlink()
        raise


_COMMANDS = {
    "/help": "say what there is",
    "/clear": "start anew: what was said before is forgotten",
    "/exit": "end, as do exit, quit and Ctrl-D",
}
_ENDS = ("/exit", "/quit", "exit", "quit")


def converse(writer: TextGenerator) -> None:
    """Until the user ends it; the model reads all that was said before."""
    messages: list[Message] = []
    replies = count()
    _say(writer, f"{', '.join(f'{name}: {about}' for name, about in _COMMANDS.items())}")
    with suppress(KeyboardInterrupt):
        while (line := _next_line(writer.mesh)) is not None and line.lower() not in _ENDS:
            if line.startswith("/") and " " not in line:
                messages = _obey(writer, line, messages)
            else:
                messages = _reply(writer, [*messages, Message("user", line)], replies)


def _obey(writer: TextGenerator, command: str, messages: list[Message]) -> list[Message]:
    """-> what is still known of the conversation."""
    if command == "/clear":
        _say(writer, "what was said before is forgotten")
        return []
    if command != "/help":
        _say(writer, f"no command {command}")
    _say(writer, "\n".join(f"{name:8}{about}" for name, about in _COMMANDS.items()))
    return messages


def _reply(writer: TextGenerator, messages: list[Message], replies: Iterator[int]) -> list[Message]:
    """-> the conversation with the reply, or without what could not be read."""
    try:
        tokens = writer.encoder.tokens(messages)
    except InputError as error:  # the same on every rank
        _say(writer, f"{error}; this was not read")
        return messages[:-1]
    return [*messages, Message("assistant", show_as_written(writer, [tokens], next(replies)))]


def _say(writer: TextGenerator, text: str) -> None:
    if writer.mesh.rank == 0:
        print(text, file=sys.stderr)


def _next_line(mesh: Mesh) -> str | None:
    """What the user says next, on every rank; None at the end, which Ctrl-C is, too."""
    line = b""
    while mesh.rank == 0 and not line:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            read = sys.stdin.readline()
        except KeyboardInterrupt:
            read = ""
        if not read:
            print(file=sys.stderr)
            break
        line = read.strip().encode("utf-8", errors="replace")
    return gather_bytes(line, mesh.everyone)[0].decode() or None
