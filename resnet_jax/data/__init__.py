"""Bytes on disk to batches on devices."""
