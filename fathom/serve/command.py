"""The verb `fathom serve`: its options, and from them the service."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fathom.errors import UserError
from fathom.options import between, gigabytes, open_for_text, port, positive, say_opening

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fathom.serve.settings import ServiceSettings


def add_service(parser: argparse.ArgumentParser) -> None:
    """All options but the model."""
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; the default is reachable from this machine alone")
    add("--port", type=port, default=8000, help="port to listen on; 0 takes a free one (8000)")
    add("--api-key", action="append", default=[], help="a key that clients must send; can be repeated; 'ps' shows it")
    add("--api-key-file", type=Path, help="file with such keys, one a line; FATHOM_API_KEYS holds more")
    add("--served-model-name", action="append", help="name for requests to give, can be repeated (the model's own)")
    add("--temperature", type=between(0, 2), help="for requests that give none (the model's, else 1.0)")
    add("--top-p", type=between(0, 1, open=True), help="for requests that give none (the model's, else 1.0)")
    add(
        "--allow-origin",
        action="append",
        default=[],
        help="origin whose web pages may ask, can be repeated; '*' is all",
    )
    add("--max-context", type=positive, help="longest prompt and answer together, in tokens (the model's)")
    add("--cache-memory", type=gigabytes, help="gigabytes for the KV cache (1.07)")
    add("--kv-cache", choices=["fp8"], help="keep latents in FP8: three fifths of the memory, slightly other text")
    add("--max-running", type=positive, help="requests computed at once (256)")
    add("--queue", type=positive, help="requests that may wait; more get a 503 (1024)")
    add("--weights", choices=["int8", "fp8"], help="round weights for speed; the text changes slightly (as loaded)")
    add("--rate", type=positive, help="requests a minute for each key; more get a 429 (no bound)")
    add("--concurrency", type=positive, help="requests at once for each key; more get a 429 (no bound)")
    add("--log-requests", action="store_true", help="a line for each request on standard error; no texts, no keys")
    add("--max-body", type=positive, default=8, help="megabytes of the longest request (8)")
    add("--drain", type=positive, default=30, help="seconds that running answers may take after SIGTERM (30)")


def serve(options: argparse.Namespace) -> int:
    """Listen, open the model, and answer until told to stop."""
    try:
        from fathom.serve.server import announcement, check_origins, listen, read_keys, run, served_hosts
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}: pip install 'fathom-lm[serve]'") from None
    from fathom.serve.machine import check_cache_memory
    from fathom.serve.settings import ServiceSettings

    if options.cache_memory is not None:
        check_cache_memory(options.cache_memory)
    settings = ServiceSettings(
        names=tuple(options.served_model_name or [_served_name(options.model)]),
        api_keys=read_keys(options.api_key, options.api_key_file),
        allow_origins=check_origins(options.allow_origin),
        log_requests=options.log_requests,
        requests_per_minute=options.rate,
        concurrent_requests=options.concurrency,
        max_body_bytes=options.max_body * 10**6,
        drain_seconds=options.drain,
    )
    # The address first: that it is taken should not be learnt after minutes of loading.
    with listen(options.host, options.port) as listener:
        hosts = served_hosts(listener, options.host, settings.allow_origins)
        app = _service(options, settings.replace(hosts=hosts))
        for line in announcement(listener, app.state.service.settings):
            print(f"fathom: {line}", file=sys.stderr)
        run(app, listener)
    return 0


def _service(options: argparse.Namespace, settings: "ServiceSettings") -> "FastAPI":
    """The application over the model that the command line names."""
    say_opening(options, tell=True)
    from fathom.engine.engine import Engine, EngineSettings
    from fathom.serve.app import create_app
    from fathom.serve.defaults import default_sampling
    from fathom.train.run import model_folder

    model, tokenizer = open_for_text(options, tell=True)
    sampling = default_sampling(model_folder(options.model), temperature=options.temperature, top_p=options.top_p)
    sizes = {
        "context": options.max_context,
        "cache_memory": None if options.cache_memory is None else int(options.cache_memory * 1e9),
        "kv_cache": options.kv_cache,
        "max_running": options.max_running,
        "queue": options.queue,
        "weights": options.weights,
    }
    given = {name: value for name, value in sizes.items() if value is not None}
    engine = Engine(model, tokenizer, EngineSettings.parse(given, where="serve"))
    return create_app(engine, tokenizer, settings.replace(sampling=sampling))


def _served_name(model: str) -> str:
    """What requests call a model by: the folder's or file's name, or all of a hub name."""
    path = Path(model)
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model
