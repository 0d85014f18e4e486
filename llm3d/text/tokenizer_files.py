"""What the files beside a tokenizer say of it, and what is written beside one: the rules of transformers.

tokenizer_config.json names bos, eos and other tokens; special_tokens_map.json does, too, and counts more, unless
the former has added_tokens_decoder. Tokens are added by added_tokens_decoder, else by added_tokens.json, and by the
names of tokens that the vocabulary lacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm3d.errors import InputError
from llm3d.files import read_json

if TYPE_CHECKING:
    import tokenizers

CONFIG = "tokenizer_config.json"
COPIED = ("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt")
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
COMMON = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]"),
    "eos_token": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]"),
}
_OF_CONVERSION = (
    "added_tokens_decoder",
    "add_prefix_space",
    "legacy",
    "sp_model_kwargs",
    "use_default_system_prompt",
)


@dataclass(frozen=True)
class SideFiles:
    """What lies beside a tokenizer.

    config: tokenizer_config.json, with what special_tokens_map.json says where that counts.
    added: the tokens that it adds, by their spelling, in the order of their ids.
    of_model: what generation_config.json and config.json say of the model's tokens, the former first.
    """

    config: dict[str, Any]
    added: dict[str, tokenizers.AddedToken]
    of_model: dict[str, Any]

    @classmethod
    def read(cls, directory: Path | None) -> SideFiles:
        """Raises InputError for files that are damaged."""
        if directory is None:
            return cls({}, {}, {})
        config = read_json(directory / CONFIG)
        decoder = config.get("added_tokens_decoder")
        if decoder is None:
            config = config | read_json(directory / "special_tokens_map.json")
            added = _simply_added(directory / "added_tokens.json", config)
        else:
            added = _described(directory / CONFIG, decoder)
        of_model = read_json(directory / "config.json") | read_json(directory / "generation_config.json")
        return cls(config, added, of_model)

    def with_names(self, names: Mapping[str, str | None]) -> SideFiles:
        """Where the files say nothing, what the tokenizer's own file says."""
        return replace(self, config={**names, **self.config})

    def name(self, name: str) -> str | None:
        """How the token with this name is spelled; None where there is none, or nothing is said."""
        return _spelling(self.config.get(name))

    def add_to(self, model: tokenizers.Tokenizer, normalized: bool | None = None) -> None:
        """Give the tokenizer its added tokens. normalized: look for them in normalized text, whatever the files say."""
        from tokenizers import AddedToken

        known = {token.content: token for token in model.get_added_tokens_decoder().values()}
        tokens = self.added | ({} if "added_tokens_decoder" in self.config else known)
        for text in filter(None, [*map(self.name, NAMES), *_additional(self.config)]):
            tokens[text] = tokens.get(text) or known.get(text) or AddedToken(text, normalized=False)
            tokens[text].special = True
        model.add_tokens(
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized if normalized is None else normalized,
                    special=token.special,
                )
                for token in tokens.values()
            ]
        )

    def token_id(self, name: str, model: tokenizers.Tokenizer) -> int | None:
        """The id of bos_token or eos_token: what the files say, else a special token with a common name."""
        if name in self.config and self.config[name] != "":
            text = self.name(name)
            return None if text is None else model.token_to_id(text)
        if f"{name}_id" in self.of_model:
            ids = self.of_model[f"{name}_id"]
            return ids[0] if isinstance(ids, list) and ids else ids
        special = {token.content: i for i, token in model.get_added_tokens_decoder().items() if token.special}
        return next((special[text] for text in COMMON[name] if text in special), None)

    def config_of(self, names: Mapping[str, str | None], adds_bos: bool, converted: bool) -> dict[str, Any]:
        """tokenizer_config.json for a tokenizer.json that is to be used as it stands."""
        left_out = (*_OF_CONVERSION, "add_eos_token") if converted else ()
        kept = {key: value for key, value in self.config.items() if key not in left_out}
        spelled = {name: _spelling(kept[name]) for name in NAMES if name in kept} | dict(names)
        lists = {
            name: [_spelling(token) for token in kept[name]]
            for name in ("additional_special_tokens", "extra_special_tokens")
            if isinstance(kept.get(name), list)
        }
        own = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": adds_bos}
        return {"clean_up_tokenization_spaces": False} | kept | lists | spelled | own


def _spelling(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _additional(config: Mapping[str, Any]) -> list[str | None]:
    """Special tokens without a name; transformers 5 calls them extra."""
    given = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    return [_spelling(token) for token in (given.values() if isinstance(given, dict) else given)]


def _described(file: Path, decoder: Any) -> dict[str, tokenizers.AddedToken]:
    from tokenizers import AddedToken

    try:
        by_id = sorted((int(index), dict(fields)) for index, fields in decoder.items())
        return {fields["content"]: AddedToken(**fields) for _, fields in by_id}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"{file}: added_tokens_decoder is damaged ({error}); repair or remove it") from error


def _simply_added(file: Path, config: Mapping[str, Any]) -> dict[str, tokenizers.AddedToken]:
    from tokenizers import AddedToken

    ids = read_json(file)
    if not all(isinstance(index, int) for index in ids.values()):
        raise InputError(f"{file}: an id that is no whole number; repair or remove it")
    special = {*(_spelling(config.get(name)) for name in NAMES), *_additional(config)}
    return {
        text: AddedToken(text, special=text in special, normalized=text not in special)
        for text in sorted(ids, key=ids.__getitem__)
    }
