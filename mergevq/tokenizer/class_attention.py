"""Where the class token looks: its row of an attention block, laid out on the patches."""

import torch
from jaxtyping import Float
from torch import Tensor

from mergevq.errors import ConfigError, ShapeError
from mergevq.merging import check_num_tokens, merge_schedule, unmerge
from mergevq.tokenizer.arithmetic import arithmetic
from mergevq.tokenizer.encoder import MergingBlock
from mergevq.tokenizer.inputs import check_images
from mergevq.tokenizer.model import MergeVQ


@torch.no_grad()
def class_attention(
    tokenizer: MergeVQ, images: Float[Tensor, "B 3 H W"], num_tokens: int | None = None, *, block: int = -1
) -> Float[Tensor, "B heads rows columns"]:
    """Returns how much of the class token's attention each patch gets, in each head of one attention block.

    What a kept token gets is shared equally by its patches. Attention is proportional to token sizes as in the encoder,
    so a token of s patches gets what s equal tokens would get, and a patch what it would get alone. The patches of an
    image sum to 1 less what the class token gives itself. The block's weights are computed again from its input:
    nothing is recorded, and no module changes.

    Args:
        tokenizer: the model.
        images: float in [-1, 1]; the downsampling divides H and W.
        num_tokens: K; None merges nothing.
        block: number of the attention block; negative numbers count from the last. A block attends before it merges, to
            what the blocks before it have left.

    Raises:
        ShapeError: images or num_tokens are not as described, or the weights are not finite.
        ConfigError: there is no such block.

    Reference: proportional attention is equation 1 of ToMe (arXiv 2210.09461).
    """
    grid, encoder, config = check_images(images, tokenizer.config.downsampling), tokenizer.encoder, tokenizer.config
    num_patches, depth = grid[0] * grid[1], config.encoder.depth
    count = num_patches if num_tokens is None else num_tokens
    check_num_tokens(count, images.shape[0], num_patches)
    if not -depth <= block < depth:
        raise ConfigError(f"expected a block in {-depth}..{depth - 1} ({depth} attention blocks), got {block}")
    schedule = merge_schedule(num_patches, count, depth, config.merging.schedule, config.merging.overflow)
    device = encoder.class_token.device
    with arithmetic(device, None):  # As `encode` does: a map beside it is of the same tokens.
        start = encoder.embed(images.to(device, torch.float32))
        x, sizes, source = encoder.attend(*start, schedule[: block % depth])
        chosen = encoder.blocks[block]
        assert isinstance(chosen, MergingBlock)
        weights = chosen.attn.first_row(chosen.norm1(x), sizes)
    if not bool(weights.isfinite().all()):
        raise ShapeError("expected finite attention, got NaN or infinity: the model's weights are damaged")
    if sizes is not None:
        weights = weights / sizes[:, None]
    return unmerge(weights[..., 1:].mT, source).mT.unflatten(2, grid)
