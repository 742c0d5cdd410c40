"""The result of fine-tuning: what the published classifier gets right, and how that came about."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from mergevq.configuration import config_to_dict
from mergevq.evaluation.protocol import data_name, hardware, precision, versions
from mergevq.training.finetune_config import FinetuneRun
from mergevq.training.finetune_inputs import FinetuneInputs
from mergevq.training.finetune_state import FinetuneState
from mergevq.training.finetune_validation import Accuracy
from mergevq.training.optim import run_progress
from mergevq.training.precision import choose_dtype

SCHEMA = "mergevq.finetune/1"


def log_record(accuracy: Accuracy) -> dict[str, Any]:
    """Returns what the log tells of a validation."""
    top5 = {} if accuracy.top5 is None else {"top5": accuracy.top5}
    return {"top1": accuracy.top1, **top5, "loss": accuracy.loss, "images": accuracy.images}


def fingerprints(inputs: FinetuneInputs) -> dict[str, str]:
    """Returns what tells the images of a run apart; looks at the size of every file."""
    return {"train": inputs.train.fingerprint(), "val": inputs.val.fingerprint()}


def to_json(
    run: FinetuneRun,
    inputs: FinetuneInputs,
    state: FinetuneState,
    accuracy: Accuracy,
    prints: Mapping[str, str],
) -> dict[str, Any]:
    """Returns the content of `result.json`, as JSON values. Only what stands under "time" differs between equal runs.

    Args:
        run: as `resolve` returns it.
        inputs: tokenizer and images.
        state: of the training, at the step of the validation.
        accuracy: what was found.
        prints: as `fingerprints` returns them.
    """
    model, loop = run.model, run.loop
    measured = precision(state.fabric.device, tokenizer=False)
    trained, _ = choose_dtype(loop.precision, state.fabric.device)
    world_size = state.fabric.world_size
    protocol = {
        "task": "classification by fine-tuning the whole encoder",
        "data": {"train": data_name(inputs.train, inputs.train), "val": data_name(inputs.val, inputs.val)},
        "fingerprints": dict(prints),
        "images": {"train": len(inputs.train), "val": len(inputs.val), "measured": accuracy.images},
        "images_unreadable": {"measured": accuracy.unreadable},
        "classes": len(model.class_names),
        "features": model.features,
        "num_tokens": model.num_tokens,
        "num_patches": state.model.config.num_patches,
        "quantized": False,
        "preprocessing": {
            "image_size": model.image_size,
            "held_out": "short side resized (bicubic, antialiased), middle square, in [-1, 1]",
            "training": {"crop": run.data.crop, "flip": run.data.flip, "rand_augment": run.data.rand_augment},
        },
        "tokenizer": model.tokenizer,
        "weights": f"average of decay {run.optim.ema_decay}",
        "precision": {"training": measured if trained == torch.float32 else "bf16", "measured": measured},
        "seed": loop.seed,
        "images_per_step": loop.batch_size * loop.accumulate * world_size,
        "processes": world_size,
        "hardware": hardware(state.fabric.device),
        "versions": versions(),
    }
    per_class = {
        name: {"images": count, "top1": share}
        for name, count, share in zip(model.class_names, accuracy.class_images, accuracy.class_top1, strict=True)
    }
    return {
        "schema": SCHEMA,
        "step": state.step,
        "epochs": state.step * protocol["images_per_step"] / len(inputs.train),
        "finished": run_progress(state.step, state.elapsed, loop.steps, loop.minutes) >= 1,
        "top1": accuracy.top1,
        "top5": accuracy.top5,
        # The one number that may be infinite, for which JSON has no word.
        "loss": accuracy.loss if math.isfinite(accuracy.loss) else None,
        "per_class": per_class,
        "fingerprint": state.ema.module.fingerprint(),  # type: ignore[operator]
        "protocol": protocol,
        "config": config_to_dict(run),
        "time": {"training_seconds": state.elapsed},
    }
