"""What tests of localization share."""

import jax
import pytest


@pytest.fixture(scope="module")
def quick_compilation():
    """For small functions, whose tests spend most of their time in XLA."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
