"""Small byte-level vocabularies: every byte, an end-of-text token, pieces chosen by the test, and think tags or not."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fathom.data.tokenizer import Tokenizer, _byte_alphabet

EOS = 256
QWEN_LIKE = "{{ '<think>\\n' + m.reasoning + '\\n</think>\\n\\n' + m.content }}"


def byte_vocabulary(*pieces: bytes, tags: bool = False, template: str | None = None) -> Tokenizer:
    """Token n is byte n up to 255, then end of text, then `pieces`; with `tags`, then both think tags."""
    letters = {byte: letter for letter, byte in _byte_alphabet().items()}
    vocabulary = {letters[byte]: byte for byte in range(256)} | {"<eos>": EOS}
    for piece in pieces:
        vocabulary["".join(letters[byte] for byte in piece)] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    if tags:
        backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    return Tokenizer(backend, bos_token_id=None, eos_token_ids=[EOS], pad_token_id=None, chat_template=template)
