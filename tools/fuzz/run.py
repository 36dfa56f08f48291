"""Coverage-guided fuzzing of the readers: `python tools/fuzz/run.py TARGET --seconds N`, or `all`.

Needs `pip install visualbert[fuzz]`, and the frameworks for the seeds, which it makes itself. A
finding is whatever is neither a load nor a `VisualBertError`, takes more than five seconds, or more
than two gigabytes; its input is kept in tools/fuzz/crashes/. Exits with 1 where there is one.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

from targets import CRASHES, TARGETS

_SCRIPT = str(Path(__file__).parent / "targets.py")
_LIMITS = ["-timeout=5", "-rss_limit_mb=2048", "-max_len=65536", "-print_final_stats=1"]


class Result(NamedTuple):
    """What came of one target."""

    executions: int
    coverage: int
    findings: int


def run(target: str, seconds: int) -> Result:
    """Fuzz one target; a crash of the process is a finding, and it is started again."""
    with tempfile.TemporaryDirectory(prefix="visualbert-fuzz-") as corpus:
        subprocess.run([sys.executable, _SCRIPT, "seeds", target, corpus], check=True)
        CRASHES.mkdir(exist_ok=True)
        end, total = time.monotonic() + seconds, Result(0, 0, 0)
        while (left := round(end - time.monotonic())) > 0:
            limits = [*_LIMITS, f"-max_total_time={left}"]
            limits.append(f"-artifact_prefix={CRASHES}/{target}-")
            found = _once([sys.executable, _SCRIPT, "fuzz", target, corpus, *limits], corpus)
            total = Result(
                total.executions + found.executions,
                max(total.coverage, found.coverage),
                total.findings + found.findings,
            )
    return total


def _once(command: list[str], temporary: str) -> Result:
    executions = coverage = findings = 0
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if found := re.match(r"#(\d+)\s.*?cov: (\d+)", line):
                executions, coverage = int(found[1]), int(found[2])
            elif line.startswith(("FINDING", "==", "SUMMARY")):
                print(line.rstrip(), flush=True)
            findings += line.startswith("FINDING")
            if found := re.match(r"stat::number_of_executed_units:\s*(\d+)", line):
                executions = int(found[1])
    return Result(executions, coverage, findings + (child.returncode != 0))


def main() -> int:
    """Parse the command line and print a line for each target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    args = parser.parse_args()
    findings = 0
    for target in TARGETS if args.target == "all" else [args.target]:
        result = run(target, args.seconds)
        findings += result.findings
        print(
            f"{target:<13}{result.executions:>10} executions  {result.coverage:>6} branches  "
            f"{result.findings} findings",
            flush=True,
        )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
