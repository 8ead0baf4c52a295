"""Weights from elsewhere come in, and ours go out."""
