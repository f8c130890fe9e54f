"""Writes the shards of a container: each in one lane, and several lanes side by side.

The system writes one file at a time, and a digest is the work of one thread: with one lane neither
would keep up with many workers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from codecllm.converter.encode.buffers import Buffers
from codecllm.converter.plan.conversion_plan import planned_entries
from codecllm.converter.plan.tensor_plan import TensorPlan
from codecllm.converter.write.backlog import Backlog
from codecllm.converter.write.journal import FinishedShard, Journal
from codecllm.converter.write.manifest import Conversion
from codecllm.converter.write.tensor_writer import TensorWriter
from codecllm.formats.checksums import sha256_of_descriptor, xxh3_hex
from codecllm.formats.files import SafeFile
from codecllm.formats.manifest.records import ShardRecord, StoredRecord
from codecllm.formats.shards.shard_writer import ShardWriter

_BACKLOG_BYTES = 12 << 20  # that are being hashed or written, for each worker
_WORKERS_OF_A_LANE = 4
_MOST_LANES = 4
_PROGRESS_SECONDS = 0.05

OnBytes = Callable[[str, int], None]
"""Called with a tensor's name and the source bytes that were done."""


@dataclass(frozen=True, slots=True)
class ShardJob:
    """A shard to write: its number among all, its name, and its tensors in order."""

    number: int
    name: str
    plans: list[TensorPlan]


@dataclass(frozen=True, slots=True)
class _ClosedShard:
    """A shard with all its bytes, and the futures of its sha256 and of its way to the disk."""

    name: str
    size: int
    header_xxh3: str
    sha256: Future[str]
    synced: Future[None]


class _OvertakenError(Exception):
    """A shard with a smaller number failed: that error is the one to raise."""


