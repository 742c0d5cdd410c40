"""Source recovery: which kept token each patch belongs to, predicted from the codes alone (section 3.2 of the
paper).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate

from mergevq.layers.attention import CrossBlock, TransformerBlock, init_transformer
from mergevq.layers.position import sinusoid, sinusoid_grid
from mergevq.tokenizer.config import TokenizerConfig


class SourceRecovery(nn.Module):
    """One learned query per patch reads the K codes, then the queries read one another; each is matched with one code
    (equation 8).

    The codes' order is the first raster position of their patches, so the rank of a code says much about where it lies:
    it is embedded, and so is K.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        rec = config.recovery
        side = config.image_size // config.downsampling
        self.embed = nn.Linear(config.num_bits, rec.width)
        # They begin as the places of their patches: learning these from noise takes about half of a short training.
        places = sinusoid_grid(side, side, rec.width, self.embed.weight.device).mT.reshape(1, rec.width, side, side)
        self.queries = nn.Parameter(places.contiguous() + torch.randn(places.shape) * 0.02)
        self.norm_codes = nn.LayerNorm(rec.width)
        self.cross_blocks = nn.ModuleList(CrossBlock(rec.width, rec.heads) for _ in range(rec.cross_depth))
        self.self_blocks = nn.ModuleList(TransformerBlock(rec.width, rec.heads, 1.0) for _ in range(rec.self_depth))
        self.norm_queries = nn.LayerNorm(rec.width)
        self.to_query = nn.Linear(rec.width, rec.width)
        self.to_key = nn.Linear(rec.width, rec.width)
        init_transformer(self)

    def forward(
        self,
        codes: Float[Tensor, "B K N"],
        num_tokens: Int[Tensor, " B"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "B L K"]:
        """Returns the logits of each patch over the kept tokens, float32; -inf at padding.

        Args:
            codes: -1 or +1, ordered by first raster position, padded to the largest K.
            num_tokens: K of each image.
            grid: rows and columns of patches; the learned queries are resized to it.
        """
        rank = torch.arange(codes.shape[1], device=codes.device)
        mask = rank < num_tokens[:, None]
        width = self.embed.out_features
        memory = self.embed(codes) + sinusoid(rank, width) + sinusoid(num_tokens, width)[:, None]
        memory = self.norm_codes(memory)
        x = resize_queries(self.queries, grid).flatten(2).mT.expand(codes.shape[0], -1, -1)
        for block in self.cross_blocks:
            x = block(x, memory, mask)
        for block in self.self_blocks:
            x = block(x)
        query, key = self.to_query(self.norm_queries(x)).float(), self.to_key(memory).float()
        with torch.autocast(x.device.type, enabled=False):
            logits = query @ key.mT / width**0.5
        return logits.masked_fill(~mask[:, None], -torch.inf)


def resize_queries(queries: Float[Tensor, "1 D rows columns"], grid: tuple[int, int]) -> Float[Tensor, "1 D R C"]:
    """Returns the learned queries for another grid of patches, by bilinear interpolation."""
    if queries.shape[-2:] == grid:
        return queries
    return interpolate(queries, size=grid, mode="bilinear", align_corners=False)


def fit_queries(recovery: SourceRecovery, grid: tuple[int, int], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the weights of a recovery for a model of another image size, and a notice if that changes them.

    Args:
        recovery: whose weights.
        grid: rows and columns of the model's own queries.
        name: where the recovery comes from.
    """
    rows, columns = recovery.queries.shape[-2:]
    tensors = recovery.state_dict()
    if (rows, columns) == grid:
        return tensors, []
    tensors["queries"] = resize_queries(recovery.queries.detach(), grid)
    return tensors, [
        f"{name} recovers {rows} x {columns} patches, this run {grid[0]} x {grid[1]}: its queries are resized"
    ]
