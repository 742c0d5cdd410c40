"""Results that `mergevq eval` wrote, read back to be shown again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergevq.evaluation import generation_result, overall_result, representation_result, result, sanity_result
from mergevq.evaluation.schema import check_schema
from mergevq.files import read_json

Report = (
    overall_result.EvaluationReport
    | result.ReconstructionReport
    | generation_result.GenerationReport
    | representation_result.RepresentationReport
    | sanity_result.SanityReport
)
"""Any result."""

_READERS: dict[str, Callable[[Any, str], Report]] = {
    overall_result.SCHEMA: overall_result.EvaluationReport.from_json,
    result.SCHEMA: result.ReconstructionReport.from_json,
    generation_result.SCHEMA: generation_result.GenerationReport.from_json,
    representation_result.SCHEMA: representation_result.RepresentationReport.from_json,
    sanity_result.SCHEMA: sanity_result.SanityReport.from_json,
}


def read_report(path: str | Path) -> Report:
    """Returns the result in a JSON file, without its pictures.

    Raises:
        CheckpointError: the file is missing or damaged, no result, or one of another version.
    """
    value = read_json(path)
    found = value.get("schema") if isinstance(value, dict) else None
    kinds = {schema.partition("/")[0]: schema for schema in _READERS}
    # Of an unknown kind, the first is what is expected.
    schema = kinds.get(str(found).partition("/")[0], overall_result.SCHEMA)
    check_schema(value, schema, str(path))
    return _READERS[schema](value, str(path))
