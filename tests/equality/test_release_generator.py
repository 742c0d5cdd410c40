"""A converted generator against the released second stage, written again from a description of it in words.

Plainly: one image, one branch and one position after the other, in float64, without a cache.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mergevq.convert import generator_from_release
from mergevq.generator.raster import MergeAR
from mergevq.sampling import draw, filter_logits, guide, image_uniforms

OPTIONS = {
    "vocab_size": 512,  # Written in their files, and read by nothing in factorised models.
    "block_size": 16,
    "spatial_n_layer": 3,
    "factorized_n_layer": 2,
    "factorized_bits": [3, 4],
    "n_head": 4,
    "dim": 48,
    "cond_dim": 48,
    "multiple_of": 32,
    "token_factorization": True,
    "class_num": 5,
}
STEPS = 16


def release_state(options: dict = OPTIONS, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the authors' names, large enough for every one of them to matter."""
    rng = torch.Generator().manual_seed(seed)
    width, heads = options["dim"], options["n_head"]
    kv = options.get("n_kv_head", heads) * (width // heads)
    multiple = options.get("multiple_of", 256)
    hidden = math.ceil(int(8 * width / 3) / multiple) * multiple
    pre, post = (2**b for b in options["factorized_bits"])
    shapes = {
        "pre_emb.weight": (pre, width),
        "post_emb.weight": (post, width),
        "class_emb.embedding_table.weight": (options["class_num"] + 1, width),
        "norm.weight": (width,),
        "head.0.weight": (pre, width),
        "head.1.weight": (post, width),
    }
    for stack, depth in (("spatial", options["spatial_n_layer"]), ("factorized", options["factorized_n_layer"])):
        for i in range(depth):
            block = f"{stack}_blocks.{i}"
            shapes |= {
                f"{block}.attention.wqkv.weight": (width + 2 * kv, width),
                f"{block}.attention.wo.weight": (width, width),
                f"{block}.feed_forward.w1.weight": (hidden, width),
                f"{block}.feed_forward.w3.weight": (hidden, width),
                f"{block}.feed_forward.w2.weight": (width, hidden),
                f"{block}.attention_norm.weight": (width,),
                f"{block}.ffn_norm.weight": (width,),
            }
    scale = {1: 0.3, 2: 0.15}
    return {n: scale[len(s)] * torch.randn(s, generator=rng) + (len(s) == 1) for n, s in shapes.items()}


class Release:
    """The released second stage in float64; every call computes all it needs from the start."""

    def __init__(self, state: dict[str, Tensor], options: dict) -> None:
        self.w = {name: tensor.double() for name, tensor in state.items()}
        self.options = options
        self.eps = options.get("norm_eps", 1e-5)
        side = math.isqrt(options["block_size"])
        half = options["dim"] // options["n_head"] // 2
        frequencies = [options.get("rope_base", 10000) ** (-2 * k / half) for k in range(half // 2)]
        cells = [[r * f for f in frequencies] + [c * f for f in frequencies] for r in range(side) for c in range(side)]
        turned = torch.polar(torch.ones(side * side, half, dtype=torch.float64), torch.tensor(cells).double())
        # The class slot turns by a table entry of zeros.
        self.table = torch.cat([torch.zeros(1, half, dtype=torch.complex128), turned])

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[name]

    def block(self, x: Tensor, name: str) -> Tensor:
        """[T, D] -> [T, D]; slot p turns by row p of the table."""
        heads = self.options["n_head"]
        kv_heads = self.options.get("n_kv_head", heads)
        d = self.options["dim"] // heads
        y = self.norm(x, f"{name}.attention_norm.weight") @ self.w[f"{name}.attention.wqkv.weight"].T
        q, k, v = y.split([heads * d, kv_heads * d, kv_heads * d], -1)

        def turn(z: Tensor) -> Tensor:
            pairs = torch.view_as_complex(z.reshape(*z.shape[:-1], d // 2, 2).contiguous())
            return torch.view_as_real(pairs * self.table[: len(x), None]).flatten(-2)

        q, k, v = turn(q.view(-1, heads, d)), turn(k.view(-1, kv_heads, d)), v.view(-1, kv_heads, d)
        out = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(heads):
                g = h * kv_heads // heads
                weights = torch.softmax(k[: t + 1, g] @ q[t, h] / math.sqrt(d), 0)
                out[t, h] = weights @ v[: t + 1, g]
        x = x + out.flatten(1) @ self.w[f"{name}.attention.wo.weight"].T
        y = self.norm(x, f"{name}.ffn_norm.weight")
        gate, value = (y @ self.w[f"{name}.feed_forward.{w}.weight"].T for w in ("w1", "w3"))
        return x + (F.silu(gate) * value) @ self.w[f"{name}.feed_forward.w2.weight"].T

    def hidden(self, pre: list[int], post: list[int], label: int) -> Tensor:
        """Position p predicts token p, given the tokens before it."""
        tokens = self.w["pre_emb.weight"][pre] + self.w["post_emb.weight"][post]
        x = torch.cat([self.w["class_emb.embedding_table.weight"][[label]], tokens])
        for i in range(self.options["spatial_n_layer"]):
            x = self.block(x, f"spatial_blocks.{i}")
        return x

    def group(self, hidden: Tensor, pre: int | None) -> Tensor:
        """Logits of the first number of a position, or of the second given the first."""
        x = hidden[None] if pre is None else torch.stack([hidden, self.w["pre_emb.weight"][pre]])
        for i in range(self.options["factorized_n_layer"]):
            x = self.block(x, f"factorized_blocks.{i}")
        return self.norm(x, "norm.weight")[-1] @ self.w[f"head.{len(x) - 1}.weight"].T

    def teacher_forced(self, pre: list[int], post: list[int], label: int) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(pre[:-1], post[:-1], label)
        first = [self.group(h, None) for h in hidden]
        second = [self.group(h, p) for h, p in zip(hidden, pre, strict=True)]
        return torch.stack(first), torch.stack(second)

    def sample(
        self, label: int, scales: tuple[float, float], choose: Callable[[int, int, Tensor], int]
    ) -> tuple[list[int], list[int]]:
        """Both branches get what is drawn; `choose` gets position, group and guided logits."""
        pre: list[int] = []
        post: list[int] = []
        for position in range(self.options["block_size"]):
            branches = [self.hidden(pre, post, y)[-1] for y in (label, self.options["class_num"])]

            def guided(group: int, first: int | None, branches: list[Tensor] = branches) -> Tensor:
                with_class, without = (self.group(h, first) for h in branches)
                return without + scales[group] * (with_class - without)

            a = choose(position, 0, guided(0, None))
            b = choose(position, 1, guided(1, a))
            pre.append(a)
            post.append(b)
        return pre, post


def plain_filter(row: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then top-k with ties kept, then top-p with the first always kept."""
    row = [x / temperature for x in row]
    if top_k:
        row = [x if x >= sorted(row)[-top_k] else -math.inf for x in row]
    so_far, total, dropped = 0.0, sum(math.exp(x) for x in row), set()
    for i in sorted(range(len(row)), key=lambda i: -row[i]):
        if so_far > top_p:
            dropped.add(i)
        so_far += math.exp(row[i]) / total
    return [-math.inf if i in dropped else x for i, x in enumerate(row)]


def plain_draw(row: list[float], uniform: float) -> int:
    total, so_far = sum(math.exp(x) for x in row), 0.0
    for i, x in enumerate(row):
        so_far += math.exp(x) / total
        if so_far > uniform:
            return i
    raise AssertionError("the noise of this test lies below 1 by more than rounding")


VARIANTS = {
    "as released": {},
    "shared key heads": {"n_kv_head": 2},
    "other constants": {"rope_base": 500, "norm_eps": 1e-2, "n_head": 12},
    "one block each": {"spatial_n_layer": 1, "factorized_n_layer": 1, "factorized_bits": [2, 5]},
    "feed-forward of 256": {"multiple_of": 256},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_teacher_forced_logits(variant: str) -> None:
    options = OPTIONS | VARIANTS[variant]
    state = release_state(options)
    model, reference = generator_from_release(state, options), Release(state, options)
    rng = torch.Generator().manual_seed(1)
    sizes = [2**b for b in options["factorized_bits"]]
    pre, post = (torch.randint(size, (3, STEPS), generator=rng) for size in sizes)
    classes = torch.tensor([0, 4, 5])  # The last is no class.
    with torch.no_grad():
        logits = model(pre + sizes[0] * post, classes, torch.tensor([STEPS, 3, 1]))
    for image, label in enumerate(classes.tolist()):
        expected = reference.teacher_forced(pre[image].tolist(), post[image].tolist(), label)
        for group in (0, 1):
            torch.testing.assert_close(logits[group][image].double(), expected[group], rtol=0, atol=1e-5)
    assert logits[0].std() > 0.3  # Nonzero heads: the comparison is of something.


def plain_loop(
    model: MergeAR, label: int, scales: tuple[float, float], choose: Callable[[int, int, Tensor], Tensor]
) -> list[int]:
    """Samples with nothing but the model's teacher-forced forward pass."""
    index = torch.zeros(1, STEPS, dtype=torch.long)
    bits = model.config.groups[0]
    classes, kept = torch.tensor([label, model.config.num_classes]), torch.full((2,), STEPS)
    for position in range(STEPS):
        for group in (0, 1):
            with torch.no_grad():
                logits = model(index.expand(2, -1), classes, kept)[group][:, position]
            part = choose(position, group, guide(logits[:1], logits[1:], scales[group]))
            index[0, position] += part.item() << (bits * group)
    return index[0].tolist()


def generated(model: MergeAR, cache: str, **options: object) -> list[list[int]]:
    return model.generate(cache=cache, chunk=5, **options).full_index().tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("scales", [(1.9, 2.0), (4.0, 1.0)])
def test_guided_greedy_sampling(scales: tuple[float, float]) -> None:
    state = release_state(seed=3)
    model, reference = generator_from_release(state, OPTIONS), Release(state, OPTIONS)
    expected = []
    for label in (2, 0):
        pre, post = reference.sample(label, scales, lambda position, group, logits: int(logits.argmax()))
        expected.append([a + 8 * b for a, b in zip(pre, post, strict=True)])
        assert len(set(expected[-1])) > 3
    greedy = plain_loop(model, 2, scales, lambda position, group, logits: draw(filter_logits(logits, 0), torch.ones(1)))
    assert greedy == expected[0]
    for cache in ("full", "merge"):
        assert generated(model, cache, classes=[2, 0], guidance=scales, temperature=0) == expected


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"n_kv_head": 1, "n_head": 2}])
def test_guided_filtered_sampling(options: dict) -> None:
    state = release_state(options, seed=4)
    model, reference = generator_from_release(state, options), Release(state, options)
    scales, settings = (1.9, 2.0), ((1.1, 5, 0.9), (1.0, 0, 0.8))
    noise = image_uniforms(77, STEPS, 2)

    def choose(position: int, group: int, logits: Tensor) -> int:
        return plain_draw(plain_filter(logits.tolist(), *settings[group]), noise[position, group].item())

    pre, post = reference.sample(1, scales, choose)
    expected = [a + 8 * b for a, b in zip(pre, post, strict=True)]
    assert len(set(expected)) > 5
    ours = plain_loop(
        model, 1, scales, lambda p, group, x: draw(filter_logits(x, *settings[group]), noise[p, group].view(1))
    )
    assert ours == expected
    temperature, top_k, top_p = zip(*settings, strict=True)
    filters = {"guidance": scales, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    assert generated(model, "full", classes=[1], seeds=[77], **filters) == [expected]
    assert generated(model, "full", classes=[3, 1], seeds=[5, 77], **filters)[1] == expected


def test_unguided_sampling_takes_one_branch() -> None:
    state = release_state(seed=5)
    model, reference = generator_from_release(state, OPTIONS), Release(state, OPTIONS)
    for scale, label, classes in ((1.0, 3, [3]), (0.0, OPTIONS["class_num"], [3]), (4.0, OPTIONS["class_num"], None)):
        pre, post = reference.sample(label, (1.0, 1.0), lambda position, group, logits: int(logits.argmax()))
        expected = [[a + 8 * b for a, b in zip(pre, post, strict=True)]]
        assert generated(model, "full", classes=classes, guidance=scale, temperature=0) == expected
