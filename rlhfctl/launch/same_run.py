"""Whether two run directories hold the same run bit for bit, and where they first differ.

Compared are metrics.jsonl without what depends on the clock, samples.jsonl, the newest checkpoint (weights, optimizer,
counters), and every tensor of final/, value_model/ and of what earlier phases left. Safetensors are read as bytes: no
tensor library.
"""

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from rlhfctl.run_dir import RunDir, json_lines

CLOCK = ("seconds/", "memory/", "tokens_per_second")
# safetensors' names: bytes of an element, and how struct unpacks it (bfloat16 is the upper half of a float32).
FORMATS = {"F64": (8, "<d"), "F32": (4, "<f"), "F16": (2, "<e"), "BF16": (2, ""), "I64": (8, "<q")}
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Compared:
    """what: a file of the run directory. counted: what was compared in it. difference: the first one, None: same.

    step: the step that the difference belongs to, where the file has steps; key: the metric or the tensor.
    """

    what: str
    counted: str
    difference: str | None = None
    step: int | None = None
    key: str | None = None

    @property
    def where(self) -> str:
        """The difference with its step and key."""
        place = [f"step {self.step}"] if self.step is not None else []
        place += [self.key] if self.key is not None else []
        return f"{', '.join(place)}: {self.difference}" if place else str(self.difference)


def compare_runs(whole: RunDir, resumed: RunDir) -> list[Compared]:
    """One entry a file, the metrics first: what differs there names the step."""
    found = [compare_lines(whole.metrics, resumed.metrics)]
    if whole.samples.exists() or resumed.samples.exists():
        found.append(compare_lines(whole.samples, resumed.samples))
    for name in files_of(whole, resumed):
        compare = compare_tensors if name.endswith(".safetensors") else compare_lines
        found.append(replace(compare(whole.path / name, resumed.path / name), what=name))
    return found


def files_of(*runs: RunDir) -> list[str]:
    """Relative names over all runs: of the newest checkpoint, then of the models beside it."""
    names: dict[str, None] = {}
    for run in runs:
        newest = run.newest_checkpoint()
        others = [run.path / name for name in ("warmup", "rounds", "critic", "value_model", "final")]
        places = [*([newest] if newest else []), *others]
        for place in places:
            for file in sorted([*place.rglob("*.safetensors"), *place.glob("trainer.json")]):
                names[str(file.relative_to(run.path))] = None
    return list(names)


def compare_lines(whole: Path, resumed: Path) -> Compared:
    """Two files of JSON lines, number by number as they are written."""
    ours, theirs = records(whole), records(resumed)
    numbers = 0
    for one, other in zip(ours, theirs, strict=False):
        step = int(one.get("step", 0))
        for key in [*one, *(key for key in other if key not in one)]:
            numbers += 1
            if one.get(key, "absent") != other.get(key, "absent"):
                told = f"{one.get(key, 'absent')} uninterrupted, {other.get(key, 'absent')} resumed"
                return Compared(whole.name, f"{len(ours)} lines", told[:300], step, key)
    if len(ours) != len(theirs):
        extra = max(ours, theirs, key=len)[min(len(ours), len(theirs))]
        told = f"{len(ours)} lines uninterrupted, {len(theirs)} resumed"
        return Compared(whole.name, f"{len(ours)} lines", told, int(extra.get("step", 0)), "step")
    return Compared(whole.name, f"{len(ours)} lines, {numbers} values")


def records(path: Path) -> list[dict[str, Any]]:
    """Numbers stay the text they are written in: nothing is rounded, and nan equals nan."""
    if not path.exists():
        return []
    lines = json_lines(path.read_text(encoding="utf-8"))
    read = [json.loads(line, parse_float=str, parse_constant=str) for line in lines]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCK)} for row in read]


def compare_tensors(whole: Path, resumed: Path) -> Compared:
    """Two safetensors files, tensor by tensor."""
    name = whole.name
    for path, side in ((whole, "uninterrupted"), (resumed, "resumed")):
        if not path.exists():
            return Compared(name, "0 tensors", f"the {side} run has no such file")
    with open(whole, "rb") as ours, open(resumed, "rb") as theirs:
        mine, their = header(ours), header(theirs)
        for key in [*mine, *(key for key in their if key not in mine)]:
            if key not in mine or key not in their:
                side = "uninterrupted" if key in mine else "resumed"
                return Compared(name, f"{len(mine)} tensors", f"only in the {side} run", key=key)
            difference = compare_tensor(ours, mine[key], theirs, their[key])
            if difference is not None:
                return Compared(name, f"{len(mine)} tensors", difference, key=key)
    return Compared(name, f"{len(mine)} tensors")


def header(file: BinaryIO) -> dict[str, dict[str, Any]]:
    """Of a safetensors file: for each tensor dtype, shape, and where its bytes lie in the file."""
    (length,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["place"] = [8 + length + offset for offset in entry.pop("data_offsets")]
    return dict(sorted(entries.items()))


def compare_tensor(
    ours: BinaryIO, mine: dict[str, Any], theirs: BinaryIO, their: dict[str, Any]
) -> str | None:
    """The first element that differs, in words."""
    form, other = (f"{entry['dtype']}{entry['shape']}" for entry in (mine, their))
    if form != other:
        return f"{form} uninterrupted, {other} resumed"
    start, end = mine["place"]
    ours.seek(start)
    theirs.seek(their["place"][0])
    size = FORMATS.get(mine["dtype"], (1, "<B"))[0]
    for first in range(0, end - start, CHUNK):
        length = min(CHUNK, end - start - first)
        a, b = ours.read(length), theirs.read(length)
        if a != b:
            byte = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
            at = byte - byte % size
            values = [element(mine["dtype"], chunk[at : at + size]) for chunk in (a, b)]
            return f"element {(first + at) // size}: {values[0]} uninterrupted, {values[1]} resumed"
    return None


def element(dtype: str, raw: bytes) -> float | str:
    if dtype == "BF16":
        dtype, raw = "F32", b"\0\0" + raw
    if dtype not in FORMATS:
        return f"0x{raw.hex()}"
    value: float = struct.unpack(FORMATS[dtype][1], raw)[0]
    return value
