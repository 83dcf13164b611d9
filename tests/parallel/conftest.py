"""What all tests over many devices share."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_anew(keep_no_programs):
    return keep_no_programs
