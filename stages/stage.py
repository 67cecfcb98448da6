"""What every stage is: a plan, and work done inside an unfinished folder that gets its name when it is whole."""

import contextlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch

from stages.artifacts.files import digest, disk_errors, remove, sync_folder, write_json
from stages.artifacts.inputs import task_sources
from stages.artifacts.pipeline import AUTO, STAGES, StageSpec, extent_settings
from stages.artifacts.progress import Logged, Report, Silent
from stages.artifacts.project import Project
from stages.artifacts.provenance import made, now, threads_restored
from stages.artifacts.run_directory import (
    BEGUN,
    MANIFEST,
    StageFolder,
    check_run,
    file_records,
    folder_of,
    manifest_hash,
    prepare_run,
)
from stages.artifacts.states import (
    DONE,
    PARTIAL,
    STALE,
    StageState,
    States,
    make_identity,
    progress_of,
    redo_command,
    require_done,
)
from stages.config import EXECUTION
from stages.errors import ArtifactError, ComputeError, DataError, SettingsError, TaskError, TryAgainError
from stages.materials import Materials
from stages.outcome import Finished, Outcome


class Stage(Materials, ABC):
    """One stage of one project: subclasses give its name, its plan and its work.

    Args:
        project: the project.
        report: hears of its progress.
    """

    name: ClassVar[str]
    redoes_stale: ClassVar[bool] = False

    def __init__(self, project: Project, report: Report | None = None) -> None:
        super().__init__(project)
        self.report: Report = report or Silent()
        self.states = States(project, self.hash_dataset)
        self._identity: dict[str, Any] = {}
        self._sources: dict[str, Any] = {}
        self._begun: dict[str, Any] = {}

    # What a subclass gives.

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What would be done, how much and how many bytes, for a dry run."""

    @abstractmethod
    def work(self, wip: Path) -> Finished | None:
        """Do it inside `wip`, continuing whatever an earlier process left there; None where others have to finish it."""

    def prepare(self, wip: Path) -> None:
        """Lay out `wip`, before the work begins or goes on."""

    def waiting(self) -> Outcome:
        """What is said where others have to finish the work."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse faults of the settings, the task and the data before anything is written."""

    def resolved(self) -> dict[str, Any]:
        """What `auto` identity settings of this stage stand for, by dotted name."""
        return {}

    def extend(self, finished: Path, wip: Path) -> None:
        """Begin `wip` from a finished folder that does not go far enough."""

    def auto_threads(self) -> int:
        """The CPU threads that `auto` stands for."""
        return torch.get_num_threads()

    def content_inputs(self) -> dict[str, Any]:
        """Further content the result depends on."""
        return {}

    @property
    def folder(self) -> StageFolder:
        """Where the result lies."""
        return folder_of(self.project, self.name)

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes off the stage."""
        return self.folder.lock()

    def gate(self) -> contextlib.AbstractContextManager[None]:
        """Where several processes may hold the stage: one at a time begins."""
        return contextlib.nullcontext()

    @property
    def joins(self) -> bool:
        """Whether this process goes on with what others have begun, even where it was to be redone."""
        return False

    @property
    def splits_read(self) -> dict[str, str]:
        """Which split stands for `input`."""
        return {}

    # What stages share.

    @property
    def spec(self) -> StageSpec:
        """The stage's place in the pipeline."""
        return STAGES[self.name]

    @property
    def settings(self) -> Any:
        """The stage's own table."""
        return self.project.settings.table(self.name)

    @property
    def fingerprint(self) -> str:
        """Of the work under way."""
        return self._begun["fingerprint"]

    def tell_total(self, total: int, unit: str) -> None:
        """Record how much there is to do, for `ocd status` while the work is under way."""
        self._begun["plan"] = {"total": total, "unit": unit}
        write_json(self.folder.wip / BEGUN, self._begun)

    def keep_execution(self, **resolved: Any) -> dict[str, Any]:
        """Execution settings as resolved now, or as the unfinished work was begun with: the same ones give the same bits."""
        kept = resolved | self._begun["execution"]
        if kept != self._begun["execution"] and (self.folder.wip / BEGUN).exists():
            write_json(self.folder.wip / BEGUN, self._begun | {"execution": kept})
        self._begun["execution"] = kept
        return kept

    def keep_threads(self, threads: int) -> None:
        """Work on as many threads as what is taken up was made with."""
        self._begun["threads"] = threads
        torch.set_num_threads(threads)

    # The life of a stage.

    def execute(self, *, force: bool = False, dry_run: bool = False) -> Outcome:
        """Bring the stage up to date, or say what that would take; what is wrong with the request is found before it begins.

        Raises:
            ArtifactError: an earlier stage is not done, or this one is stale and not forced.
            TryAgainError: another process holds it, the disk is full, or it was interrupted.
        """
        check_run(self.project)
        self.device  # noqa: B018 (one that is absent is refused before anything else)
        require_done(self.states, self.spec.reads, self.name)
        state = self._state(force)
        if state.state == DONE and not force:
            return Outcome(self.name, state.manifest["summary"], up_to_date=True, path=self.folder.found)
        if dry_run:
            return Outcome(self.name, {"stage": self.name, "state": state.state, **self.plan()}, planned=True)
        self._refuse_stale(state, force)
        self.check()
        prepare_run(self.project)
        with self.hold(), disk_errors(self.project.run_path), threads_restored():
            with self.gate():
                self.folder.restore()
                if (self.folder.wip / MANIFEST).exists():
                    # A kill came between the manifest and the exchange of the folders: the work is whole.
                    self.folder.exchange()
                state = self._state(force)
                if state.state == DONE and not force:
                    return Outcome(self.name, state.manifest["summary"], path=self.folder.path)
                self._begin(state, force)
                self.prepare(self.folder.wip)
            try:
                return self._complete()
            except (SettingsError, TaskError, DataError, ComputeError):
                # Refused before anything was finished: whoever mends the cause begins anew.
                progress = progress_of(self.folder)
                if not self.joins and not (progress and progress["done"]):
                    remove(self.folder.wip)
                raise
            except KeyboardInterrupt as error:
                raise self._interruption(state, force) from error

    def _interruption(self, state: StageState, force: bool) -> TryAgainError:
        """What to type after an interruption: a forced redo has no half that a plain command would take up as its own."""
        if force and state.state == DONE:
            return TryAgainError(f"{self.name} was interrupted; the result from before stands", "the same command begins anew")
        without = " without --force" if force else ""
        done = f"{self.name} was interrupted; what is finished is kept"
        return TryAgainError(done, f"to continue, run the same command again{without}")

    def _state(self, force: bool) -> StageState:
        """The stage's state; records too damaged to tell are no obstacle to doing it again."""
        extra = self.content_inputs()
        try:
            return self.states.find_in(self.spec, self.folder, self.splits_read, extra)
        except ArtifactError as error:
            if not force:
                raise ArtifactError(error.message, f"to redo it: ocd {self.name} --force") from error
            return StageState(self.name, STALE, error.message)

    def _refuse_stale(self, state: StageState, force: bool) -> None:
        if state.state != STALE or force:
            return
        if self.redoes_stale:
            self.report.message(f"{self.name} is redone: {state.detail}")
            return
        raise ArtifactError(
            f"{self.name} is stale: {state.detail}",
            f"to redo it: {redo_command(state)}; to keep it, set back what changed",
        )

    def _begin(self, state: StageState, force: bool) -> None:
        """Make or take up the unfinished folder."""
        wip = self.folder.wip
        redo = force or (state.state == STALE and self.redoes_stale)
        begun = None if redo and not self.joins else self.folder.begun()
        identity, self._sources = self._fresh() if redo else (state.identity, state.sources)
        identity["settings"] |= {key: value for key, value in self.resolved().items() if identity["settings"][key] == AUTO}
        fingerprint = digest(identity)
        if begun is None or begun["fingerprint"] != fingerprint:
            threads = self.project.settings.run.threads
            remove(wip)
            wip.mkdir(parents=True)
            begun = {
                "identity": identity,
                "fingerprint": fingerprint,
                "execution": {},
                "threads": self.auto_threads() if threads == AUTO else threads,
            }
        torch.set_num_threads(begun["threads"])
        self._begun, self._identity = begun, begun["identity"]
        if begun["identity"] is identity and state.state == PARTIAL and not redo:
            # Before the record: a kill in between then leaves nothing that could be taken for a whole beginning.
            self.extend(self.folder.path, wip)
        begun |= {"wanted": extent_settings(self.project, self.spec), "sources": self._sources}
        write_json(wip / BEGUN, begun)

    def _fresh(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Identity and sources with every `auto` undecided and nothing taken from an earlier manifest."""
        roles = tuple(self.splits_read.get(role, role) for role in self.spec.data)
        inputs, sources = task_sources(self.project, roles, None, self.hash_dataset) if self.spec.task else ({}, {})
        for name in self.spec.reads:
            inputs[STAGES[name].content] = self.manifest_of(name)["content"]
        return make_identity(self.project, self.spec, inputs | self.content_inputs(), None), sources

    def _complete(self) -> Outcome:
        """Work, write the manifest last, exchange the folders."""
        wip, started = self.folder.wip, now()
        report, self.report = self.report, Logged(self.report, wip / "log.txt")
        self.report.start(self.name)
        try:
            if (finished := self.work(wip)) is None:
                return self.waiting()
        finally:
            self.report = report
        manifest = self._manifest(wip, finished, started)
        self._check_inputs_still()
        write_json(wip / MANIFEST, {**manifest, "sha256": manifest_hash(manifest)})
        remove(wip / BEGUN)
        sync_folder(wip)
        self.folder.exchange()
        return Outcome(self.name, self.folder.manifest()["summary"], path=self.folder.path)

    def _check_inputs_still(self) -> None:
        """Refuse a result whose inputs another process redid meanwhile.

        Raises:
            TryAgainError: naming the input.
        """
        for name in self.spec.reads:
            if self.manifest_of(name)["content"] != self._identity["inputs"][STAGES[name].content]:
                raise TryAgainError(f"{name} was redone while {self.name} read it", f"run: ocd {self.name} --force")

    def _manifest(self, wip: Path, finished: Finished, started: str) -> dict[str, Any]:
        execution = self.settings.of_kind(EXECUTION) | self._begun["execution"]
        return {
            "stage": self.name,
            "fingerprint": self._begun["fingerprint"],
            "identity": self._identity,
            "extents": finished.extents,
            "execution": execution,
            "content": finished.content,
            "summary": {"stage": self.name, **finished.summary},
            **finished.extra,
            "sources": self._sources,
            "files": file_records(wip, finished.hashes),
            "made": made(started, self.device),
        }
