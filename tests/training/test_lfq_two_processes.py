"""Two gloo processes with DistributedDataParallel against one process with the joined batch."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mergevq.quantize import LFQ

BITS = 7
OPTIONS = {
    "global": {},
    "layer": {"norm": "layer", "eps": 1e-5},
    "grouped": {"scope": "grouped", "groups": (3, 4)},
}


class Net(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.linear = nn.Linear(5, BITS).double()
        with torch.no_grad():
            for i, p in enumerate(self.linear.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
        self.quantizer = LFQ(BITS, temperature=1.0, **options)

    def forward(self, x: Tensor, weights: Tensor | None = None):
        return self.quantizer(self.linear(x), weights)


def batch(count: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(1, count, 5, generator=rng).double(), torch.rand(1, count, generator=rng).double()


def joined(counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    (a, wa), (b, wb) = (batch(count, seed) for seed, count in enumerate(counts))
    return torch.cat([a, b], 1), torch.cat([wa, wb], 1)


def losses(out, kind: str) -> Tensor:
    if kind == "codebook":
        return out.codebook_entropy
    return 0.1 * (out.sample_entropy - out.codebook_entropy) + 0.25 * out.commitment


# Means over a process's own tokens equal the joined mean only with equal counts; the codebook entropy always does.
RUNS = [("codebook", (5, 9), True), ("codebook", (5, 9), False), ("all", (6, 6), False)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name, options in OPTIONS.items():
        for i, (kind, counts, weighted) in enumerate(RUNS):
            net = DistributedDataParallel(Net(**options))
            x, weights = batch(counts[rank], rank)
            out = net(x, weights if weighted else None)
            loss = losses(out, kind)
            loss.backward()
            results[f"{name}.{i}.loss"] = loss.detach()
            for key, p in net.module.named_parameters():
                results[f"{name}.{i}.{key}"] = p.grad
    if rank == 0:  # would wait for the other process if it communicated
        results["alone"] = Net().eval()(batch(4, 0)[0]).codebook_entropy.detach()
    save_file(results, Path(folder) / f"{rank}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="fork")
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("run", range(len(RUNS)))
def test_equals_one_process_with_the_joined_batch(both, name, run):
    kind, counts, weighted = RUNS[run]
    net = Net(**OPTIONS[name])
    x, weights = joined(counts)
    loss = losses(net(x, weights if weighted else None), kind)
    loss.backward()
    assert loss.item() > 0.1 or kind == "all"
    mean = (both[0][f"{name}.{run}.loss"] + both[1][f"{name}.{run}.loss"]) / 2
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-12, atol=0)
    if kind == "codebook":
        assert torch.equal(both[0][f"{name}.{run}.loss"], both[1][f"{name}.{run}.loss"])
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.norm() > 1e-4
        for rank in range(2):
            torch.testing.assert_close(both[rank][f"{name}.{run}.{key}"], p.grad, rtol=1e-10, atol=1e-13)


def test_one_process_may_validate_alone(both):
    expected = Net().eval()(batch(4, 0)[0]).codebook_entropy
    torch.testing.assert_close(both[0]["alone"], expected.detach(), rtol=1e-12, atol=0)
