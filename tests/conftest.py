"""What all tests share: properties are tried without a deadline, for a machine may be busy."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture
def world_of_one() -> Iterator[None]:
    """A process group of this process alone, on a GPU if there is one."""
    import torch.distributed as dist

    from llm3d.parallel.mesh import start_process_group

    start_process_group()
    yield
    dist.destroy_process_group()
