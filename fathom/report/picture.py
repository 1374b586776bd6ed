"""A figure as PNG, for where SVG is not shown: in light colours, twice as fine as it is large."""

import re

from fathom.errors import UserError

ZOOM = 2
_VARIABLE = re.compile(r"(--[a-z0-9]+): ([^;]+);")
_DARK = re.compile(r"@media \(prefers-color-scheme: dark\) \{.*?\n\}\n", re.DOTALL)
_TYPE = "DejaVu Sans, Liberation Sans, Arial, Helvetica, sans-serif"
_LETTER = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="20" height="20">'
    f'<text y="16" font-family="{_TYPE}" font-size="13">M</text></svg>'
)


def png_of(svg: str) -> bytes:
    """The picture that a figure drawn `alone` shows. Raises `UserError` where what draws it, or a font, is missing."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("PNG needs a package that is not installed: pip install 'fathom-lm[report]'") from None
    if resvg_py.svg_to_bytes(svg_string=_LETTER) == resvg_py.svg_to_bytes(svg_string=_LETTER.replace(">M<", "><")):
        raise UserError("PNG needs a font, and this machine has none: install one, such as DejaVu Sans")
    return bytes(resvg_py.svg_to_bytes(svg_string=in_the_light(svg), zoom=ZOOM))


def in_the_light(svg: str) -> str:
    """Without what only browsers know: variables of its style have the values that they have in the light."""
    before, _, rest = svg.partition("<style>")
    style, _, behind = rest.partition("</style>")
    light = _DARK.sub("", style)
    values = dict(_VARIABLE.findall(light))
    light = re.sub(r"var\((--[a-z0-9]+)\)", lambda found: values[found[1]], _VARIABLE.sub("", light))
    light = re.sub(r"font: 13px [^;]+;", f"font-family: {_TYPE}; font-size: 13px;", light)
    return f"{before}<style>{light}</style>{behind}"
