"""The hardware profile: what was measured on one device, as a versioned JSON file.

A profile holds forward times of models over node counts and context lengths, times of the ops over their sizes, the
loop's own overhead and the memory bandwidth. It knows nothing of trees or acceptance. Every field is described in
docs/hardware_profile.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from sequoia_kernels import checks
from sequoia_kernels.documents import MAX_TIME_MS, Document, Fields, Format, is_count, is_number
from sequoia_kernels.errors import ProfileError
from sequoia_kernels.fingerprints import DeviceFingerprint, ModelFingerprint

__all__ = ["DRAFT_STEP", "ForwardTable", "HardwareProfile", "OpPoint"]

logger = logging.getLogger("sequoia_kernels")

# Name among the ops of what a draft does once a step, where its levels share one forward.
DRAFT_STEP = "draft_step"


@dataclass(frozen=True)
class ForwardTable:
    """Forward times of one model at one batch size, over context lengths and node counts.

    Attributes:
        batch_size: requests in the forward.
        context_lens: committed tokens behind which the nodes stand, increasing. [C]
        node_counts: tokens fed for each request, increasing. [N]
        p20_ms: 20th percentile. [C][N], milliseconds.
        p50_ms: median. [C][N], milliseconds.
        p80_ms: 80th percentile. [C][N], milliseconds.
        repeats: forwards timed for each entry.
    """

    batch_size: int
    context_lens: tuple[int, ...]
    node_counts: tuple[int, ...]
    p20_ms: tuple[tuple[float, ...], ...]
    p50_ms: tuple[tuple[float, ...], ...]
    p80_ms: tuple[tuple[float, ...], ...]
    repeats: int


@dataclass(frozen=True)
class OpPoint:
    """Time of one op at one setting.

    Attributes:
        parameters: the sizes that were timed, by name; see docs/hardware_profile.md for each op's.
        p20_ms: 20th percentile, milliseconds.
        p50_ms: median, milliseconds.
        p80_ms: 80th percentile, milliseconds.
    """

    parameters: Mapping[str, int | float | str]
    p20_ms: float
    p50_ms: float
    p80_ms: float


@dataclass(frozen=True)
class HardwareProfile(Document):
    """Everything measured on one device. Made by `sequoia_kernels.measure_profile`, read by `plan_tree`.

    Attributes:
        device: what the times belong to.
        models: fingerprints of the measured models, by key.
        forwards: their forward tables, by key; one a batch size.
        ops: times of the ops, by op name.
        target_key: model taken as the target when none is named.
        draft_key: model taken as the draft when none is named.
        step_overhead_ms: time of one decoding step outside the forwards and ops.
        level_overhead_ms: the same for each forward of the draft.
        draft_overhead_ms: the same for a step with a draft, once: what its first forward takes longer than those behind
            it, and what the loop does for a tree that it does not for plain decoding.
        mean_over_median: mean time over median time of the calls of a model (by key) or an op (by name), 1 where there
            is none; one measurement pools all of its calls. A step's mean time is the sum of its parts' means, not of
            their medians: on a busy machine an interruption hits few of the short calls, but costs many times what
            they take.
        bandwidth: measured bandwidths in GB/s (1e9 bytes), by name.
        settings: how the measurement was made, for the reader.
        created: when, ISO 8601 in UTC.
        draft_levels: levels of the deepest tree that a model can grow as a draft, by key; none where nothing limits it.

    Notes:
        Profiles are values: methods that add something return a new profile.
    """

    FORMAT = Format("sequoia-kernels/hardware-profile", 2, ProfileError)

    device: DeviceFingerprint
    models: Mapping[str, ModelFingerprint] = field(default_factory=dict)
    forwards: Mapping[str, tuple[ForwardTable, ...]] = field(default_factory=dict)
    ops: Mapping[str, tuple[OpPoint, ...]] = field(default_factory=dict)
    target_key: str | None = None
    draft_key: str | None = None
    step_overhead_ms: float = 0.0
    level_overhead_ms: float = 0.0
    draft_overhead_ms: float = 0.0
    mean_over_median: Mapping[str, float] = field(default_factory=dict)
    bandwidth: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    draft_levels: Mapping[str, int] = field(default_factory=dict)

    def check_device(self, device: torch.device | str | None = None) -> None:
        """Refuse the profile when it was measured on another device than the one at hand.

        Args:
            device: the device at hand; the default one of the profile's type when None.

        Raises:
            ProfileError: type, name or number of CPU threads differ; the message names both devices.
        """
        rule = f"HardwareProfile.check_device: device must be the one of the profile, {self.device}"
        try:
            here = DeviceFingerprint.of(self.device.type if device is None else device)
        except ValueError as reason:
            raise ProfileError(f"{rule}, got none like it ({reason})") from None
        if not self.device.same_device(here):
            fix = "measure a profile on this device"
            if (self.device.type, self.device.name) == (here.type, here.name):
                own = self.device.num_threads
                fix = f"call torch.set_num_threads({own}), or measure a profile at {here.num_threads}"
            raise ProfileError(f"{rule}, got {here}; {fix}")
        if self.device.torch_version != here.torch_version:
            logger.warning(
                "the hardware profile was measured with torch %s, this is %s: its times may be off",
                self.device.torch_version, here.torch_version,
            )  # fmt: skip

    def find_model(self, model: Any = None, role: str = "target") -> str:
        """Give the key of a model in this profile.

        Args:
            model: a key, a fingerprint, a model itself, or None for the profile's own target or draft.
            role: "target" or "draft": which of the two None stands for, and the word of the messages.

        Raises:
            ProfileError: the profile has no forward times of it.
        """
        fingerprint = None
        if model is None:
            key = self.target_key if role == "target" else self.draft_key
            if key is None:
                known = ", ".join(self.models) or "none"
                raise ProfileError(
                    f"HardwareProfile.find_model: the profile must name its {role}, got none; give {role}= one of its "
                    f"models ({known}), or measure it with measure_profile or `sequoia-kernels profile`"
                )
        elif isinstance(model, str):
            key = model
        else:
            fingerprint = model if isinstance(model, ModelFingerprint) else ModelFingerprint.of(model)
            key = fingerprint.key
        if key not in self.forwards:
            known = ", ".join(self.forwards) or "none"
            fix = "measure it with measure_profile or `sequoia-kernels profile`"
            if fingerprint is not None:
                for other, found in self.models.items():
                    if other in self.forwards and dataclasses.replace(found, dtype=fingerprint.dtype) == fingerprint:
                        fix = (
                            f"that is the same model in {found.dtype}: measure it with "
                            f"`sequoia-kernels profile --dtype {fingerprint.dtype}`, or use it in {found.dtype}"
                        )
            raise ProfileError(
                f"HardwareProfile.find_model: the {role} must be a measured model, got {key}, measured: {known}; {fix}"
            )
        return key

    def forward_table(self, key: str, batch_size: int = 1) -> ForwardTable:
        """Give a model's forward times at a batch size; ProfileError where they were not measured."""
        key = self.find_model(key)
        for table in self.forwards[key]:
            if table.batch_size == batch_size:
                return table
        measured = ", ".join(str(table.batch_size) for table in self.forwards[key])
        raise ProfileError(
            f"HardwareProfile.forward_table: batch_size must be a measured one of {key} ({measured}), "
            f"got {batch_size}; measure it with measure_profile(batch_size={batch_size}) or `sequoia-kernels profile`"
        )

    def with_forwards(self, fingerprint: ModelFingerprint, table: ForwardTable) -> HardwareProfile:
        """Give the profile with a model's forward times added; a table of the same batch size is replaced."""
        key = fingerprint.key
        tables = [old for old in self.forwards.get(key, ()) if old.batch_size != table.batch_size]
        tables = sorted([*tables, table], key=lambda entry: entry.batch_size)
        models, forwards = {**self.models, key: fingerprint}, {**self.forwards, key: tuple(tables)}
        return dataclasses.replace(self, models=models, forwards=forwards)

    def with_op(self, name: str, points: Sequence[OpPoint]) -> HardwareProfile:
        """Give the profile with times of an op added; points of the same parameters are replaced."""
        new = [dict(point.parameters) for point in points]
        kept = [point for point in self.ops.get(name, ()) if dict(point.parameters) not in new]
        return dataclasses.replace(self, ops={**self.ops, name: (*kept, *points)})

    def with_overhead(self, step_ms: float, level_ms: float = 0.0, draft_ms: float = 0.0) -> HardwareProfile:
        """Give the profile with the loop's own overhead set: of a step, of a draft's forward, of having a draft."""
        for name, value in (("step_ms", step_ms), ("level_ms", level_ms), ("draft_ms", draft_ms)):
            checks.check_number("HardwareProfile.with_overhead", name, value, checks.TIME)
        return dataclasses.replace(
            self, step_overhead_ms=float(step_ms), level_overhead_ms=float(level_ms), draft_overhead_ms=float(draft_ms)
        )

    def with_slowdowns(self, mean_over_median: Mapping[str, float]) -> HardwareProfile:
        """Give the profile with the ratios of mean to median times set for some models (by key) and ops (by name)."""
        where = "HardwareProfile.with_slowdowns"
        for name, value in mean_over_median.items():
            if not is_number(value) or value <= 0:
                actual = f"{value!r} of {name}"
                checks.fail_range(where, "mean_over_median", "hold finite ratios > 0", actual)
        return dataclasses.replace(self, mean_over_median={**self.mean_over_median, **mean_over_median})

    def with_draft_levels(self, key: str, levels: int) -> HardwareProfile:
        """Give the profile with the levels set of the deepest tree that a model of it can grow as a draft."""
        where = "HardwareProfile.with_draft_levels"
        levels = checks.whole_number(where, "levels", levels, rule=checks.at_least(1), show_value=True)
        return dataclasses.replace(self, draft_levels={**self.draft_levels, self.find_model(key, "draft"): levels})

    def with_measurement(
        self, target_key: str, draft_key: str | None = None, bandwidth: Mapping[str, float] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> HardwareProfile:  # fmt: skip
        """Give the profile with its own pair of models named, and what else is known of the measurement."""
        return dataclasses.replace(
            self, target_key=self.find_model(target_key, "target"),
            draft_key=None if draft_key is None else self.find_model(draft_key, "draft"),
            bandwidth={**self.bandwidth, **(bandwidth or {})}, settings={**self.settings, **(settings or {})},
        )  # fmt: skip

    def merged(self, other: HardwareProfile) -> HardwareProfile:
        """Give this profile with everything of another of the same device added; where both have a time, the other's.

        Raises:
            ProfileError: the other was measured on another device; the message names both.
        """
        if not self.device.same_device(other.device):
            raise ProfileError(
                f"HardwareProfile.merged: other must be of the same device, {self.device}, got {other.device}"
            )
        result = self
        for key, tables in other.forwards.items():
            for table in tables:
                result = result.with_forwards(other.models[key], table)
        for name, points in other.ops.items():
            result = result.with_op(name, points)
        either = ("target_key", "draft_key", "step_overhead_ms", "level_overhead_ms", "draft_overhead_ms")
        both = ("mean_over_median", "draft_levels", "bandwidth", "settings")
        merged: dict[str, Any] = {name: getattr(other, name) or getattr(self, name) for name in either}
        merged |= {name: {**getattr(self, name), **getattr(other, name)} for name in both}
        return dataclasses.replace(result, device=other.device, created=other.created, **merged)

    def to_fields(self) -> dict[str, Any]:
        """Give the fields of the profile's document."""
        return {
            "created": self.created,
            "device": dataclasses.asdict(self.device),
            "target": self.target_key,
            "draft": self.draft_key,
            "models": {
                key: {
                    "fingerprint": dataclasses.asdict(fingerprint),
                    "forwards": [dataclasses.asdict(table) for table in self.forwards[key]],
                    "max_levels": self.draft_levels.get(key),
                }
                for key, fingerprint in self.models.items()
            },
            "ops": {
                name: [{**dataclasses.asdict(point), "parameters": dict(point.parameters)} for point in points]
                for name, points in self.ops.items()
            },
            "overhead": {
                "step_ms": self.step_overhead_ms,
                "level_ms": self.level_overhead_ms,
                "draft_ms": self.draft_overhead_ms,
            },
            "mean_over_median": dict(self.mean_over_median),
            "bandwidth_gb_per_s": dict(self.bandwidth),
            "settings": dict(self.settings),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> HardwareProfile:
        """Read a profile from the fields of its document; ProfileError names what is wrong with it."""
        device, models = fields.inside("device"), fields.inside("models")
        fingerprints: dict[str, ModelFingerprint] = {}
        forwards: dict[str, tuple[ForwardTable, ...]] = {}
        draft_levels: dict[str, int] = {}
        for key in models:
            entry = models.inside(key)
            fingerprints[key] = _read_fingerprint(entry.inside("fingerprint"))
            if fingerprints[key].key != key:
                raise models.refuse(key, f"be named {fingerprints[key].key} by its fingerprint", "another name")
            forwards[key] = tuple(map(_read_forwards, entry.objects("forwards")))
            if not _are_increasing([table.batch_size for table in forwards[key]]):
                raise entry.refuse("forwards", "be tables of increasing batch_size", "others")
            levels = entry.count("max_levels", optional=True)  # files of older versions have none
            if levels is not None:
                draft_levels[key] = levels
        ops, overhead = fields.inside("ops"), fields.inside("overhead")
        target_key, draft_key = (
            fields.get(role, lambda key: isinstance(key, str) and key in models, "one of its models", optional=True)
            for role in ("target", "draft")
        )
        return cls(
            device=DeviceFingerprint(
                **{name: device.text(name) for name in ("type", "name", "torch_version")},
                **{name: device.count(name, optional=True) for name in ("num_threads", "memory_bytes")},
                compute_capability=device.text("compute_capability", optional=True),
            ),
            models=fingerprints,
            forwards=forwards,
            ops={name: tuple(map(_read_point, ops.objects(name))) for name in ops},
            target_key=target_key,
            draft_key=draft_key,
            step_overhead_ms=overhead.time("step_ms"),
            level_overhead_ms=overhead.time("level_ms"),
            draft_overhead_ms=overhead.time("draft_ms") if "draft_ms" in overhead else 0.0,
            mean_over_median=fields.inside("mean_over_median").numbers(lambda x: 1e-12 <= x <= 1e12, "a number > 0"),
            draft_levels=draft_levels,
            bandwidth=fields.inside("bandwidth_gb_per_s").numbers(lambda x: 0 <= x <= 1e12, "a number >= 0"),
            settings=dict(fields.inside("settings").value),
            created=fields.text("created"),
        )


def _read_fingerprint(fields: Fields) -> ModelFingerprint:
    # A draft that is no whole model leaves sizes at 0: it has no such parts, or none that a step moves.
    counts = ("num_parameters", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
    return ModelFingerprint(
        family=fields.text("family"),
        dtype=fields.text("dtype"),
        vocab_size=fields.count("vocab_size"),
        **{name: fields.count(name, 0) for name in counts},
        intermediate_size=fields.count("intermediate_size", optional=True),
        linears=tuple(map(tuple, fields.entries("linears", _is_linear, "a list of [inputs, outputs, how many]"))),
        streamed_bytes=fields.count("streamed_bytes", 0),
    )


def _read_forwards(fields: Fields) -> ForwardTable:
    sizes = {}
    for name, least in (("context_lens", 0), ("node_counts", 1)):
        rule = f"a list of increasing integers >= {least}"
        sizes[name] = tuple(fields.entries(name, partial(is_count, least=least), rule))
        if not sizes[name] or not _are_increasing(sizes[name]):
            raise fields.refuse(name, f"be {rule}")
    num_rows, num_columns = map(len, sizes.values())

    def table(name: str) -> tuple[tuple[float, ...], ...]:
        rule = f"{num_rows} rows of {num_columns} positive times"
        rows = fields.entries(name, lambda row: isinstance(row, list) and len(row) == num_columns, rule)
        if len(rows) != num_rows:
            raise fields.refuse(name, f"be {rule}")
        for row in rows:
            if not all(is_number(entry) and 0 < entry <= MAX_TIME_MS for entry in row):
                raise fields.refuse(name, f"be {rule}", "entries that are none")
        return tuple(tuple(map(float, row)) for row in rows)

    times: dict[str, Any] = {name: table(name) for name in ("p20_ms", "p50_ms", "p80_ms")}
    return ForwardTable(batch_size=fields.count("batch_size"), **sizes, **times, repeats=fields.count("repeats"))


def _read_point(fields: Fields) -> OpPoint:
    parameters = fields.inside("parameters")
    for name in parameters:
        parameters.get(name, lambda value: is_number(value) or isinstance(value, str), "a number or a string")
    return OpPoint(parameters.value, fields.time("p20_ms"), fields.time("p50_ms"), fields.time("p80_ms"))


def _is_linear(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 3 and all(is_count(size, 1) for size in entry)


def _are_increasing(values: Sequence[int]) -> bool:
    return all(left < right for left, right in pairwise(values))
