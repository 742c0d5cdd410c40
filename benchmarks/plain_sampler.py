"""The sampler to beat: plain causal attention over a static cache, as the authors' release samples, with our weights.

Every token attends to all slots of the whole length, masked or not, and the bit groups of each token get new caches of
that length, of which they use as many slots as there are groups.
"""

import torch
from torch import Tensor

from mergevq.generator.raster import Batch
from mergevq.generator.transformer import KeyValues, Transformer
from mergevq.quantize import join_index
from mergevq.sampling import GroupSampling, draw, filter_logits, guide


class PlainSampler:
    """Static caches of one batch.

    Args:
        transformer: whose weights are used.
        rows: images, twice with guidance.
    """

    def __init__(self, transformer: Transformer, rows: int) -> None:
        config = transformer.config
        self.transformer = transformer
        self.length = -(-(config.prefix_length + config.num_patches) // 8) * 8
        self.device = transformer.norm.weight.device
        self.shape = (rows, config.num_kv_heads, self.length, config.head_width)
        memory = torch.zeros(2, config.depth, *self.shape, device=self.device)
        self.cache = KeyValues(memory[0], memory[1])
        self.slots = torch.arange(self.length, device=self.device)

    def fill_prefix(self, classes: Tensor, num_tokens: Tensor) -> Tensor:
        x = self.transformer.prefix(classes, num_tokens)
        return self._forward(x, self.slots[: x.shape[1]])[:, -1]

    def feed_token(self, step: int, previous: Tensor) -> Tensor:
        rows = self.shape[0]
        x = self.transformer.embed(previous[:, None]).repeat(rows // previous.shape[0], 1, 1)
        at = self.transformer.config.prefix_length - 1 + step
        return self._forward(x, self.slots[at : at + 1])[:, 0]

    def _forward(self, x: Tensor, slots: Tensor) -> Tensor:
        bias = torch.where(self.slots <= slots[:, None], 0.0, -torch.inf)[None, None]
        hidden: Tensor = self.transformer(x, self.transformer.rotation[slots], bias, self.cache, slots)
        return hidden

    def draw_token(self, hidden: Tensor, batch: Batch, step: int, groups: tuple[GroupSampling, ...]) -> list[Tensor]:
        """Draws token `step` into the batch; returns the logits of its groups."""
        transformer = self.transformer
        caches = [tuple(torch.zeros(2, *self.shape, device=self.device)) for _ in transformer.group_blocks]
        parts: list[Tensor] = []
        found = []
        x = hidden[:, None]
        for group, head in enumerate(transformer.heads):
            slot = self.slots[group : group + 1]
            for block, cache in zip(transformer.group_blocks, caches, strict=True):
                x = block(x, transformer.group_rotation[group : group + 1], self.slots <= slot[:, None], cache, slot)
            logits = head(transformer.norm(x[:, 0]))
            found.append(logits)
            branches = logits.shape[0] // batch.index.shape[0]
            if branches == 2:
                logits = guide(*logits.chunk(2), batch.scales[step, group])
            how = groups[group]
            logits = filter_logits(logits, how.temperature, how.top_k, how.top_p)
            parts.append(draw(logits, batch.uniforms[:, step, group]))
            if group + 1 < len(transformer.heads):
                x = transformer.embeddings[group](parts[group]).repeat(branches, 1)[:, None]
        batch.index[:, step] = join_index(torch.stack(parts, -1), transformer.config.groups)
        return found
