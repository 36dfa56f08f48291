"""A process of its own that opens the files of the tests, which may not grow, hang or crash."""

import json
import select
import subprocess
import sys

import pytest

LOOP = """
import json, sys, time
from visualbert import VisualBertError

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

print("ready", flush=True)
for line in sys.stdin:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, started = peak(), time.process_time()
    try:
        answer = attempt(json.loads(line))
    except VisualBertError as error:
        answer = {"outcome": "refused", "text": str(error)}
    except BaseException as error:
        answer = {"outcome": repr(error)[:500], "text": ""}
    answer |= {"seconds": time.process_time() - started, "megabytes": (peak() - before) / 1024}
    print(json.dumps(answer), flush=True)
"""


class Opener:
    """The process.

    Args:
        code: defines `attempt(request)`, which gives `outcome` and `text`, and sets the limits.
        outcomes: that are no failure; "refused", a `VisualBertError`, is always one of them.
        seconds: of the processor that an answer may take.
        patience: seconds of the clock, which other processes share.
        megabytes: that it may add to the process.
        options: of `subprocess.Popen`.
    """

    def __init__(self, code, *outcomes, seconds, patience, megabytes, **options):
        self.command = [sys.executable, "-c", code + LOOP]
        self.outcomes = "refused", *outcomes
        self.seconds, self.patience, self.megabytes = seconds, patience, megabytes
        self.options = options
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **self.options
        )
        assert self.process.stdout.readline() == b"ready\n"

    def stop(self):
        self.process.kill()
        return self.process.wait()

    def ask(self, request, name):
        """What came of it: the outcome, a text in one line, and what it took."""
        stdin, stdout = self.process.stdin, self.process.stdout
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        answered = select.select([stdout], [], [], self.patience)[0]
        line = stdout.readline() if answered else b""
        if not line:
            code = self.stop()
            self.start()
            pytest.fail(f"{'crashed' if answered else 'hangs'} on {name} ({code})")
        answer = json.loads(line)
        assert answer["outcome"] in self.outcomes, (name, answer)
        assert answer["seconds"] < self.seconds, (name, answer)
        assert answer["megabytes"] < self.megabytes, (name, answer)
        assert "\n" not in answer["text"], (name, answer)
        return answer
