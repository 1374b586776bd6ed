"""A service over a scripted engine as a process of its own: prints its address, and `closed` when its engine is."""

from fathom.data import train_bpe
from fathom.serve.app import create_app
from fathom.serve.server import listen, run
from fathom.serve.settings import ServiceSettings
from tests.data.texts import text_of
from tests.serve.fake_engine import STALL, FakeEngine


class Announcing(FakeEngine):
    """Says when it is closed."""

    def close(self, drain_seconds: float = 0.0) -> None:
        super().close(drain_seconds)
        print("closed", flush=True)


if __name__ == "__main__":
    listener = listen("127.0.0.1", 0)
    app = create_app(
        Announcing([["first", STALL]]),
        train_bpe([text_of(1, 50)], 300),
        ServiceSettings(names=("m",), drain_seconds=0.1),
    )
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    run(app, listener)
