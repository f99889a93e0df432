"""How a preparation goes: counted by its driver, written every few seconds, shown as text, JSON or Prometheus' exposition format.

Rows per second are measured over the last minute, shards at work included; images and bytes per second follow from them and from what a row of the
finished shards came to.
"""

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from rich.console import Console
from rich.live import Live

from flm_scale.data.prepare.fleet import Beat, Event, Fleet
from flm_scale.data.prepare.ledger import FOLDER, write_json
from flm_scale.errors import DataError

WINDOW_SECONDS, PLAIN_LINE_SECONDS, SILENT_SECONDS = 60.0, 10.0, 30.0
ALARM_ROWS, ALARM_SHARE = 1000, 0.4
NETWORK = frozenset({"dns", "refused", "timeout", "disconnected", "tls", "http_403", "http_429", "http_503"})
"""Fates that, when they come in masses, are about our own name server, line or address and not about the rows."""
State = Literal["running", "scoring", "sealing", "done", "failed", "stopped"]
AT_WORK: tuple[State, ...] = ("running", "scoring", "sealing")


@dataclass(frozen=True)
class Status:
    """One moment of a preparation."""

    state: State
    time: float
    shards: int
    shards_done: int
    rows: int
    rows_done: int
    """Those of the shards at work included. While it is scoring, these are shards and rows that are scored."""
    kept: int = 0
    """Samples in finished shards."""
    fates: dict[str, int] = field(default_factory=dict)
    """Of the rows of finished shards, the most frequent first."""
    workers: int = 0
    workers_wanted: int = 0
    rows_per_s: float = 0.0
    images_per_s_per_core: float = 0.0
    mb_in_per_s: float = 0.0
    mb_out_per_s: float = 0.0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    quarantined: dict[str, str] = field(default_factory=dict)
    """Reason by shard."""
    stragglers: list[dict[str, Any]] = field(default_factory=list)
    """Shards that take far longer than the others, with what their workers are at."""
    seconds_left: float | None = None
    alarm: str = ""


class Meter:
    """Counts what comes of a fleet's tasks."""

    def __init__(self, rows: Mapping[str, int], *, done: Mapping[str, Mapping[str, Any]]) -> None:
        """rows: of every shard, by name.   done: reports of the shards that were finished before."""
        self._rows, self._started = rows, time.monotonic()
        self._done: set[str] = set()
        self._fates, self._stage_seconds = Counter[str](), Counter[str]()
        self._kept = self._rows_done = self._retries = 0
        self._recent: deque[tuple[int, Mapping[str, int]]] = deque()
        self.quarantined: dict[str, str] = {}
        for report in done.values():
            self._add(report)
        self._before = (self._rows_done, self._kept)
        self._bytes_in = self._bytes_out = 0  # of this driver's shards alone
        self._window: deque[tuple[float, int]] = deque()

    def _add(self, report: Mapping[str, Any]) -> None:
        self._done.add(report["name"])
        self._rows_done += report["rows"]
        self._kept += report["count"]
        self._fates.update(report["fates"])
        self._stage_seconds.update(report["seconds"])

    def take(self, event: Event[Any]) -> None:
        """Count an event."""
        name = event.task.name
        if event.kind == "done":
            self._add(event.result)
            self._bytes_in += event.result["bytes_in"]
            self._bytes_out += event.result["bytes_out"]
            self._recent.append((event.result["rows"], event.result["fates"]))
            while sum(rows for rows, _ in self._recent) - self._recent[0][0] >= ALARM_ROWS:
                self._recent.popleft()
            self.quarantined.pop(name, None)
        elif event.kind == "given_up":
            self.quarantined[name] = event.reason
        elif event.kind in ("failed", "killed"):
            self._retries += 1

    def status(self, state: State, fleet: Fleet[Any] | None = None) -> Status:
        """Return how it goes now. fleet: while it is at work."""
        now, beats = time.monotonic(), fleet.beats() if fleet else []
        rows_done = self._rows_done + self._at_work(beats)
        self._window.append((now, rows_done))
        while now - self._window[0][0] > WINDOW_SECONDS:
            self._window.popleft()
        seconds, rows = now - self._window[0][0], rows_done - self._window[0][1]
        speed = max(0.0, rows / seconds) if seconds else 0.0
        here, kept = self._rows_done - self._before[0], self._kept - self._before[1]
        total, workers = sum(self._rows.values()), fleet.ready if fleet else 0
        return Status(
            state, time=round(time.time(), 1), shards=len(self._rows), shards_done=len(self._done), rows=total, rows_done=rows_done, kept=self._kept,
            fates=dict(self._fates.most_common()), workers=workers, workers_wanted=fleet.workers if fleet else 0, rows_per_s=round(speed, 1),
            images_per_s_per_core=round(speed * kept / max(here, 1) / max(workers, 1), 2),
            mb_in_per_s=round(speed * self._bytes_in / max(here, 1) / 1e6, 3),
            mb_out_per_s=round(speed * self._bytes_out / max(here, 1) / 1e6, 3),
            stage_seconds={stage: round(spent, 1) for stage, spent in self._stage_seconds.most_common()}, retries=self._retries,
            quarantined=dict(self.quarantined),
            stragglers=[beat._asdict() for beat in beats if beat.task_seconds > fleet.straggler_seconds] if fleet else [],
            seconds_left=round((total - rows_done) / speed, 1) if speed else None,
            alarm=("" if state == "scoring" else self._alarm()) or _idle(fleet, now - self._started))

    def _at_work(self, beats: Iterable[Beat]) -> int:
        """Return the rows that unfinished shards have come to; of two attempts the further one counts."""
        furthest: dict[str, int] = {}
        for beat in beats:
            furthest[beat.task] = max(furthest.get(beat.task, 0), beat.row)
        return sum(furthest.values())

    def _alarm(self) -> str:
        rows = sum(count for count, _ in self._recent)
        lost = Counter[str]()
        for _, fates in self._recent:
            lost.update({fate: count for fate, count in fates.items() if fate in NETWORK})
        reason, most = lost.most_common(1)[0] if lost else ("", 0)
        if rows < ALARM_ROWS or most < ALARM_SHARE * rows:
            return ""
        return (f"{most / rows:.0%} of the last {rows:,} rows are lost to {reason}: look at this machine's name server, proxy and address; "
                f"what is lost can be fetched again: flm data retry OUTPUT --failed --reason {reason}")


