"""The probes of one kind of features, from the stored features to a row of the result."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from mergevq.evaluation.feature_cache import FeatureCache, Labelled
from mergevq.evaluation.feature_sources import FeatureSetting
from mergevq.evaluation.representation_data import check_labels
from mergevq.evaluation.representation_result import (
    MOST_CONFUSION,
    KnnResult,
    KnnTried,
    LinearResult,
    ProbeScore,
    RepresentationRow,
    RowPictures,
)
from mergevq.metrics.few_shot import few_shot
from mergevq.metrics.knn import knn_classify
from mergevq.metrics.linear_probe import fit_linear_probe
from mergevq.metrics.principal import principal_components
from mergevq.metrics.probe import Score, check_labelled, hold_out, score_answers
from mergevq.metrics.probe_config import ProbeConfig

MOST_POINTS = 2000
"""Test images in a picture, evenly spread."""

_CONFUSED = 10  # Kinds of mistakes in a result.
_KS, _SHOTS = (1, 10, 20, 100, 200), (1, 5, 10)


def choose_ks(config: ProbeConfig, images: int) -> tuple[int, ...]:
    """Returns the k of k-NN: those asked for, or as many of the usual ones as the training images allow."""
    return config.ks or tuple(k for k in _KS if k <= images)


def choose_shots(config: ProbeConfig, smallest: int) -> tuple[int, ...]:
    """Returns the shots: those asked for, or as many of the usual ones as the smallest training class allows."""
    return config.shots or tuple(k for k in _SHOTS if k <= smallest)


def probe_row(
    setting: FeatureSetting,
    name: str,
    cache: FeatureCache,
    classes: Sequence[str],
    config: ProbeConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Returns row, pictures and hits of these features, as JSON values; see `read_row` and `pair_rows`.

    Raises:
        ShapeError: a feature is not finite, or there are fewer readable training images than k or shots ask for.
        DataError: a class has no readable image.
        CheckpointError: a stored feature is missing.
    """
    train, test = (_on(device, cache.load(part, setting.arrays())) for part in ("train", "test"))
    for part, what in ((train, "training"), (test, "test")):
        check_labels(part.labels.tolist(), classes, what)
        check_labelled(part.features, part.labels, len(classes), f"{what} ({name})")
    knn, linear, confusion = None, None, torch.zeros(0, 0, dtype=torch.int64)
    hits: dict[str, str] = {}
    if "knn" in config.probes:
        knn, confusion, hits["knn"] = _knn(train, test, len(classes), config)
    if "linear" in config.probes:
        linear, confusion, hits["linear"] = _linear(train, test, len(classes), config)
    few = None
    if "few-shot" in config.probes:
        few = few_shot(
            train.features,
            train.labels,
            test.features,
            test.labels,
            num_classes=len(classes),
            shots=choose_shots(config, int(torch.bincount(train.labels.cpu()).min())),
            draws=config.draws,
            seed=config.seed,
        )
    row = RepresentationRow(setting, name, train.features.shape[1], knn, linear, few)
    count = min(len(test.labels), MOST_POINTS)
    shown = torch.arange(count) * len(test.labels) // count
    projection = principal_components(test.features.cpu()[shown])
    return {
        "row": asdict(row),
        "projection": projection.coordinates.tolist(),
        "explained": list(projection.explained),
        "labels": test.labels.cpu()[shown].tolist(),
        "confusion": confusion.tolist(),
        "hits": hits,
    }


def read_row(found: dict[str, Any]) -> tuple[RepresentationRow, RowPictures]:
    """Returns what `probe_row` found."""
    pictures = RowPictures(
        projection=torch.tensor(found["projection"], dtype=torch.float32).view(-1, 2),
        explained=tuple(found["explained"]),
        labels=torch.tensor(found["labels"], dtype=torch.int64),
        confusion=torch.tensor(found["confusion"], dtype=torch.int64).view(2 * [len(found["confusion"])]),
    )
    return RepresentationRow.from_json(found["row"]), pictures


def _on(device: torch.device, part: Labelled) -> Labelled:
    return Labelled(part.features.to(device), part.labels.to(device))


def _knn(train: Labelled, test: Labelled, num_classes: int, config: ProbeConfig) -> tuple[KnnResult, Tensor, str]:
    ks = sorted(set(choose_ks(config, len(train.labels))))
    held_out: dict[int, tuple[float, float]] = {}
    chosen_on = 0
    if len(ks) > 1:
        kept, held = (part.to(train.labels.device) for part in hold_out(train.labels, config.held_out, config.seed))
        chosen_on = len(held)
        # A k that only all training images reach is judged by all that were not held out.
        reach = {k: min(k, len(kept)) for k in ks}
        answers = knn_classify(
            train.features[kept],
            train.labels[kept],
            train.features[held],
            num_classes=num_classes,
            ks=sorted(set(reach.values())),
            temperature=config.temperature,
        )
        scores = {k: score_answers(found, train.labels[held], num_classes) for k, found in answers.items()}
        held_out = {k: (scores[reach[k]].top1, scores[reach[k]].top5 or 0.0) for k in ks}
    answers = knn_classify(
        train.features,
        train.labels,
        test.features,
        num_classes=num_classes,
        ks=ks,
        temperature=config.temperature,
    )
    scores = {k: score_answers(found, test.labels, num_classes) for k, found in answers.items()}
    # Of equals the one with the better top-5, then the smallest.
    chosen = max(ks, key=lambda k: (*held_out.get(k, (0.0, 0.0)), -k))
    found = (held_out[k][0] if held_out else None for k in ks)
    tried = tuple(KnnTried(k, top1, scores[k].top1, scores[k].top5) for k, top1 in zip(ks, found, strict=True))
    result = KnnResult(_summary(scores[chosen]), chosen, tried, chosen_on)
    return result, scores[chosen].confusion, _hits(answers[chosen], test.labels)


def _linear(train: Labelled, test: Labelled, num_classes: int, config: ProbeConfig) -> tuple[LinearResult, Tensor, str]:
    probe = fit_linear_probe(
        train.features,
        train.labels,
        num_classes=num_classes,
        config=config.linear,
        held_out=config.held_out,
        seed=config.seed,
    )
    answers = probe.answers(test.features)
    score = score_answers(answers, test.labels, num_classes)
    found = LinearResult(_summary(score), probe.learning_rate, probe.weight_decay, probe.held_out, probe.sweep)
    return found, score.confusion, _hits(answers, test.labels)


def _hits(answers: Tensor, labels: Tensor) -> str:
    """A digit for each test image: 1 where the first answer is right."""
    return "".join("1" if right else "0" for right in (answers[:, 0].cpu() == labels.cpu()).tolist())


def _summary(score: Score) -> ProbeScore:
    wrong = score.confusion - score.confusion.diagonal().diag()
    most = wrong.flatten().sort(descending=True, stable=True)
    width = len(wrong)
    confused = [
        (place // width, place % width, count)
        for count, place in zip(most.values[:_CONFUSED].tolist(), most.indices[:_CONFUSED].tolist(), strict=True)
        if count
    ]
    whole = tuple(map(tuple, score.confusion.tolist())) if width <= MOST_CONFUSION else None
    return ProbeScore(
        top1=score.top1,
        top1_interval=score.top1_interval,
        top5=score.top5,
        mean_class=score.mean_class,
        per_class=score.per_class,
        confused=tuple(confused),
        confusion=whole,
    )
