"""What tests share: commands as a user runs them, pictures and data, servers, processes, and how results compare."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{file.stem}" for file in sorted(Path(__file__).parent.glob("*.py"))))
