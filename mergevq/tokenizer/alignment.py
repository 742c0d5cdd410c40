"""The alignment head: class token to a teacher's output (section 3.2 of the paper)."""

from jaxtyping import Float
from torch import Tensor, nn

from mergevq.layers.attention import TransformerBlock, init_transformer
from mergevq.tokenizer.config import TokenizerConfig


class AlignmentHead(nn.Module):
    """Two or three linear layers, four times as wide inside as the class token, after any further attention blocks."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        width, hidden, out = config.encoder.width, 4 * config.encoder.width, config.alignment.teacher_dim
        self.blocks = nn.ModuleList(
            TransformerBlock(width, config.encoder.heads, config.layer_scale) for _ in range(config.alignment.blocks)
        )
        init_transformer(self.blocks)
        if config.alignment.head == "two":
            middle: list[nn.Module] = [nn.LayerNorm(hidden)]
        else:
            middle = [nn.Linear(hidden, hidden), nn.GELU()]
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), *middle, nn.Linear(hidden, out))

    def forward(self, tokens: Float[Tensor, "B T D"]) -> Float[Tensor, "B Dt"]:
        """Returns the prediction; `tokens` has the class token in front."""
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.layers(tokens[:, 0])
        return out.float()
