"""The four states of a stage, missing, partial, stale and done, found by comparing records; imports no torch."""

import contextlib
import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.foundation.errors import ArtifactError, OcdError
from stages.run_directory.folders import StageFolder, damaged_files, folder_of
from stages.run_directory.format import FORMAT_VERSION, Begun, Extent, Identity, Manifest, SourceRecord
from stages.run_directory.pipeline import (
    AUTO,
    LAYER,
    ORDER,
    STAGES,
    Query,
    StageSpec,
    chosen_by_scores,
    extent_settings,
    identity_settings,
    in_turn,
    spec_of,
)
from stages.run_directory.project import Project, override_of, set_flags
from stages.run_directory.sources import inputs_of

MISSING, PARTIAL, STALE, DONE = "missing", "partial", "stale", "done"


@dataclass(frozen=True)
class Change:
    """One thing that differs between what a stage was made from and what it would be made from now."""

    setting: str
    was: Any
    now: Any

    @property
    def kept_by(self) -> str | None:
        """What `--set` takes to put the setting back; None where it cannot, as for the content of a file."""
        return None if " " in self.setting else override_of(self.setting, self.was)

    @property
    def redone_by(self) -> str | None:
        """What `--set` takes to repeat the change."""
        return None if " " in self.setting else override_of(self.setting, self.now)

    def __str__(self) -> str:
        return f"{self.setting} was {_short(self.was)}, is now {_short(self.now)}"


@dataclass(frozen=True)
class StageState:
    """A stage's state, why, how far it is, and the records it was found from; `by_inputs`: it is stale for nothing but earlier
    stages that are not done."""

    name: str
    state: str
    detail: str = ""
    changes: tuple[Change, ...] = ()
    by_inputs: bool = False
    progress: dict[str, Any] | None = None
    identity: Identity | None = None
    sources: dict[str, SourceRecord] = field(default_factory=dict)
    manifest: Manifest | None = None


def _short(value: Any) -> str:
    if value is None:
        return "not there"
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def make_identity(project: Project, spec: StageSpec, inputs: dict[str, Any], recorded: Begun | Manifest | None) -> Identity:
    """Everything a stage's result depends on, `auto` as `recorded` resolves it."""
    settings = identity_settings(project, spec, recorded)
    return Identity(format_version=FORMAT_VERSION, stage=spec.name, settings=settings, inputs=inputs)


def identity_changes(was: Identity, now: Identity) -> tuple[Change, ...]:
    """Every setting and input that differs between two identities. Where a changed setting has brought the whole task with it,
    or taken it away, that setting stands for the rest."""
    changes, came_along = [], []
    one_has_task = len({any(key.startswith("task.") for key in one.settings) for one in (was, now)}) > 1
    for group, prefix in (("settings", ""), ("inputs", "content of ")):
        before, after = getattr(was, group), getattr(now, group)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                # A dataset that code makes is known by the name the setting gives it.
                name = f"task.{key.removesuffix(' by')}" if key.endswith(" by") else prefix + key
                with_task = key.startswith("task.") or (group == "inputs" and (key in before) != (key in after))
                (came_along if one_has_task and with_task else changes).append(Change(name, before.get(key), after.get(key)))
    return tuple(changes or came_along)


def extent_change(recorded: dict[str, Extent], wanted: dict[str, Any]) -> tuple[str, Change | None]:
    """Compare how far a finished stage went with how far it should go: "done", "partial" (further) or "stale" (less far). What
    is exhausted cannot go further, whatever is asked."""
    for key, value in wanted.items():
        extent = recorded.get(key, Extent(value=None, reached=0, exhausted=False))
        change = Change(key, extent.value, value)
        if value == extent.value:
            continue
        if value == "all" or value > extent.reached:
            if not extent.exhausted:
                return PARTIAL, change
        elif value < extent.reached:
            return STALE, change
    return DONE, None


def extents_reduced(begun: dict[str, Any], wanted: dict[str, Any]) -> tuple[Change, ...]:
    """The extents that unfinished work was begun with and that are larger than what is wanted now."""
    return tuple(
        Change(key, begun[key], value)
        for key, value in wanted.items()
        if key in begun and value != begun[key] and value != "all" and (begun[key] == "all" or value < begun[key])
    )


