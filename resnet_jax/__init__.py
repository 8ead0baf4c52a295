"""Residual networks of He, Zhang, Ren and Sun (2015) in JAX and Flax."""

import importlib

__version__ = "0.1.0"

# Looked up at first use, so that `import resnet_jax` and every `--help` stay quick.
_PUBLIC = {
    "create_model": "resnet_jax.models.registry",
    "load_pretrained": "resnet_jax.pretrained.source",
    "list_models": "resnet_jax.models.registry",
    "summarize": "resnet_jax.models.summary",
    "UsageError": "resnet_jax.errors",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'resnet_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
