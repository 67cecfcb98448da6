"""What every stage is: a plan, and work done inside an unfinished folder that gets its name when it is whole."""

import contextlib
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from stages.foundation.current_device import on
from stages.foundation.errors import ArtifactError, ComputeError, DataError, SettingsError, TaskError, TryAgainError
from stages.foundation.files import disk_errors, remove, strays, sweep, sync_folder
from stages.foundation.memory import taking_less_memory
from stages.foundation.no_doubles import doubles_for
from stages.foundation.progress import Logged, Report
from stages.foundation.setting import EXECUTION
from stages.foundation.threads import set_threads, threads_restored
from stages.foundation.torch_state import usual_torch
from stages.lifecycle.context import RunContext
from stages.lifecycle.results import CommandResult, WorkResult
from stages.lifecycle.sharing import Holding
from stages.lifecycle.unfinished import Unfinished
from stages.run_directory import states
from stages.run_directory.folders import BEGUN, MANIFEST, StageFolder, check_run, file_records, folder_of, prepare_run
from stages.run_directory.format import Begun, Identity, Manifest, SourceRecord
from stages.run_directory.locks import Part
from stages.run_directory.pipeline import AUTO, STAGES, Query, StageSpec, extent_settings, spec_of
from stages.run_directory.provenance import made, now
from stages.run_directory.sources import inputs_of