class States:
    """Finds the states of all stages of a project, each once. Without `hash_dataset`, the identity of a dataset that only code
    can load, it trusts what the manifests record."""

    def __init__(self, project: Project, hash_dataset: Callable[[str], str | None] | None = None) -> None:
        self.project = project
        self._hash_dataset = hash_dataset
        self._found: dict[str, StageState] = {}

    def of(self, name: str) -> StageState:
        """The state of a stage of the pipeline (for infer: of the test split)."""
        if name not in self._found:
            folder = folder_of(self.project, name)
            try:
                query = Query() if name == "infer" else None
                self._found[name] = self.find_in(spec_of(self.project, name), folder, query)
            except OcdError as error:
                state = STALE if folder.path.exists() or folder.wip.exists() else MISSING
                self._found[name] = StageState(name, state, error.message)
        return self._found[name]

    def all(self) -> list[StageState]:
        return [self.of(name) for name in ORDER]

    def find_in(self, spec: StageSpec, folder: StageFolder, query: Query | None = None) -> StageState:
        """The state of a stage whose results lie in `folder`; of infer, for one query."""
        manifest, begun = folder.manifest(), folder.begun()
        recorded = begun or manifest
        blocked = [state for state in map(self.of, spec.reads) if state.state != DONE]
        if recorded is None and blocked:
            return StageState(spec.name, MISSING)
        made = {STAGES[name].content: self.of(name).manifest for name in spec.reads}
        upstream = {content: manifest.content for content, manifest in made.items() if manifest is not None}
        inputs, sources = inputs_of(self.project, spec, query, upstream, recorded=recorded, hash_dataset=self._hash_dataset)

        def identity(record: Begun | Manifest | None) -> Identity:
            return make_identity(self.project, spec, inputs, record)

        known = {"identity": identity(recorded), "sources": sources, "manifest": manifest}
        if manifest is not None:
            found = self._finished(spec, folder, manifest, identity(manifest), blocked)
            if found.state == DONE or begun is None:
                return StageState(**{**vars(found), **known, "identity": identity(manifest)})
        if begun is not None:
            changes = identity_changes(begun.identity, identity(begun))
            changes += extents_reduced(begun.wanted, extent_settings(self.project, spec))
            if not changes:
                progress = progress_of(folder)
                text = f"{progress['done']:,} of {progress['total']:,} {progress['unit']}" if progress else "begun"
                return StageState(spec.name, PARTIAL, text, progress=progress, **known)
            return StageState(
                spec.name, STALE, f"unfinished, and begun otherwise: {'; '.join(map(str, changes))}", changes, **known
            )
        return StageState(spec.name, MISSING, **known)

    def _finished(
        self, spec: StageSpec, folder: StageFolder, manifest: Manifest, identity: Identity, blocked: list[StageState]
    ) -> StageState:
        damage = damaged_files(folder.found, manifest, rehash=False)
        more = f" (and {len(damage) - 1} more files)" if len(damage) > 1 else ""
        if damage and not spec.mends:
            return StageState(spec.name, STALE, damage[0] + more)
        if manifest.fingerprint != manifest.identity.fingerprint:
            return StageState(spec.name, STALE, f"content changed: {folder.name}/manifest.json does not match its fingerprint")
        if manifest.sha256 != manifest.found_hash():
            return StageState(spec.name, STALE, f"content changed: {folder.name}/manifest.json")
        changes = identity_changes(manifest.identity, identity)
        if changes:
            further = extent_change(manifest.extents, extent_settings(self.project, spec))[1]
            changes += (further,) if further and further.setting not in [change.setting for change in changes] else ()
            return StageState(
                spec.name, STALE, "; ".join(f"{change}{_by_scores(change, manifest)}" for change in changes), changes
            )
        if blocked:
            detail = "; ".join(f"its input {state.name} is {state.state}" for state in blocked)
            return StageState(spec.name, STALE, detail, by_inputs=True)
        if damage:
            return StageState(spec.name, PARTIAL, f"blocks are damaged: {damage[0]}{more}")
        state, change = extent_change(manifest.extents, extent_settings(self.project, spec))
        if change is not None:
            return StageState(spec.name, state, str(change), (change,))
        return StageState(spec.name, DONE)


def _by_scores(change: Change, manifest: Manifest) -> str:
    """Which layer `auto` stands for, where it is asked for in place of a named one and there are scores."""
    chosen = chosen_by_scores(manifest) if (change.setting, change.now) == (LAYER, AUTO) else None
    return f" (by the scores {chosen})" if chosen else ""


