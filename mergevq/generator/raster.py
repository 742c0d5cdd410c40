"""MergeAR: every patch in raster order, one after the other, with duplicates leaving the attention's memory."""

import torch
from jaxtyping import Int
from torch import Tensor

from mergevq.generator.masks import attention_bias
from mergevq.generator.model import Generator


class MergeAR(Generator):
    """Generates the codebook index of all L patches in raster order; equal ones become one token of the result.

    A token sees the R right before it, and of older tokens with equal index only one, so the keys and values of the
    others can be dropped. `mask.recent = None` drops nothing, which is LlamaGen.

    Reference: MergeVQ section 4.1.
    """

    order = "raster"

    def forward(
        self,
        index: Int[Tensor, "B L"],
        classes: Int[Tensor, " B"],
        num_tokens: Int[Tensor, " B"],
        duplicates: Int[Tensor, "B L"] | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns the logits of every bit group at every patch, [B, L, 2**bits] each. Checks nothing.

        Args:
            index: the true index of every patch.
            classes: numbers; `num_classes` is no class, which training draws for some samples.
            num_tokens: K of each image, for the instruction.
            duplicates: labels of the patches, the source map for example: equal ones count as duplicates in the mask.
                None takes the index.
        """
        transformer, prefix = self.transformer, self.config.prefix_length
        bias = attention_bias(index if duplicates is None else duplicates, self.config.mask, prefix)
        x = torch.cat([transformer.prefix(classes, num_tokens), transformer.embed(index[:, :-1])], 1)
        hidden = transformer(x, transformer.rotation[: x.shape[1]], bias)
        return transformer.group_logits(hidden[:, prefix - 1 :], index)