class Stage(ABC):
    """One stage of one run: a subclass gives its name, and writes `check`, `plan`, `begin` and `work`.

    Args:
        context: what the run's stages work with.
        part: "i/n" where this process does a part of the blocks, or None for the whole.
    """

    name: ClassVar[str]
    # What lies in the unfinished folder for the work alone, and goes when the manifest is there.
    scratch: ClassVar[tuple[str, ...]] = ()
    # What to type where memory runs out.
    takes_less_memory: ClassVar[str] = "use smaller batches: --set {name}.batch_size=N"

    def __init__(self, context: RunContext, part: str | None = None) -> None:
        self.context = context
        self.report: Report = context.report
        self.part = Part.parse(part) if part is not None else None
        self.unfinished: Unfinished

    @abstractmethod
    def check(self) -> None:
        """Refuse faults of the settings, the task and the data before anything is written."""

    @abstractmethod
    def plan(self) -> dict[str, Any]:
        """What would be done, how much and how many bytes, for a dry run."""

    @abstractmethod
    def begin(self, finished: Path | None) -> None:
        """Lay out the unfinished folder, or what of it is missing; where `finished` is a finished folder that does not go far
        enough, begin from that."""

    @abstractmethod
    def work(self, folder: Path) -> WorkResult | None:
        """Do it inside the unfinished folder, continuing whatever an earlier process left there; None where others have to
        finish it."""

    # What some stages say beside these.

    query: Query | None = None

    def resolved(self) -> dict[str, Any]:
        """What `auto` identity settings of this stage stand for, by dotted name."""
        return {}

    def auto_threads(self) -> int:
        """The CPU threads that `auto` stands for."""
        return torch.get_num_threads()

    def in_the_way(self) -> ArtifactError | None:
        """What is there and, without --force, does not give way, with what to type."""
        return None

    # What all stages have.

    @property
    def folder(self) -> StageFolder:
        return folder_of(self.context.project, self.name, self.query.name if self.query else "")

    @property
    def settings(self) -> Any:
        return self.context.project.settings.table(self.name)

    @cached_property
    def _spec(self) -> StageSpec:
        return spec_of(self.context.project, self.name)

    @cached_property
    def _holding(self) -> Holding:
        return Holding(self.folder, self.part)

    @cached_property
    def _states(self) -> states.States:
        return states.States(self.context.project, self.context.hash_dataset)

    # Its life.

    @usual_torch()
    def execute(self, *, force: bool = False, dry_run: bool = False) -> CommandResult:
        """Bring the stage up to date, or say what that would take; what is wrong with the request is found before it begins.

        Raises:
            ArtifactError: an earlier stage is not done, or this one is stale and not forced.
            TryAgainError: another process holds it, the disk is full, or it was interrupted.
        """
        check_run(self.context.project)
        self.folder.check_links()
        device = self.context.device  # one that is absent is refused before anything else
        states.require_done(self._states, self._spec.reads, self.name)
        less = taking_less_memory(self.takes_less_memory.format(name=self.name))
        with doubles_for(device), on(device), less:
            return self._execute(force, dry_run)

    def _execute(self, force: bool, dry_run: bool) -> CommandResult:
        project, state = self.context.project, self._state(force)
        if state.state == states.DONE and not force:
            if not dry_run:
                self._tidy()
            return CommandResult(self.name, state.manifest.summary, up_to_date=True, path=self.folder.found)
        if not force and (error := self.in_the_way()):
            raise error
        if dry_run:
            return CommandResult(self.name, {"stage": self.name, "state": state.state, **self.plan()}, planned=True)
        self._refuse_stale(state, force)
        self.check()
        prepare_run(project)
        with disk_errors(project.run_path), self._holding.held(self.report.message), threads_restored():
            try:
                return self._take_up(force) or self._complete()
            except (SettingsError, TaskError, DataError, ComputeError):
                self._forget_beginning()
                raise
            except KeyboardInterrupt as error:
                raise self._interruption(state, force) from error

    def _tidy(self) -> None:
        """Remove from a finished folder temporary files of writers that were killed, unless somebody is at it."""
        if strays(self.folder.found):
            with contextlib.suppress(TryAgainError), self.folder.lock():
                sweep(self.folder.found)

    def _forget_beginning(self) -> None:
        """Refused before anything was finished: whoever mends the cause begins anew."""
        progress = states.progress_of(self.folder)
        if not self._holding.joins and not (progress and progress.get("kept", progress["done"])):
            remove(self.folder.wip)

    def _interruption(self, state: states.StageState, force: bool) -> TryAgainError:
        """What to type after an interruption: a forced redo has no half that a plain command would take up as its own."""
        if force and state.state == states.DONE:
            return TryAgainError(f"{self.name} was interrupted; the result from before stands", "the same command begins anew")
        without = " without --force" if force else ""
        done = f"{self.name} was interrupted; what is finished is kept"
        return TryAgainError(done, f"to continue, run the same command again{without}")

    def _state(self, force: bool) -> states.StageState:
        """The stage's state; records too damaged to tell are no obstacle to doing it again."""
        query = self.query
        try:
            return self._states.find_in(self._spec, self.folder, query)
        except ArtifactError as error:
            if not force:
                raise ArtifactError(error.message, f"to redo it: ocd {self.name} --force") from error
            return states.StageState(self.name, states.STALE, error.message)

    def _refuse_stale(self, state: states.StageState, force: bool) -> None:
        if state.state != states.STALE or force:
            return
        if self._spec.redoes_stale:
            self.report.message(f"{self.name} is redone: {state.detail}")
            return
        redo = states.redo_command(state, self.context.project)
        hint = states.ways_out([state], redo) or f"to redo it: {redo}; to keep it, set back what changed"
        raise ArtifactError(f"{self.name} is stale: {state.detail}", hint)

    def _take_up(self, force: bool) -> CommandResult | None:
        """Begin the work or go on with it, one process at a time; the result, where it has been done meanwhile."""
        with self._holding.gate():
            self.folder.restore()
            if (self.folder.wip / MANIFEST).exists():
                # A kill came between the manifest and the exchange of the folders: the work is whole.
                self._exchange()
            state = self._state(force)
            if state.state == states.DONE and not force:
                return CommandResult(self.name, state.manifest.summary, path=self.folder.path)
            self._begin(state, force)
        return None

    def _begin(self, state: states.StageState, force: bool) -> None:
        """Make or take up the unfinished folder, lay it out, and record what it was begun with."""
        wip, wanted = self.folder.wip, extent_settings(self.context.project, self._spec)
        redo = force or (state.state == states.STALE and self._spec.redoes_stale)
        begun = None if redo and not self._holding.joins else self.folder.begun()
        identity, sources = self._fresh() if redo else (state.identity, state.sources)
        decided = {key: value for key, value in self.resolved().items() if identity.settings.get(key) == AUTO}
        identity = identity.changed(settings=identity.settings | decided)
        begins = begun is None or begun.fingerprint != identity.fingerprint
        if begun is not None and (begins or begun.wanted != wanted):
            self._holding.refuse_to_discard()
        if begins:
            remove(wip)
            wip.mkdir(parents=True)
            asked = self.context.project.settings.run.threads
            threads = self.auto_threads() if asked == AUTO else asked
            begun = Begun(identity=identity, fingerprint=identity.fingerprint, execution={}, threads=threads)
        set_threads(begun.threads)
        self.unfinished = Unfinished(wip, begun.changed(wanted=wanted, sources=sources))
        try:
            # Recorded when it is laid out: what a kill in between leaves could not be taken for a whole beginning.
            self.begin(self.folder.path if begins and state.state == states.PARTIAL and not redo else None)
            self.unfinished.write()
        except TryAgainError:
            if begins:
                remove(wip)
            raise

    def _fresh(self) -> tuple[Identity, dict[str, SourceRecord]]:
        """Identity and sources with every `auto` undecided and nothing taken from an earlier manifest."""
        project, spec = self.context.project, self._spec
        upstream = {STAGES[name].content: self.context.manifest_of(name).content for name in spec.reads}
        hash_dataset = self.context.hash_dataset
        inputs, sources = inputs_of(project, spec, self.query, upstream, recorded=None, hash_dataset=hash_dataset)
        return states.make_identity(project, spec, inputs, None), sources

    def _complete(self) -> CommandResult:
        """Work, write the manifest last, exchange the folders."""
        wip, started = self.folder.wip, now()
        report, self.report = self.report, Logged(self.report, wip / "log.txt")
        self.report.start(self.name)
        try:
            if (result := self.work(wip)) is None:
                return self._waiting()
        finally:
            self.report = report
        manifest = self._manifest(wip, result, started)
        self._check_inputs_still()
        manifest.write(wip / MANIFEST)
        self._exchange()
        return CommandResult(self.name, self.folder.manifest().summary, path=self.folder.path)

    def _waiting(self) -> CommandResult:
        """This part is done; the whole is there already, or waits for other parts."""
        manifest = self.folder.manifest() if not self.folder.wip.exists() else None
        if manifest is not None:
            return CommandResult(self.name, manifest.summary, path=self.folder.path)
        summary = {"stage": self.name, "state": states.PARTIAL, "part": str(self.part), **states.progress_of(self.folder)}
        return CommandResult(self.name, summary, waits=True)

    def _exchange(self) -> None:
        """Give the whole work its name, without what was there for the work alone."""
        for name in (BEGUN, *self.scratch):
            remove(self.folder.wip / name)
        sync_folder(self.folder.wip)
        self.folder.exchange()

    def _check_inputs_still(self) -> None:
        """Refuse a result whose inputs another process redid meanwhile.

        Raises:
            TryAgainError: naming the input.
        """
        for name in self._spec.reads:
            if self.context.manifest_of(name).content != self.unfinished.begun.identity.inputs[STAGES[name].content]:
                raise TryAgainError(f"{name} was redone while {self.name} read it", f"run: ocd {self.name} --force")

    def _manifest(self, wip: Path, result: WorkResult, started: str) -> Manifest:
        begun = self.unfinished.begun
        extra = {"store": result.store} if result.store else {}
        return Manifest.hashed(
            stage=self.name,
            fingerprint=begun.fingerprint,
            identity=begun.identity,
            extents=result.extents,
            execution=self.settings.of_kind(EXECUTION) | begun.execution,
            content=result.content,
            summary={"stage": self.name, **result.summary},
            sources=begun.sources,
            files=file_records(wip, result.hashes, self.scratch),
            made=made(started, self.context.device),
            chosen=result.chosen,
            **extra,
        )
