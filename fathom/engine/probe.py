"""A grammar compiled on trial, in a process of its own with little time and memory: a program, run by its path.

`llguidance` does not bound all that it does when it compiles: intersections of expressions (`pattern` beside another,
`multipleOf` beside another, `&` in a grammar) can take gigabytes and hours, and a thread cannot be stopped. The program
reads `{"grammar": …, "limits": …, "stack": …}` from standard input, and ends well unless a signal stops it: whatever
the library says of the grammar, it has said in time. What a grammar costs here does not depend on the vocabulary.

Imports nothing of Fathom, so that it starts in a tenth of a second.
"""

import json
import os
import resource
import sys
import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_CPU_SECONDS = 3
_MEMORY_BYTES = 512 * 2**20
_NICENESS = 10


def _compile(grammar: str, limits: LLParserLimits, ended: list[bool]) -> None:
    try:
        LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
    except MemoryError:
        os.abort()
    ended.append(True)


def main() -> None:
    """Compile what standard input holds."""
    ended: list[bool] = []
    wanted = json.load(sys.stdin)
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES + wanted["stack"],) * 2)
    threading.stack_size(wanted["stack"])
    thread = threading.Thread(target=_compile, args=(wanted["grammar"], LLParserLimits(**wanted["limits"]), ended))
    thread.start()
    thread.join()
    sys.exit(not ended)


if __name__ == "__main__":
    main()
