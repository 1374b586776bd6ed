"""A program that ends while its engine is at work, without closing it: by its last line or by Ctrl-C in `generate`."""

import os
import signal
import sys
import threading

from fathom.engine.engine import Engine, EngineSettings
from tests.engine.running import MLA, PLAIN, ask
from tests.model.configs import build

if __name__ == "__main__":
    engine = Engine(build(MLA), PLAIN, EngineSettings(cache_memory=2**22))
    begun = threading.Event()
    for _ in range(8):
        engine.submit(ask([5], 500), lambda _: begun.set())
    begun.wait()
    if sys.argv[1] == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background lacks it
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        while True:
            engine.generate([[5]] * 8, max_tokens=500)
