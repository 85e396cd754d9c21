import pytest
import torch
import torch.distributed as dist

from tests.integration.tiny_data import cpu_runtime, write_tiny_data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def one_rank():
    """A group of this process alone: what a run outside torchrun has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield cpu_runtime(0, 1)
    dist.destroy_process_group()
    torch.set_num_threads(threads)
