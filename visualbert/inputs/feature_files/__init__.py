"""Readers of region features, one file a format, each a `FeatureStore`."""
