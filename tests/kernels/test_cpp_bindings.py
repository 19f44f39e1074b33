"""Where the C++ library can't be built, the user hears why."""

import pytest

from unlocked.kernels.cpp import bindings


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    bindings.load_kernels.cache_clear()
    try:
        with pytest.raises(ValueError, match="install g\\+\\+ or clang"):
            bindings.load_kernels()
    finally:
        bindings.load_kernels.cache_clear()
