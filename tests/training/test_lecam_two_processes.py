"""LeCam's running means are those of all processes' logits, so that the state saved by one is everyone's."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from mergevq.losses.adversarial import LeCam


def logits(rank: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(10 * rank + seed)) + rank


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    lecam = LeCam(0.9)
    for seed in range(3):
        lecam.update(logits(rank, seed), logits(rank, seed + 5))
    save_file(lecam.state_dict(), Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_both_processes_hold_the_means_of_the_joined_batch(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method="fork")
    lecam = LeCam(0.9)
    for seed in range(3):
        lecam.update(*(torch.cat([logits(0, s), logits(1, s)]) for s in (seed, seed + 5)))
    for rank in range(2):
        state = load_file(tmp_path / f"{rank}.safetensors")
        torch.testing.assert_close(state, dict(lecam.state_dict()), rtol=1e-6, atol=0)
