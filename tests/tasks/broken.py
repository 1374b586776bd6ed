"""A task whose check does what the answer says, all that a check should not do included."""

import os
import random
import signal
import subprocess
import sys
import time

from fathom.tasks.task import Problem, Task


class Broken(Task):
    """`42` is right."""

    name = "broken"

    def problem(self, random: random.Random, level: int) -> Problem:
        return Problem(f"Say 42, {random.random()}.", "42")

    def check(self, problem: Problem, answer: str) -> float:
        match answer.split():
            case ["raise"]:
                raise ValueError("of two\nlines")
            case ["nan" | "inf"]:
                return float(answer)
            case ["two"]:
                return 2.0
            case ["none"]:
                return None
            case ["deep"]:
                return self.check(problem, answer)
            case ["hang"]:
                while True:
                    time.sleep(1)
            case ["hang", "in", "C"]:
                sum(range(10**15))
            case ["exit"]:
                os._exit(0)
            case ["leave"]:
                sys.exit(0)
            case ["crash"]:
                os.kill(os.getpid(), signal.SIGSEGV)
            case ["print"]:
                print("x" * 1_000_000)
                sys.stderr.write("x" * 1_000_000)
            case ["close"]:
                sys.stdout.close()
            case ["deaf"]:
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                    signal.signal(number, signal.SIG_IGN)
                time.sleep(3600)
            case ["once", flag]:
                if not os.path.exists(flag):
                    open(flag, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
                return 1.0
            case ["child", flag]:
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
                with open(flag, "w") as file:
                    file.write(str(child.pid))
                time.sleep(3600)
        return float(answer == problem.answer)
