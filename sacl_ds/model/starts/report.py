"""Report on the weights that a model starts from, tensor by tensor, grouped for people to read."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

_GROUPS = 12  # in a line; the rest is counted


@dataclass(frozen=True)
class SourceReport:
    """Tensors of the model that one source of weights filled, and tensors of the source that were not used."""

    setting: str
    source: str
    parts: tuple[str, ...]  # prefixes of the model's names that the source is for
    loaded: Collection[str]  # names in the model
    left_over: Collection[str]  # names in the source
    names: Collection[str]  # all names in the source
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartReport:
    """Reports of all sources of weights; str() is the text of a run's start.txt."""

    tensors: Collection[str]  # all names in the model
    sources: list[SourceReport] = field(default_factory=list)

    @property
    def loaded(self) -> set[str]:
        return {name for source in self.sources for name in source.loaded}

    @property
    def new(self) -> list[str]:
        """Names in the model that no source filled."""
        loaded = self.loaded
        return [name for name in self.tensors if name not in loaded]

    def new_in(self, source: SourceReport) -> list[str]:
        """List the tensors without weights that this source is for."""
        return [name for name in self.new if name.startswith(source.parts)]

    def __str__(self) -> str:
        lines = [f"start: {len(self.loaded)} of {len(self.tensors)} tensors loaded, {len(self.new)} new"]
        outside = set(self.new)
        for source in self.sources:
            new = self.new_in(source)
            outside -= set(new)
            lines.append(f"{source.setting}={source.source}")
            lines.append(_line("loaded", source.loaded, self.tensors))
            if new:
                lines.append(_line("new", new, self.tensors))
            if source.left_over:
                lines.append(_line("left over", source.left_over, source.names))
            lines += [f"  note: {note}" for note in source.notes]
        if outside:
            lines += ["no source", _line("new", [name for name in self.new if name in outside], self.tensors)]
        return "\n".join(lines)


def grouped(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Summarise names as few patterns: 'blocks.{0..11}.attn.* (48)' stands for all that `among` has under it.

    Numbers do not count. A name is cut to its shortest beginning under which `among` holds nothing but `names`.
    """
    chosen = list(dict.fromkeys(names))
    kept = set(chosen)
    others = {start for name in among if name not in kept for start in _beginnings(_pattern(name))}
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in chosen:
        pattern = _pattern(name)
        groups.setdefault(next((b for b in _beginnings(pattern) if b not in others), pattern), []).append(name)
    return [_shown(beginning, members) for beginning, members in groups.items()]


def _pattern(name: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in name.split("."))


def _beginnings(pattern: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [pattern[: n + 1] for n in range(len(pattern))]


def _shown(beginning: tuple[str, ...], members: list[str]) -> str:
    if len(members) == 1:
        return members[0]
    split = [name.split(".") for name in members]
    parts = []
    for place, part in enumerate(beginning):
        numbers = sorted({int(name[place]) for name in split}) if part == "#" else []
        whole = len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1
        if whole:
            part = f"{{{numbers[0]}..{numbers[-1]}}}"
        elif numbers:
            part = str(numbers[0]) if len(numbers) == 1 else "{" + ",".join(map(str, numbers)) + "}"
        parts.append(part)
    deeper = any(len(name) > len(beginning) for name in split)
    return f"{'.'.join(parts)}{'.*' if deeper else ''} ({len(members)})"


def _line(title: str, names: Collection[str], among: Collection[str]) -> str:
    groups = grouped(names, among)
    more = f", and {len(groups) - _GROUPS} more" if len(groups) > _GROUPS else ""
    return f"  {title}, {len(names)}: {', '.join(groups[:_GROUPS])}{more}"
