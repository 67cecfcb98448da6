"""The Python entry point: a finished run, opened for predicting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.foundation.errors import SettingsError
from stages.foundation.torch_state import usual_torch
from stages.lifecycle.context import RunContext
from stages.prediction.personalised import PersonalisedModel
from stages.prediction.predictor import load_personalised
from stages.run_directory.folders import check_run
from stages.run_directory.pipeline import OWN_ROW, spec_of
from stages.run_directory.project import load_project
from stages.run_directory.states import States, require_done


@usual_torch()
def open_run(
    config: Path | str | None = None,
    *,
    run: Path | str | None = None,
    overrides: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> PersonalisedModel:
    """Open a finished run for predicting from Python: `open_run("ocd.toml").predict(x, ensemble=5).output`.

    Args:
        config: `ocd.toml` or its folder; by default found from the working directory upward.
        run: another run directory.
        overrides: "table.key=value" texts, as `--set` takes them.
        values: "table.key" to value.

    Raises:
        OcdError: settings with faults, stages that are not done, damaged artifacts.
    """
    project = load_project(config, run=run, overrides=overrides, values=values)
    if (row := project.settings.infer.row) != OWN_ROW:
        raise SettingsError(
            f"infer.row = {row!r}: from Python only {OWN_ROW!r} predicts",
            f"open it with values={{'infer.row': {OWN_ROW!r}}}, or predict with ocd infer",
        )
    check_run(project)
    context = RunContext(project)
    require_done(States(project, context.hash_dataset), spec_of(project, "infer").reads, "predicting")
    return load_personalised(context)[0]
