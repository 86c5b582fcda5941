"""Writes a checkpoint by torch.distributed.checkpoint: each rank a safetensors file, the first rank all other files."""

import dataclasses
import shutil
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from torchlmoe.checkpoint.folders import partial_of, publish
from torchlmoe.checkpoint.manifest import describe, write_durably, write_manifest
from torchlmoe.parallel.failures import cause_of


class CheckpointWriter(dcp.HuggingFaceStorageWriter):
    """Collects the tensors in a partial folder, and publishes it when all ranks have written.

    root: the folder of the run's checkpoints, shared by all ranks.
    files: name -> content of the other files, which the first rank writes.
    keep_latest_k: number of checkpoints that stay, including this one.
    """

    def __init__(self, root: Path, step: int, files: dict[str, bytes], keep_latest_k: int):
        self.root, self.step, self.files, self.keep_latest_k = root, step, files, keep_latest_k
        self.partial = partial_of(root, step)
        super().__init__(str(self.partial), save_distributed=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        names = [item.index.fqn for item in plan.items]
        # A file has one tensor per name: a second piece would silently replace the first.
        assert len(names) == len(set(names)), "a rank holds two pieces of one tensor"
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Prepare the folder. Called on the first rank, before any rank writes."""
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        return super().prepare_global_plan(plans)

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = super().write_data(plan, planner).value()
        names = {result.storage_data.relative_path for result in results}
        entries = {name: describe(self.partial / name) for name in names}
        future: Future[list[WriteResult]] = Future()
        future.set_result([dataclasses.replace(result, storage_data=entries) for result in results])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publish the folder. Called on the first rank, after all ranks have written."""
        files = {name: entry for rank in results for result in rank[:1] for name, entry in result.storage_data.items()}
        for name in files:
            if not (self.partial / name).is_file():
                raise ValueError(
                    f"{self.partial / name} was written by another rank but is not seen by the first: "
                    "job.dump_folder must be on a file system that all nodes share."
                )
        for name, content in self.files.items():
            write_durably(self.partial / name, content)
            files[name] = describe(self.partial / name)
        write_manifest(self.partial, files)
        publish(self.root, self.step, self.keep_latest_k)


def save_failure(error: CheckpointException, name: str, root: Path, remedy: str) -> OSError:
    """Returns the error of a failed save: one sentence with the reason of the first rank. name: what was saved."""
    cause = cause_of(error)
    reason = getattr(cause, "strerror", None) or str(cause)
    return OSError(f"{name} could not be written to {root}: {reason}; {remedy}.")
