"""What several test modules stand on. Their asserts say what they compared, as those of the tests do."""

import pkgutil

import pytest

pytest.register_assert_rewrite(*(module.name for module in pkgutil.iter_modules(__path__, f"{__name__}.")))
