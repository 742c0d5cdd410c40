"""The references that the benchmarks compare with compute the same thing."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import generator, lfq, merging
from benchmarks.__main__ import main
from benchmarks.measure import extra_memory, markdown
from benchmarks.plain_tokenizer import PlainTokenizer
from mergevq.generator.cache import num_slots
from mergevq.generator.config import GeneratorConfig, MaskConfig
from mergevq.tokenizer.config import TokenizerConfig
from mergevq.tokenizer.model import MergeVQ


def test_the_plain_tokenizer_is_the_same_network(tiny_config: TokenizerConfig) -> None:
    encoder = replace(tiny_config.encoder, stem_stride=1)
    decoder = replace(tiny_config.decoder, output_stride=1)
    quantizer = replace(tiny_config.quantizer, norm="none")
    config = replace(tiny_config, encoder=encoder, decoder=decoder, quantizer=quantizer)
    torch.manual_seed(0)
    model = MergeVQ(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    plain = PlainTokenizer(config, model.state_dict())
    for kept in (256, 100, 70):
        with torch.no_grad():
            torch.testing.assert_close(
                plain.reconstruct(images, kept), model.reconstruct(images, kept), atol=1e-4, rtol=1e-4
            )


def test_brute_force_is_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfq, "BITS", 8)
    z = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)) * 0.05
    torch.testing.assert_close(lfq.ours(z), lfq.brute_force(z))


def test_tables() -> None:
    table = markdown("T", [{"a": 1, "b": 0.12345}, {"a": 2, "b": None}], "note")
    assert table.splitlines()[-1] == "| 2 | - |"
    assert "| 1 | 0.123 |" in table


def test_extra_memory_is_the_childs_own() -> None:
    held = torch.ones(60 * 2**20)  # 240 MiB in this process must not count, nor hide what the child takes
    code = "def warm(): torch.ones(10)\ndef step(): return torch.ones(50 * 2**20).sum()"
    extra = extra_memory(code)
    assert extra is None or 190 < extra < 230
    assert held.sum() == held.numel()


def test_the_plain_sampler_has_our_logits() -> None:
    config = GeneratorConfig(
        grid=(4, 4), num_bits=5, groups=(2, 3), num_classes=2, width=32, depth=2, group_depth=1, heads=2,
        num_tokens=8, mask=MaskConfig(recent=None),
    )  # fmt: skip
    model = generator.build(config, "cpu")
    for head in model.transformer.heads.parameters():
        torch.nn.init.normal_(head)
    given = torch.randint(32, (3, 16), generator=torch.Generator().manual_seed(0))
    driver = generator.PlainDriver(model, given)
    with torch.no_grad():
        found = [driver.start(), *(driver.run(1) for _ in range(15))]
        rows = [driver.inner.request[0][:3], driver.inner.request[1][:3]]
        expected = model(given, *rows)
        # The bit groups of the reference know the group that was drawn, the whole forward the one that was given.
        torch.testing.assert_close(torch.stack([step[0][:3] for step in found], 1), expected[0], atol=1e-5, rtol=1e-5)
        drawn = driver.inner.batch.index
        hidden = model.transformer(
            torch.cat([model.transformer.prefix(*rows), model.transformer.embed(given[:, :-1])], 1),
            model.transformer.rotation[:17],
        )[:, 1:]
        second = model.transformer.group_logits(hidden, drawn)[1]
        torch.testing.assert_close(torch.stack([step[1][:3] for step in found], 1), second, atol=1e-5, rtol=1e-5)
        generator._check_plain(model, given, steps=15)


def test_the_driver_keeps_what_the_cache_would() -> None:
    config = GeneratorConfig(
        grid=(4, 4), num_bits=5, groups=(2, 3), num_classes=2, width=32, depth=1, group_depth=0, heads=2, num_tokens=8
    )
    model = generator.build(config, "cpu")
    given = torch.randint(5, (2, 16), generator=torch.Generator().manual_seed(0))
    walked, skipped = (generator.Driver(model, given, "merge", guided=False, chunk=4) for _ in range(2))
    with torch.no_grad():
        for driver in (walked, skipped):
            driver.start()
        walked.run(13)
        skipped.skip_to(14)
    assert walked.step == skipped.step == 14
    for name in ("recent", "tokens", "counts", "older", "used"):
        assert torch.equal(getattr(walked.cache.state, name), getattr(skipped.cache.state, name)), name
    assert num_slots(walked.cache.state) == num_slots(skipped.cache.state)


def test_a_benchmark_that_fails_loses_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("out of memory")

    def run(*only: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["benchmarks", "--name", "cpu", "--out", str(tmp_path), *only])
        main()
        return tables()

    def tables() -> dict[str, Any]:
        found = json.loads((tmp_path / "cpu.json").read_text())["tables"]
        assert all(f"## {table['title']}" in (tmp_path / "cpu.md").read_text() for table in found.values())
        return {name: table["rows"] for name, table in found.items()}

    monkeypatch.setattr(lfq, "run", lambda _: ("LFQ", [{"ms": 1}], ""))
    monkeypatch.setattr(merging, "stack", lambda _: ("Stack", [{"ms": 2}], ""))
    assert run("--only", "lfq", "stack") == {"lfq": [{"ms": 1}], "stack": [{"ms": 2}]}
    monkeypatch.setattr(lfq, "run", lambda _: ("LFQ", [{"ms": 3}], ""))
    monkeypatch.setattr(merging, "unmerging", fail)
    for only in ((), ("--only", "lfq", "unmerge")):
        with pytest.raises(RuntimeError):
            run(*only)
        assert tables() == {"lfq": [{"ms": 3}], "stack": [{"ms": 2}]}


@pytest.mark.compile
def test_each_model_and_batch_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_all(drivers: dict[str, Callable[[], generator.Driver]], *_: Any) -> dict[str, list[float]]:
        with torch.no_grad():
            for make in drivers.values():
                driver = make()
                driver.start()
                driver.run(3)
        return {name: [1.0] for name in drivers}

    monkeypatch.setattr(generator, "step_seconds", run_all)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    config = GeneratorConfig(
        grid=(2, 2), num_bits=4, groups=(4,), num_classes=2, width=16, depth=1, group_depth=0, heads=2, num_tokens=4
    )
    for depth in (1, 2, 3):
        model = generator.build(replace(config, depth=depth), "cpu")
        for images in (1, 2):
            given = torch.zeros(images, 4, dtype=torch.int64)
            assert set(generator._both_caches(model, given, True, 4, 1, 1)) == {"full", "merge"}
