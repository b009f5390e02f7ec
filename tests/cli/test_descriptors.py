"""`klein serve` takes the descriptors that it is allowed to take, and no more."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
from app.cli.system_limits import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_file_limit(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "now"), [(256, 900, 900), (256, 4000, 2048), (3000, 4000, 3000)]
)
def test_the_limit_is_raised_as_far_as_it_may_be(soft, hard, now) -> None:
    """To 2,048, or to the hard limit, and never lowered; the hard limit stays."""
    program = PROGRAM.format(soft=soft, hard=hard)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert ran.stdout.split() == [str(now), str(now), str(hard)]