def progress_of(folder: StageFolder) -> dict[str, Any] | None:
    """How far an unfinished stage is, counted from what it has left on the disk; of a training also what a kill would leave."""
    begun = folder.begun()
    if begun is None or begun.plan is None:
        return None
    plan, done = begun.plan, 0
    if plan.unit == "blocks":
        done = len(list((folder.wip / "blocks").glob("*.json")))
    elif plan.unit == "steps":
        steps = [int(path.stem) for path in (folder.wip / "checkpoints").glob("*.json") if path.stem.isdigit()]
        evaluated = _evaluations(folder.wip / "metrics.jsonl")
        kept = max(steps, default=0)
        scores = [row["score"] for row in evaluated if row["score"] is not None]
        best = {"best_held_out_loss": min(scores)} if scores else {}
        reached = max([kept, *(row["step"] for row in evaluated)])
        return {"done": reached, "kept": kept, "total": plan.total, "unit": plan.unit, **best}
    return {"done": done, "total": plan.total, "unit": plan.unit}


def _evaluations(path: Path) -> list[dict[str, Any]]:
    """The evaluations that a training in progress has noted; a last line may be half written."""
    found = []
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                found.append({"step": int(row["step"]), "score": row["score"]})
    return found


def redo_command(state: StageState, project: Project) -> str:
    """The command that redoes a stale stage as it would be made now: run and task, changed settings, further ones that were
    given beside them, and imported weights are repeated."""
    changed = {change.setting: text for change in state.changes if (text := change.redone_by)}
    key = project.settings.task.weights_key or (state.identity and state.identity.settings.get("task.weights_key"))
    changed.pop("task.weights_key", None)
    # Also those of other stages, which it reads.
    given = [text for text in project.overrides if text.split("=")[0].strip() not in changed]
    repeated = {text for text in project.overrides if text.startswith(("task.", "run."))}
    flags = set_flags(text for text in (*changed.values(), *given) if text not in repeated)
    if "weights" in state.sources:
        flags += f" --weights {shlex.quote(state.sources['weights'].path)}"
        flags += f" --weights-key {shlex.quote(key)}" if key else ""
    return f"ocd {state.name}{project.flags}{flags} --force"


def ways_out(stale: Sequence[StageState], redo: str) -> str:
    """What to type where stages are stale, to keep those that flags keep or to redo them; "" where flags keep none, for
    something else than settings changed."""
    kept = [state for state in stale if state.changes and all(change.kept_by for change in state.changes)]
    changes = {change.setting: change for state in kept for change in state.changes}
    # Stages made with different values of one setting cannot all be kept.
    if not kept or any(change.was != changes[change.setting].was for state in kept for change in state.changes):
        return ""
    stages, settings = ("it" if len(found) == 1 else "them" for found in (stale, changes))
    whole = all(state in kept or state.by_inputs for state in stale)
    those = stages if whole else " and ".join(state.name for state in kept)
    flags = set_flags(change.kept_by for change in changes.values())
    return f"to keep {those}, repeat{flags}, or write {settings} into ocd.toml; to redo {stages}: {redo}"


def require_done(states: States, names: tuple[str, ...], wanting: str) -> None:
    """Refuse to run a stage before those it needs; every one of them is named.

    Raises:
        ArtifactError: with the state of each stage that is not done, and the commands to type.
    """
    wanted = _closure(states.project, names)
    needed = [name for name in in_turn(states.project) if name in wanted]
    wrong = [state for name in needed if (state := states.of(name)).state != DONE]
    if not wrong:
        return
    lines = [f"  {state.name} is {state.state}{': ' + state.detail if state.detail else ''}" for state in wrong]
    commands = " && ".join(
        redo_command(state, states.project) if state.state == STALE else f"ocd {state.name}{states.project.all_flags}"
        for state in wrong
    )
    hint = ways_out([state for state in wrong if state.state == STALE], commands) or f"run: {commands}"
    raise ArtifactError(f"{wanting} needs stages that are not done:\n" + "\n".join(lines), hint)


def _closure(project: Project, names: tuple[str, ...]) -> set[str]:
    found = set(names)
    for name in names:
        found |= _closure(project, spec_of(project, name).reads)
    return found
