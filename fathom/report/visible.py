"""Characters that a page and a picture must not hold as they are, made visible. What a model writes may be anything."""

_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
"""Control characters, and the pictures that Unicode has of them."""
_NO_CHARACTERS = [*range(0x80, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF]
"""Further control characters, halves of characters, and what XML forbids."""
_SHOWN = _PICTURES | dict.fromkeys(_NO_CHARACTERS, 0xFFFD)


def visible(text: str) -> str:
    """`text` as one that can be encoded, and parsed as XML once it is escaped."""
    return text.translate(_SHOWN)
