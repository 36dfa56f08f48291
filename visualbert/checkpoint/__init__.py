"""Files to canonical tensors and back: reading, the strict match, writing, initial values."""
