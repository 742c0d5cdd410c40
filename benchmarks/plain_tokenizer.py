"""The reference for the tokenizer's speed: the same network and weights, written plainly from the equations in NCHW.

Every sublayer is one obvious torch call on contiguous [B, C, H, W] or [B, T, C] tensors; merging keeps the source
matrix.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, scaled_dot_product_attention, silu

from mergevq.merging import merge_schedule
from mergevq.tokenizer.config import TokenizerConfig


class PlainTokenizer:
    """Encodes and decodes with the tensors of a `MergeVQ` of a hybrid configuration without options."""

    def __init__(self, config: TokenizerConfig, weights: dict[str, Tensor]) -> None:
        self.config = config
        self.w = {name: tensor.contiguous() for name, tensor in weights.items()}

    def reconstruct(self, images: Tensor, num_tokens: int) -> Tensor:
        codes, source = self.encode(images, num_tokens)
        batch, patches = source.shape[0], source.shape[2]
        side = int(patches**0.5)
        return self.decode((codes.mT @ source).reshape(batch, -1, side, side))

    def encode(self, images: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        enc = self.config.encoder
        x = conv2d(images, self.w["encoder.stem.conv_in.weight"], padding=1)
        for i, count in enumerate(enc.blocks):
            for j in range(count):
                x = self._residual(f"encoder.stem.levels.{i}.{j}", x)
            if i < len(enc.blocks) - 1:
                x = self._conv(f"encoder.stem.downsample.{i}", x, stride=2)
        x = x.flatten(2).transpose(1, 2).contiguous()
        x = torch.cat([self.w["encoder.class_token"].expand(x.shape[0], -1, -1), x], 1)
        sizes = torch.ones(x.shape[:2])
        source = torch.eye(x.shape[1]).expand(x.shape[0], -1, -1)
        schedule = merge_schedule(x.shape[1] - 1, num_tokens, enc.depth)
        for i, merged in enumerate(schedule):
            name = f"encoder.blocks.{i}"
            y, k = self._attention(f"{name}.attn", self._norm(f"{name}.norm1", x), enc.heads, sizes)
            x = x + self.w[f"{name}.ls1"] * y
            if merged:
                x, sizes, source = self._merge(x, sizes, source, k.mean(1), merged)
            y = gelu(self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", x)))
            x = x + self.w[f"{name}.ls2"] * self._linear(f"{name}.mlp.fc2", y)
        x, source = x[:, 1:], source[:, 1:, 1:]
        order = source.argmax(2).argsort(1)
        x = x.gather(1, order[..., None].expand_as(x))
        source = source.gather(1, order[..., None].expand_as(source))
        x = self._group("encoder.norm_out", x.transpose(1, 2))
        z = self._linear("encoder.code_out", silu(x).transpose(1, 2))
        return torch.where(z > 0, 1.0, -1.0), source

    def decode(self, codes: Tensor) -> Tensor:
        dec = self.config.decoder
        x = self._conv("decoder.conv_in", codes)
        x = x + conv2d(
            x, self.w["decoder.position.weight"], self.w["decoder.position.bias"], padding=1, groups=x.shape[1]
        )
        batch, width, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2).contiguous()
        for i in range(dec.depth):
            name = f"decoder.blocks.{i}"
            y, _ = self._attention(f"{name}.attn", self._norm(f"{name}.norm1", x), dec.heads, None)
            x = x + self.w[f"{name}.ls1"] * y
            y = self._linear(f"{name}.mlp.fc1", self._norm(f"{name}.norm2", x))
            y = y.transpose(1, 2).reshape(batch, 4 * width, rows, columns)
            weight, bias = self.w[f"{name}.mlp.dwconv.weight"], self.w[f"{name}.mlp.dwconv.bias"]
            y = gelu(conv2d(y, weight, bias, padding=1, groups=4 * width)).flatten(2).transpose(1, 2)
            x = x + self.w[f"{name}.ls2"] * self._linear(f"{name}.mlp.fc2", y)
        x = x.transpose(1, 2).reshape(batch, width, rows, columns)
        mean, std = codes.mean((2, 3)), (codes.var((2, 3)) + 1e-6).sqrt()
        for i in range(len(dec.blocks) - 1, -1, -1):
            name = f"decoder.adaptive.{i}"
            scale, shift = self._linear(f"{name}.gamma", std), self._linear(f"{name}.beta", mean)
            x = group_norm(x, self.config.num_groups, eps=1e-6) * scale[..., None, None] + shift[..., None, None]
            for j in range(dec.blocks[i]):
                x = self._residual(f"decoder.levels.{i}.{j}", x)
            if i > 0:
                y = self._conv(f"decoder.upsample.{i - 1}.conv", x)
                batch, channels, rows, columns = y.shape
                y = y.view(batch, 2, 2, channels // 4, rows, columns).permute(0, 3, 4, 1, 5, 2)
                x = y.reshape(batch, channels // 4, 2 * rows, 2 * columns)
        return self._conv("decoder.out", silu(self._group("decoder.norm_out", x)))

    def _merge(
        self, x: Tensor, sizes: Tensor, source: Tensor, metric: Tensor, merged: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        metric = metric / metric.norm(dim=-1, keepdim=True)
        scores = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
        scores[:, 0] = -torch.inf
        best, partner = scores.max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        keep, move = order[:, merged:].sort(-1).values, order[:, :merged]
        goal = partner.gather(1, move)
        rest = keep.shape[1]
        # One matrix per image from old tokens to new ones, used for tokens, sizes and the source alike.
        assign = torch.zeros(x.shape[0], rest + x.shape[1] // 2, x.shape[1])
        rows = torch.arange(x.shape[0])[:, None]
        assign[rows, torch.arange(rest), 2 * keep] = 1
        assign[rows, rest + torch.arange(x.shape[1] // 2), 2 * torch.arange(x.shape[1] // 2) + 1] = 1
        assign[rows, rest + goal, 2 * move] = 1
        new_sizes = (assign @ sizes[..., None]).squeeze(-1)
        return assign @ (x * sizes[..., None]) / new_sizes[..., None], new_sizes, assign @ source

    def _residual(self, name: str, x: Tensor) -> Tensor:
        y = conv2d(silu(self._group(f"{name}.norm1", x)), self.w[f"{name}.conv1.weight"], padding=1)
        y = conv2d(silu(self._group(f"{name}.norm2", y)), self.w[f"{name}.conv2.weight"], padding=1)
        shortcut = self.w.get(f"{name}.shortcut.weight")
        return y + (x if shortcut is None else conv2d(x, shortcut))

    def _attention(self, name: str, x: Tensor, heads: int, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, width = x.shape
        q, k, v = self._linear(f"{name}.qkv", x).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        bias = None if sizes is None or bool((sizes == 1).all()) else sizes.log()[:, None, None]
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self._linear(f"{name}.proj", y.transpose(1, 2).reshape(batch, length, width)), k

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return conv2d(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=stride, padding=1)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def _group(self, name: str, x: Tensor) -> Tensor:
        return group_norm(x, self.config.num_groups, self.w[f"{name}.weight"], self.w[f"{name}.bias"], eps=1e-6)
