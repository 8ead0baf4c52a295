"""What is said of a mistake."""

import pytest

from resnet_jax.errors import UsageError


def usage_error(function, *arguments, **settings) -> str:
    """The one line that ``function`` refuses its arguments with."""
    with pytest.raises(UsageError) as error:
        function(*arguments, **settings)
    text = str(error.value)
    assert "\n" not in text
    return text
