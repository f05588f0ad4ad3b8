"""Training on several GPUs: `torchrun --nproc_per_node=4 train.py ...`

Every process (rank) holds the model and a share of each batch; gradients are averaged (DDP). With
--fsdp each rank keeps a share of the weights only. The batch and its random choices do not depend
on the number of processes. `train.OneProcess` is the same interface for a single one.
"""

import os
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class Processes:
    def __init__(self, device):
        self.rank = int(os.environ["RANK"])
        self.ranks = int(os.environ["WORLD_SIZE"])
        self.device = device
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    @contextmanager
    def first_rank_first(self):
        """Rank 0 runs the block before the others: it unpacks and downloads for all."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0:
            dist.barrier()

    def wrap(self, objective, fsdp):
        """The objective, made to average its gradients over the ranks."""
        if not fsdp:
            return DistributedDataParallel(objective)
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.ranks,))
        for module in (*objective.model.blocks, objective.model):
            fully_shard(module, mesh=mesh)
        return objective

    def averaging(self, objective, last):
        """Gradients are averaged in the last backward pass of a step only."""
        if isinstance(objective, DistributedDataParallel):
            return nullcontext() if last else objective.no_sync()
        objective.model.set_requires_gradient_sync(last)
        return nullcontext()

    def agree(self, loss, stop):
        """-> the mean of the ranks' losses, and whether any rank was asked to stop"""
        both = torch.tensor([loss / self.ranks, float(stop)], device=self.device)
        dist.all_reduce(both)
        return both[0].item(), both[1].item() > 0

    def whole(self, v):
        """A tensor that the ranks share, in one piece; any other as it is."""
        return v.full_tensor() if isinstance(v, DTensor) else v

    def share_of(self, v, p):
        """A whole tensor, shared among the ranks as the parameter p is."""
        return distribute_tensor(v, p.device_mesh, p.placements) if isinstance(p, DTensor) else v

    def end(self):
        dist.barrier()  # nobody leaves while another still communicates
        dist.destroy_process_group()