class ShardLanes:
    """The threads of a conversion; leaving the `with` block ends them.

    Attributes:
        finished: of each shard, by number: its record and those of its tensors.
    """

    def __init__(self, conversion: Conversion, folder: Path, journal: Journal, shards: int) -> None:
        """Starts no thread yet; `shards` are to be written."""
        workers = conversion.options.threads
        # Parameters are chosen tensor by tensor, in the order of the model.
        choosing = conversion.choice.provider is not None
        self.count = 1 if choosing else _lanes(workers, shards)
        self.finished: dict[int, Future[FinishedShard]] = {}
        self._conversion, self._folder, self._journal = conversion, folder, journal
        self._buffers = Buffers()
        self._backlog = Backlog(workers * _BACKLOG_BYTES)
        # For each lane. A lane alone is bound by its digest, which fewer workers can feed; blocks
        # that wait take memory, and new pages take a sixth of the processor time of 16 workers.
        self._window = 2 * workers // self.count + 2
        self._failed: dict[int, BaseException] = {}
        self._opened: list[ShardWriter] = []
        self._promised: list[Future[StoredRecord]] = []
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="codecllm-encode")
        # Behind the runs that wait to be encoded, digests would keep what they hash in memory, and
        # so they would behind whole files.
        self._hashers = ThreadPoolExecutor(max(1, workers // 2), thread_name_prefix="codecllm-hash")
        self._files = ThreadPoolExecutor(max(1, workers // 2), thread_name_prefix="codecllm-file")
        self._lanes = ThreadPoolExecutor(self.count, thread_name_prefix="codecllm-lane")
        # One thread each: a rollback writes again where earlier parts may still be under way.
        self._writers = [
            ThreadPoolExecutor(1, thread_name_prefix="codecllm-write") for _ in range(self.count)
        ]
        # fsync may take seconds: no worker has to wait for the disk.
        self._sync = ThreadPoolExecutor(1, thread_name_prefix="codecllm-sync")
        self._notes = ThreadPoolExecutor(1, thread_name_prefix="codecllm-journal")

    def __enter__(self) -> ShardLanes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._backlog.close()
        pools = [*self._writers, self._sync, self._workers, self._hashers, self._files, self._lanes]
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
        # A digest whose parts were not hashed any more never ends: the journal must not wait.
        for record in self._promised:
            record.cancel()
        self._notes.shutdown(wait=True, cancel_futures=True)
        # All threads have ended: none can write into a closed descriptor.
        for shard in self._opened:
            shard.abort()  # of no effect where it is finished
        # Writers refer to themselves: without this their buffers would live until a collection.
        self._buffers.clear()

    def write(self, jobs: list[ShardJob], on_bytes: OnBytes) -> None:
        """Writes the shards; `finished` then has a future of each.

        Args:
            jobs: the shards, by their numbers.
            on_bytes: called in the calling thread.

        Raises:
            NonFiniteWeightError, OSError, FormatError: as of `TensorWriter.write_all`; of several
                shards that fail, the error of the first.
        """
        if self.count == 1:
            self._run_lane(jobs, 0, on_bytes)
            return
        events: SimpleQueue[tuple[str, int]] = SimpleQueue()
        pending = {
            self._lanes.submit(
                self._run_lane,
                jobs[lane :: self.count],
                lane,
                lambda *event: events.put(event),
            )
            for lane in range(self.count)
        }
        lanes = list(pending)
        while pending:
            # Not woken for each run: the workers need the interpreter.
            _, pending = wait(pending, timeout=_PROGRESS_SECONDS)
            while not events.empty():
                on_bytes(*events.get())
        if self._failed:
            raise self._failed[min(self._failed)]
        for lane in lanes:
            lane.result()

    def _run_lane(self, jobs: list[ShardJob], lane: int, on_bytes: OnBytes) -> None:
        number = 0

        def checked(name: str, count: int) -> None:
            if self._failed and min(self._failed) < number:
                raise _OvertakenError
            on_bytes(name, count)

        writer = TensorWriter(
            self._workers,
            (plan for job in jobs for plan in job.plans),
            hashers=self._hashers,
            window=self._window,
            backlog=self._backlog,
            buffers=self._buffers,
            non_finite=self._conversion.options.non_finite,
            on_bytes=checked,
            params=self._conversion.choice.provider,
        )
        for job in jobs:
            number = job.number
            try:
                self._write_shard(job, writer, self._writers[lane])
            except _OvertakenError:
                return
            except BaseException as exc:
                self._failed[number] = exc
                raise

    def _write_shard(self, job: ShardJob, writer: TensorWriter, pool: ThreadPoolExecutor) -> None:
        """Writes a shard; it is hashed, synchronized and noted in the journal later."""
        metadata = shard_metadata(self._conversion.plan.format_version)
        path = self._folder / job.name
        shard = ShardWriter(path, planned_entries(job.plans), metadata, pool)
        self._opened.append(shard)
        records = list(writer.write_all(job.plans, shard, job.number))
        self._promised += records
        closed = pool.submit(self._close_shard, shard)  # behind all parts of the shard
        self.finished[job.number] = self._notes.submit(_note, self._journal, closed, records)

    def _close_shard(self, shard: ShardWriter) -> _ClosedShard:
        head, size = shard.complete()
        # The disk works while the file is hashed from the page cache.
        return _ClosedShard(
            shard.path.name,
            size,
            xxh3_hex(head),
            self._files.submit(_sha256_of, shard.path),
            self._sync.submit(shard.sync),
        )


def shard_metadata(version: str) -> dict[str, str]:
    """Returns the strings that the header of a shard holds."""
    return {"format": "pt", "codecllm.format_version": version}


def _lanes(workers: int, shards: int) -> int:
    return max(1, min(_MOST_LANES, workers // _WORKERS_OF_A_LANE, shards))


def _note(
    journal: Journal, closed: Future[_ClosedShard], tensors: list[Future[StoredRecord]]
) -> FinishedShard:
    """Notes in the journal that a shard is whole and on the disk."""
    shard = closed.result()
    record = ShardRecord(
        name=shard.name,
        bytes=shard.size,
        sha256=shard.sha256.result(),
        header_xxh3=shard.header_xxh3,
    )
    shard.synced.result()
    finished_shard = FinishedShard(record, [tensor.result() for tensor in tensors])
    journal.add(finished_shard)
    return finished_shard


def _sha256_of(path: Path) -> str:
    with SafeFile(path.parent, path.name) as file:
        return sha256_of_descriptor(file.descriptor)[0]
