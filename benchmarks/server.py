"""`fathom serve` in a process of its own, for benchmarks that ask over HTTP."""

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_START_SECONDS = 300
_END_SECONDS = 60
_ANNOUNCED = re.compile(r"fathom: (opening |compiling |model name |requests that |serving at |.*: context of )")


class Server:
    """The command on a free port of loopback; `close` ends it and gives its exit code."""

    def __init__(self, model: str, *options: str) -> None:
        self._log = tempfile.NamedTemporaryFile(suffix=".log")  # noqa: SIM115 (lives as long as the server)
        command = [sys.executable, "-m", "fathom.cli", "serve", model, "--port", "0", "--served-model-name", "served"]
        self._process = subprocess.Popen([*command, *options], stdout=self._log, stderr=self._log)
        self.url = self._wait_for_address()

    def resident_bytes(self) -> int:
        """What of its memory is in RAM."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None, status
        return int(found[1]) * 1024

    def complaints(self) -> list[str]:
        """Lines of its log other than what it says on starting."""
        lines = Path(self._log.name).read_text(errors="replace").splitlines()
        return [line for line in lines if not _ANNOUNCED.match(line)]

    def close(self) -> int:
        """Ask it to end with SIGTERM. Returns its exit code, negative where a signal had to end it."""
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _wait_for_address(self) -> str:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until and self._process.poll() is None:
            found = re.search(r"serving at (http://\S+) ", Path(self._log.name).read_text(errors="replace"))
            if found:
                return found[1]
            time.sleep(0.1)
        self._process.kill()
        raise SystemExit(f"the server did not start:\n{Path(self._log.name).read_text(errors='replace')}")
