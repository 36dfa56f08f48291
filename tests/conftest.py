"""Lets the tests be interrupted; prints, after them, how far each framework is from the original
authors' numbers.
"""

import signal


def pytest_configure():
    """A shell's background jobs ignore Ctrl-C, and so would what the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
