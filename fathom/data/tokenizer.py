"""Text to token ids and back: one class around the `tokenizers` library, for our folders and everyone's.

A *control token* is an added token that is not mere white space: BOS and EOS, but also role markers, `<think>`
and the FIM markers, whether or not its file flags it as special. `encode` makes one only when asked, so that
no document and no user can forge one by spelling it.
"""

import codecs
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tokenizers import Tokenizer as Backend

from fathom.config import ModelConfig
from fathom.data import chat
from fathom.errors import UserError

# Fill-in-the-middle markers, by family: what stands before the prefix, the suffix and the middle.
_FIM_MARKERS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with what a model folder says about it."""

    def __init__(
        self,
        backend: Backend,
        *,
        bos_token_id: int | None,
        eos_token_ids: Sequence[int],
        pad_token_id: int | None,
        chat_template: str | None,
    ) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        """Token that begins a text, or None where the family has none (Qwen)."""
        self.eos_token_ids = tuple(eos_token_ids)
        """Tokens that end a text; the first is the tokenizer's own and closes documents in training."""
        self.pad_token_id = pad_token_id
        self.chat_template = chat_template
        """Jinja source, or None."""

    @classmethod
    def from_folder(cls, path: str | Path) -> Self | None:
        """The tokenizer of a model folder, or None when it has no `tokenizer.json`. Raises `UserError`.

        BOS, EOS and pad are those of `tokenizer_config.json` (else of `config.json`); more EOS tokens come from
        `generation_config.json` (else `config.json`). `chat_template.jinja` goes before the template in
        `tokenizer_config.json`; of several named templates, `default` is taken.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.exists():
            return None
        try:
            backend = Backend.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises plain Exception for a file it cannot read
            raise UserError(f"{file}: not a readable tokenizer ({str(error).splitlines()[0]})") from None
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(folder / "tokenizer_config.json")
        model = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json")

        def ids(name: str) -> list[int]:
            return _ids(model.get(f"{name}_token_id"), f"{folder / 'config.json'}: {name}_token_id")

        def own(name: str) -> int | None:
            if f"{name}_token" in config:
                where = f"{folder / 'tokenizer_config.json'}: {name}_token"
                return _token_id(backend, config[f"{name}_token"], where)
            return next(iter(ids(name)), None)

        more = _ids(generation.get("eos_token_id"), f"{folder / 'generation_config.json'}: eos_token_id")
        eos = [own("eos"), *(more or ids("eos"))]
        return cls(
            backend,
            bos_token_id=own("bos"),
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
            pad_token_id=own("pad"),
            chat_template=_chat_template(folder, config),
        )

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, the form that `transformers` opens."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {f"{name}_token": token for name, token in self._named_tokens().items()}
        config["clean_up_tokenization_spaces"] = False
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        text = json.dumps(config, ensure_ascii=False, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS. With `special`, control tokens spelled in it become tokens."""
        backend = self.backend if special else self.plain_backend
        try:
            return backend.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise UserError("text: holds half of a surrogate pair, which is no character; remove it") from None

    def encode_batch(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """`encode(text)` of each, on all cores (the library's own threads; `RAYON_NUM_THREADS` limits them)."""
        backend = self.backend if special else self.plain_backend
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Only tokens flagged special are skipped."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """Text as tokens arrive: feed ids to its `push`, and `flush` at the end."""
        return TextStream(self, skip_special)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **extra: Any
    ) -> str:
        """`messages` as the string this model was trained on, BOS included: encode it with `special=True`.

        `extra` is handed to the template (`thinking=True`, `tools=[…]`). Raises `UserError`.
        """
        if self.chat_template is None:
            raise UserError("chat: this model's folder has no chat template; give it plain text instead")
        names = {f"{name}_token": token for name, token in self._named_tokens().items()}
        own = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return chat.render(self.chat_template, messages, {**own, **names, **extra})

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fim(self) -> tuple[int, int, int] | None:
        """Ids of the markers before prefix, suffix and middle, or None where the vocabulary has none."""
        for names in _FIM_MARKERS:
            begin, hole, end = (self.backend.token_to_id(name) for name in names)
            if begin is not None and hole is not None and end is not None:
                return begin, hole, end
        return None

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: the UTF-8 bytes each token stands for; 0 for control tokens and unused ids."""
        lengths = np.array([len(piece) for piece in self.pieces], dtype=np.int32)
        lengths[list(self._control_tokens)] = 0
        return lengths

    def _named_tokens(self) -> dict[str, str]:
        ids = {"bos": self.bos_token_id, "eos": next(iter(self.eos_token_ids), None), "pad": self.pad_token_id}
        return {name: self.backend.id_to_token(token) for name, token in ids.items() if token is not None}

    @functools.cached_property
    def _control_tokens(self) -> dict[int, str]:
        added = self.backend.get_added_tokens_decoder()
        return {number: token.content for number, token in added.items() if token.content.strip()}

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    @functools.cached_property
    def plain_backend(self) -> Backend:
        """A copy of `backend`, to which the spelling of a control token is ordinary text."""
        definition = json.loads(self.backend.to_str())
        # The library can overlook special tokens, and only them: here, that is what control tokens are.
        for token in definition["added_tokens"]:
            token["special"] = token["id"] in self._control_tokens
        model, spelled = definition["model"], set(self._control_tokens.values())
        if "merges" in model:  # some converted vocabularies could also reach a control token by merging
            model["merges"] = [pair for pair in model["merges"] if _merged(pair) not in spelled]
        plain = Backend.from_str(json.dumps(definition))
        plain.encode_special_tokens = True
        return plain

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of every token, as they appear inside a text; empty for unused ids."""
        added = {number: token.content for number, token in self.backend.get_added_tokens_decoder().items()}
        spell = _byte_level_piece if _is_byte_level(self.backend) else _sentencepiece_piece
        pieces = []
        for number in range(self.vocab_size):
            token = self.backend.id_to_token(number)
            pieces.append(added[number].encode() if number in added else b"" if token is None else spell(token))
        return pieces


class TextStream:
    """Decodes token by token and hands out only whole characters."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer._special_ids if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True

    def push(self, token: int) -> str:
        """The text that `token` completes: possibly none yet, when a character is still missing bytes."""
        if token in self._skipped:
            return ""
        pieces = self._tokenizer.pieces
        text = self._decoder.decode(pieces[token] if token < len(pieces) else b"")
        if self._at_start:
            self._at_start = False
            # SentencePiece writes the space before a text's first word into its token; decoding drops it.
            if text.startswith(" ") and not self._tokenizer.decode([token]).startswith(" "):
                return text[1:]
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole, usually nothing."""
        return self._decoder.decode(b"", final=True)


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise `UserError` when `tokenizer` can make token ids that a model of `config` has no embedding for."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"tokenizer and model do not match: token ids go up to {tokenizer.vocab_size - 1}, "
            f"but the model's vocab_size is {config.vocab_size}; use the model's own tokenizer "
            f"or set model.vocab_size to at least {tokenizer.vocab_size}"
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values


def _ids(value: Any, where: str) -> list[int]:
    """Files give no id, one, or a list of them."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(number) is int and number >= 0 for number in ids):
        raise UserError(f"{where} is {value!r}; expected a token id or a list of them")
    return ids


def _token_id(backend: Backend, token: Any, where: str) -> int | None:
    """Files name a token by its text or by a description of it. A name that the vocabulary lacks has no id."""
    name = token.get("content") if isinstance(token, Mapping) else token
    if token is not None and not isinstance(name, str):
        raise UserError(f"{where} is {token!r}; expected the token's text")
    return None if name is None else backend.token_to_id(name)


def _merged(pair: str | list[str]) -> str:
    """What a merge rule makes; files write it as `"a b"` or as `["a", "b"]`."""
    return "".join(pair.split(" ") if isinstance(pair, str) else pair)


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from None
    template = config.get("chat_template")
    try:
        if isinstance(template, list):
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
        if template is not None and not isinstance(template, str):
            raise TypeError
    except (KeyError, TypeError):
        where = folder / "tokenizer_config.json"
        raise UserError(f"{where}: chat_template is neither a text nor a list of named texts") from None
    return template


def _is_byte_level(backend: Backend) -> bool:
    return backend.decoder is not None and b"ByteLevel" in backend.decoder.__getstate__()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}


def _byte_level_piece(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode()


def _sentencepiece_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