def _idle(fleet: Fleet[Any] | None, seconds: float) -> str:
    if fleet and not fleet.ready and seconds > WINDOW_SECONDS:
        return f"no worker has started for {seconds:.0f} s: the cluster has no free CPU or GPU, or no node with the labels asked for"
    return ""


def write_status(folder: Path, status: Status) -> None:
    """Replace DATASET/ledger/status.json."""
    write_json(folder / FOLDER / "status.json", asdict(status))


def read_status(folder: Path) -> Status:
    """Return the newest status. Raises DataError when nothing was ever prepared there."""
    file = folder / FOLDER / "status.json"
    try:
        status = Status(**json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder} tells of no preparation ({file} cannot be read); begin: flm data prepare --input X --output {folder}") from error
    if status.state in AT_WORK and time.time() - status.time > SILENT_SECONDS:
        alarm = f"its driver has been silent for {timedelta(seconds=round(time.time() - status.time))}: start the same command again, it goes on"
        return replace(status, state="stopped", workers=0, stragglers=[], seconds_left=None, alarm=alarm)
    return status


def as_text(status: Status) -> str:
    """Return a few lines for people."""
    finished = max(sum(status.fates.values()), 1)
    first = (f"{status.state}  shards {status.shards_done:,}/{status.shards:,}  rows {status.rows_done:,}/{status.rows:,}  "
             f"kept {status.kept / finished:.1%}  retries {status.retries}  quarantined {len(status.quarantined)}")
    lines = [first]
    if status.state in ("running", "scoring"):
        left = "?" if status.seconds_left is None else timedelta(seconds=round(status.seconds_left))
        lines[0] += f"  {status.rows_per_s:,.0f} rows/s  {left} left"
        lines.append(f"{status.images_per_s_per_core:,.0f} images/s/core on {status.workers}/{status.workers_wanted} workers  "
                     f"{status.mb_in_per_s:,.1f} MB/s in  {status.mb_out_per_s:,.1f} MB/s out")
    lost = [f"{fate} {count / finished:.1%}" for fate, count in Counter(status.fates).most_common() if fate != "success"]
    lines += [f"lost to: {'  '.join(lost[:8])}"] if lost else []
    for beat in status.stragglers[:5]:
        lines.append(f"slow: {beat['task']} on {beat['node']}: row {beat['row']} at {beat['stage']} for {beat['row_seconds']:.0f} s, "
                     f"{timedelta(seconds=round(beat['task_seconds']))} in all")
    lines += [f"quarantined: {shard}: {reason}" for shard, reason in list(status.quarantined.items())[:5]]
    return "\n".join([*lines, *([f"ALARM: {status.alarm}"] if status.alarm else [])])


def as_json(status: Status) -> str:
    """Return one line."""
    return json.dumps(asdict(status))


def as_prometheus(status: Status) -> str:
    """Return gauges in Prometheus' text format, as its node exporter collects them from files. Source: Exposition formats, version 0.0.4."""
    plain = {name: value for name, value in asdict(status).items() if isinstance(value, int | float)}
    plain |= {"quarantined": len(status.quarantined), "stragglers": len(status.stragglers), "alarm": int(bool(status.alarm)),
              "running": int(status.state in AT_WORK)}
    lines = [line for name, value in plain.items() for line in (f"# TYPE flm_prepare_{name} gauge", f"flm_prepare_{name} {value}")]
    for name, label, values in (("fate_rows", "fate", status.fates), ("stage_seconds", "stage", status.stage_seconds)):
        lines += [f"# TYPE flm_prepare_{name} gauge"] if values else []
        lines += [f'flm_prepare_{name}{{{label}="{key}"}} {value}' for key, value in values.items()]
    return "\n".join(lines)


FORMATS = {"text": as_text, "json": as_json, "prometheus": as_prometheus}


def show_status(folder: Path, *, form: Literal["text", "json", "prometheus"], watch: bool) -> None:
    """Print the newest status; with `watch`, every few seconds until the preparation ends."""
    while True:
        status = read_status(folder)
        print(FORMATS[form](status), flush=True)
        if not watch or status.state not in AT_WORK:
            return
        time.sleep(2)


class Display(AbstractContextManager["Display"]):
    """The live lines of a preparation: on a terminal they rewrite themselves; elsewhere a line now and then."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream, self._last = stream, time.monotonic()
        self._live = Live(console=Console(file=stream), auto_refresh=False) if stream.isatty() else None

    def __enter__(self) -> Self:
        """Begin."""
        if self._live:
            self._live.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Leave the terminal in order."""
        if self._live:
            self._live.stop()

    def show(self, status: Status) -> None:
        """Show a status, when it is time."""
        if self._live:
            self._live.update(as_text(status), refresh=True)
        elif time.monotonic() - self._last >= PLAIN_LINE_SECONDS:
            self._last = time.monotonic()
            lines = as_text(status).splitlines()
            print("\n".join([lines[0], *(line for line in lines if line.startswith("ALARM"))]), file=self._stream, flush=True)
