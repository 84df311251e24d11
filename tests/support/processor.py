"""What the processor of this machine can do."""

from pathlib import Path

import pytest

_told = Path("/proc/cpuinfo")
needs_bfloat16 = pytest.mark.skipif(
    _told.exists() and "avx512bw" not in _told.read_text(),
    reason="OpenVINO computes bfloat16 from AVX512 on",
)
