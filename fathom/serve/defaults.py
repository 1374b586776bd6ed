"""How tokens are drawn for requests that do not say."""

import json
from pathlib import Path

from fathom.engine.protocol import Sampling
from fathom.errors import UserError


def default_sampling(model: Path, *, temperature: float | None = None, top_p: float | None = None) -> Sampling:
    """What is given here, else what the model folder's `generation_config.json` says, else OpenAI's 1.0 for both.

    `model` may be a `.gguf` file, which has none. Raises `UserError` for a file that cannot be read as such.
    """
    file = model / "generation_config.json"
    published = _read(file) if file.is_file() else {}
    own = {name: published[name] for name in ("temperature", "top_p") if published.get(name) is not None}
    given = {name: value for name, value in {"temperature": temperature, "top_p": top_p}.items() if value is not None}
    return Sampling.parse(own, where=str(file)).replace(**given)


def _read(file: Path) -> dict[str, object]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{file}: is not a JSON object; remove or repair it")
    return value
