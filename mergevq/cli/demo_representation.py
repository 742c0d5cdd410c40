"""What the tokenizer's features tell, in `mergevq demo`: k-NN against pixels and random weights."""

from pathlib import Path
from typing import Any

from mergevq.cli.demo_generation import Progress

# Images whose neighbours vote, few so that it takes seconds, and images that are classified: all that are held out.
_TRAIN, _TEST = 400, 299
_KINDS = ("class", "mean", "class+mean")


def probe_features(tok: Any, out: Path, progress: Progress) -> Any:
    """Classifies the held-out emoji by their nearest neighbours, and returns the table as a section of a page.

    Writes representation.html, with pictures, and representation.json.
    """
    from mergevq.data.embedded import EmbeddedImages
    from mergevq.evaluation.page import Section, render_section
    from mergevq.evaluation.representation import evaluate_representation
    from mergevq.evaluation.representation_report import content
    from mergevq.files import write_json
    from mergevq.metrics.probe_config import ProbeConfig

    rows = 2 * len(_KINDS) + 1
    with progress("probe", _TRAIN + (1 + rows) * _TEST) as advance:
        report = evaluate_representation(
            tok,
            EmbeddedImages("train"),
            EmbeddedImages("val"),
            num_tokens=None,
            kinds=_KINDS,
            probes=ProbeConfig(probes=("knn",)),
            train_limit=_TRAIN,
            test_limit=_TEST,
            on_images=advance,
        )
    write_json(out / "representation.json", report.to_json())
    about = (
        f"What do the tokenizer's features know of the nine categories of emoji? {_TRAIN} training images with classes "
        "vote for each held-out image, the most similar ones most. The tokenizer was trained without categories and "
        "without a teacher; pixels and the same network before training are what it has to beat.",
    )
    report.write_html(out / "representation.html", title="mergevq demo: representation", about=about)
    return Section("representation", "Representation", render_section(**content(report, pictures=False)))
