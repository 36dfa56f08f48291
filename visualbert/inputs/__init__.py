"""Text and regions on their way into a model."""
