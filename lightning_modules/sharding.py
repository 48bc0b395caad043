"""FSDP2 applied from outside: each transformer layer, then each network, shards its parameters over the processes.

The models know nothing of it. Runs on any backend that torch.distributed has, also on CPU processes with gloo.
"""

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

DATA_PARALLEL = "data_parallel"  # Lightning's name for the mesh dimension


def shard(networks: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Shard every network over `mesh`, layer by layer; what is sharded already is left as it is.

    A layer list is a unit's boundary: its layers are gathered one at a time during forward and backward.
    """
    data = mesh[DATA_PARALLEL]
    for network in networks:
        if isinstance(network, FSDPModule):
            continue
        for module in list(network.modules()):
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    if not isinstance(layer, FSDPModule):
                        fully_shard(layer, mesh=data)
        fully_shard(network, mesh=data)
