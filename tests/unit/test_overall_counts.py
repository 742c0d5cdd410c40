"""The summary says on how many images it was measured what stands beside a number, and what chose the guidance."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mergevq.evaluation.generation_measure import Measure, inception_score_of
from mergevq.evaluation.generation_result import GenerationReport, GenerationRow, ReferenceRow, Setting
from mergevq.evaluation.overall_notes import generation_note, reconstruction_note
from mergevq.evaluation.overall_summary import generation_lines, reconstruction_lines
from mergevq.evaluation.result import ReconstructionReport, ReconstructionRow, Reference, Spread
from mergevq.evaluation.sanity_result import SanityReport, SanityRow
from mergevq.metrics.features import FeatureNetwork

NETWORK = {"name": "lite1", "sha256": "0123"}


def reconstruction(images: int) -> ReconstructionReport:
    psnr = Spread(20.0, 1.0)
    row = ReconstructionRow(4, 6.0, 4.0, psnr, None, None, 3.5, 0.01, 3.0, 17, 64, (0.5,), 9.0, 8.0)
    protocol = {"images": images, "image_size": 8, "network": NETWORK, "perceptual": None, "num_patches": 4}
    return ReconstructionReport((row,), Reference(1.5, 0.1, images // 2), protocol, (), (2, 2))


def sanity(images: int) -> SanityReport:
    rows = tuple(SanityRow(name, images, 25.0, frechet=2.0) for name in ("blurred", "noised"))
    return SanityReport(rows, {"blur_sigma": 1.0, "noise_sigma": 16}, ())


def test_what_was_measured_on_other_images_says_how_many() -> None:
    lines = {line.quantity: line for line in reconstruction_lines(reconstruction(3000), sanity(500))}
    beside = lines["FD-lite1"].cells([4])[-1]
    assert beside == ("two halves of the originals 1.5 (1,500 images), blurred 2 (500 images), noised 2 (500 images)")
    assert lines["FD-lite1"].to_json()["beside_images"]["blurred"] == 500
    assert lines["PSNR in dB"].cells([4])[-1] == "blurred 25.00 (500 images), noised 25.00 (500 images)"
    assert "; 500 of the originals blurred" in reconstruction_note(reconstruction(3000), sanity(500))
    same = {line.quantity: line for line in reconstruction_lines(reconstruction(400), sanity(400))}
    assert same["PSNR in dB"].cells([4])[-1] == "blurred 25.00, noised 25.00"
    assert "; the originals blurred" in reconstruction_note(reconstruction(400), sanity(400))


def generation(*guidance: float, **changes: Any) -> GenerationReport:
    rows = tuple(
        GenerationRow(
            Setting(scale, 4), 5.0 - scale, 0.1, 3.0, 0.5, 0.6, 0.1, Spread(2.0, 1.0), 0.5, 8, 4.0, 1.0, 2.0, 3.0
        )
        for scale in guidance
    )
    protocol = {"images": 50, "network": NETWORK, "reference": {"images": 70}}
    return GenerationReport(rows, ReferenceRow(35, 2.0, 0.1, 3.0, 0.9, 0.8, 0.2, {4: Spread(3.0, 0.5)}), protocol, ())


def test_halves_and_real_images_say_how_many_they_are() -> None:
    lines = {line.quantity: line.cells([4])[-1] for line in generation_lines(generation(1.0))}
    assert lines["FD-lite1"] == "two halves of real images 2 (35 images)"
    assert lines["close to training"] == "real images 0.200 (70 images)"
    assert lines["distinct tokens an image"] == "real images 3.0"


def test_a_chosen_guidance_is_told_of() -> None:
    note = generation_note(generation(1.0, 2.0))
    assert note is not None and note.startswith("50 generated images (guidance 2) have FD-lite1 3")
    assert "The guidance is the one of 2 settings with the least FD-lite1, on these same images" in note
    assert "settings" not in (generation_note(generation(1.0)) or "")


def test_the_reference_has_the_inception_score_of_as_many_images() -> None:
    torch.manual_seed(0)
    network = FeatureNetwork(nn.Flatten(), "flat", classifier=nn.Linear(6, 5))
    features = 4 * torch.randn(30, 6)
    number = torch.arange(30)
    measure = Measure({"number": number, "features": features}, (), None, False, network)
    some, all_of_it = measure.reference_row(12, 3), measure.reference_row(99, 3)
    assert (some.inception_images, all_of_it.inception_images) == (12, 30)
    assert all_of_it.inception_score == inception_score_of(network, features)
    picked = torch.randperm(30, generator=torch.Generator().manual_seed(3))[:12].sort().values
    assert some.inception_score == inception_score_of(network, features[picked])
    assert some.inception_score != all_of_it.inception_score
    assert replace(some, images=30) != all_of_it
