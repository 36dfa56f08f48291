"""The embedded benchmark: scenes of handwritten digits, and the five published tasks over them."""

from pathlib import Path

EXAMPLE = Path(__file__).parent / "example.png"  # a scene of the test split
