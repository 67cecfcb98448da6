"""What every stage is: a plan, and work done inside an unfinished folder that gets its name when it is whole."""

from pathlib import Path
from typing import Any

import torch

from stages.foundation.config import EXECUTION
from stages.foundation.errors import ArtifactError, ComputeError, DataError, SettingsError, TaskError, TryAgainError
from stages.foundation.files import digest, disk_errors, remove, sync_folder, write_json
from stages.foundation.progress import Logged
from stages.lifecycle.hooks import StageHooks
from stages.lifecycle.outcome import Finished, Outcome
from stages.run_directory.folders import (
    BEGUN,
    MANIFEST,
    check_run,
    file_records,
    manifest_hash,
    prepare_run,
)
from stages.run_directory.pipeline import AUTO, STAGES, extent_settings
from stages.run_directory.provenance import made, now, threads_restored
from stages.run_directory.sources import sources_of
from stages.run_directory.states import (
    DONE,
    PARTIAL,
    STALE,
    StageState,
    make_identity,
    progress_of,
    redo_command,
    require_done,
)


class Stage(StageHooks):
    """One stage of one project: subclasses give its name, its plan and its work."""

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
            if not dry_run:
                self.tidy()
            return Outcome(self.name, state.manifest["summary"], up_to_date=True, path=self.folder.found)
        if dry_run:
            return Outcome(self.name, {"stage": self.name, "state": state.state, **self.plan()}, planned=True)
        self._refuse_stale(state, force)
        self.check()
        prepare_run(self.project)
        with self.hold(), disk_errors(self.project.run_path), threads_restored():
            try:
                return self._take_up(force) or self._complete()
            except (SettingsError, TaskError, DataError, ComputeError):
                # Refused before anything was finished: whoever mends the cause begins anew.
                progress = progress_of(self.folder)
                if not self.joins and not (progress and progress.get("kept", progress["done"])):
                    remove(self.folder.wip)
                raise
            except KeyboardInterrupt as error:
                raise self._interruption(state, force) from error

    def _take_up(self, force: bool) -> Outcome | None:
        """Begin the work or go on with it, one process at a time; the outcome, where it has been done meanwhile."""
        with self.gate():
            self.folder.restore()
            if (self.folder.wip / MANIFEST).exists():
                # A kill came between the manifest and the exchange of the folders: the work is whole.
                self._exchange()
            state = self._state(force)
            if state.state == DONE and not force:
                return Outcome(self.name, state.manifest["summary"], path=self.folder.path)
            begins = self._begin(state, force)
            try:
                self.prepare(self.folder.wip)
            except TryAgainError:
                if begins:
                    remove(self.folder.wip)
                raise
        return None

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
            f"to redo it: {redo_command(state, self.project)}; to keep it, set back what changed",
        )

    def _begin(self, state: StageState, force: bool) -> bool:
        """Make or take up the unfinished folder; whether it was made."""
        wip = self.folder.wip
        redo = force or (state.state == STALE and self.redoes_stale)
        begun = None if redo and not self.joins else self.folder.begun()
        identity, self._sources = self._fresh() if redo else (state.identity, state.sources)
        identity["settings"] |= {key: value for key, value in self.resolved().items() if identity["settings"].get(key) == AUTO}
        fingerprint = digest(identity)
        begins = begun is None or begun["fingerprint"] != fingerprint
        if begun is not None and (begins or begun.get("wanted") != extent_settings(self.project, self.spec)):
            self.check_discard()
        if begins:
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
        return begins

    def _fresh(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Identity and sources with every `auto` undecided and nothing taken from an earlier manifest."""
        roles = tuple(self.splits_read.get(role, role) for role in self.spec.data)
        inputs, sources = sources_of(self.project, self.spec, roles, None, self.hash_dataset)
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
        self._exchange()
        return Outcome(self.name, self.folder.manifest()["summary"], path=self.folder.path)

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
            "files": file_records(wip, finished.hashes, self.scratch),
            "made": made(started, self.device),
        }
