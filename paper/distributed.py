"""Training on several GPUs: `torchrun --nproc_per_node=4 train.py ...`

Each process (rank) holds the model and a share of each batch; gradients are averaged (DDP). With
--fsdp it holds a share of the weights only. The clips of a step do not depend on the number of
processes. A run without torchrun has one, for which nothing here does anything.
"""

import os
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """device: cpu, cuda or mps; empty: cuda if there is one, else cpu. ValueError if it is none."""

    def __init__(self, device=""):
        self.rank = int(os.getenv("RANK", 0))
        self.ranks = int(os.getenv("WORLD_SIZE", 1))
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            if self.ranks > 1 and self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:  # no such device, or none here
            why = f"--device {device}: {error}".splitlines()[0].split(". ")[0]
            raise ValueError(why) from None
        if self.ranks > 1:
            dist.init_process_group(dist.get_default_backend_for_device(self.device))

    @contextmanager
    def first_rank_first(self):
        """Rank 0 runs the block before the others: it unpacks and downloads for all."""
        if self.rank > 0:
            dist.barrier()
        yield
        if self.rank == 0 and self.ranks > 1:
            dist.barrier()

    def wrap(self, objective, fsdp):
        """The objective, made to average its gradients over the ranks."""
        if self.ranks == 1:
            return objective
        if not fsdp:
            return DistributedDataParallel(objective)
        from torch.distributed.fsdp import fully_shard

        model = objective.model
        mesh = dist.init_device_mesh(self.device.type, (self.ranks,))
        for module in (*(model.layers if objective.codec else model.blocks), model):
            fully_shard(module, mesh=mesh)
        return objective

    def averaging(self, objective, last):
        """Gradients are averaged in the last backward pass of a step only."""
        if isinstance(objective, DistributedDataParallel):
            return nullcontext() if last else objective.no_sync()
        if self.ranks > 1:
            objective.model.set_requires_gradient_sync(last)
        return nullcontext()

    def agree(self, loss, stop):
        """-> the mean of the ranks' losses, and whether any rank was asked to stop"""
        if self.ranks == 1:
            return loss, stop
        both = torch.tensor([loss / self.ranks, float(stop)], device=self.device)
        dist.all_reduce(both)
        return both[0].item(), both[1].item() > 0

    def whole(self, v):
        """A tensor that the ranks share, in one piece; any other as it is."""
        return v.full_tensor() if hasattr(v, "full_tensor") else v

    def share_of(self, v, p):
        """A whole tensor, shared among the ranks as the parameter p is."""
        if not hasattr(p, "full_tensor"):
            return v
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(v, p.device_mesh, p.placements)

    def end(self):
        if self.ranks > 1:
            dist.barrier()  # nobody leaves while another still communicates
            dist.destroy_process_group()
