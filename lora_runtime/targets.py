"""Which leaves an adapter's config means, by the rules of PEFT 0.21.2.

Rules: ``check_target_module_exists`` and ``_check_tied_modules`` (peft/tuners/tuners_utils.py),
``get_pattern_key`` and ``_set_trainable`` (peft/utils/other.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import regex

from lora_runtime.config import NO_TARGETS, AdapterConfig
from lora_runtime.errors import MalformedAdapter
from lora_runtime.folder import CONFIG_NAME
from lora_runtime.layout import BaseLayout
from lora_runtime.names import NUM_SPELLINGS, shown, spellings

MATCHING_BUDGET_S = 5.0
"""For all patterns of one adapter on all modules; honest ones take milliseconds."""

Names = str | Sequence[str] | None
"""How a PEFT config names modules: by one expression, or by the ends of their names."""

_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True)
class Targets:
    """What LoRA acts on. ``keys`` maps each canonical leaf to its name as the config knows it.

    ``required`` leaves must be in the file. The rest of ``keys`` may be: the low-rank part inside a
    module that the adapter saves too (PEFT before 0.16 wrote such), and of a tied head.
    ``refused`` are modules that the patterns match and that no LoRA can act on.
    """

    keys: Mapping[str, str]
    required: frozenset[str]
    refused: tuple[str, ...]


class Matcher:
    """A config's patterns on a base's names. All matching shares one time budget, since patterns may be hostile."""

    def __init__(self, config: AdapterConfig, layout: BaseLayout) -> None:
        self._config = config
        self._layout = layout
        self._left_s = MATCHING_BUDGET_S
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._saved: dict[str, set[str]] = {}
        self._ranks: dict[str, tuple[int, float]] = {}
        self._ties = self._tied_kind()

    def targets(self, present: Iterable[str], spelled: Mapping[str, str]) -> Targets:
        """The leaves that LoRA targets.

        A config speaks the names of the release that trained it. The right spelling is the one under
        which its patterns mean the leaves ``present`` in the file, and, where several do, the one in
        which the file itself names its modules (``spelled``, by canonical name).
        """
        wanted = set(present)

        def misfit(spelling: int) -> tuple[int, int]:
            choice = choices[spelling]
            strange = sum(spellings(name)[spelling] != own for name, own in spelled.items())
            return len(choice.required - wanted) + len(wanted - set(choice.keys)), strange

        choices = [self._targets(spelling) for spelling in range(NUM_SPELLINGS)]
        return choices[min(range(NUM_SPELLINGS), key=misfit)]

    def rank_and_scaling(self, key: str) -> tuple[int, float]:
        """Rank and scaling of the module ``key``: alpha/r, or alpha/√r for rsLoRA (arXiv 2312.03732)."""
        rank, alpha = self.rank_and_alpha(key)
        return rank, alpha / (math.sqrt(rank) if self._config.use_rslora else rank)

    def rank_and_alpha(self, key: str) -> tuple[int, float]:
        """Rank and alpha of the module ``key``, after patterns."""
        if key not in self._ranks:
            config = self._config
            rank = config.rank_pattern.get(self._pattern_key(config.rank_pattern, key), config.r)
            alpha = config.alpha_pattern.get(self._pattern_key(config.alpha_pattern, key), config.lora_alpha)
            self._ranks[key] = rank, alpha
        return self._ranks[key]

    def is_named(self, wanted: Names, key: str) -> bool:
        """Whether a list of module names, or one expression, means ``key`` as PEFT's ``target_modules`` would."""
        if isinstance(wanted, str):
            return self._matches(wanted, key, whole=True)
        return any(key == name or key.endswith(f".{name}") for name in wanted or ())

    def saved_leaves(self, wanted: str) -> set[str]:
        """Leaves in the modules that ``wanted`` of ``modules_to_save`` means. PEFT matches by bare suffix."""
        layout = self._layout
        if wanted not in self._saved:
            roots = [name for name in (*layout.leaves, *layout.containers) if _ends(name, wanted)]
            inside = tuple(f"{root}." for root in roots)
            self._saved[wanted] = {leaf for leaf in layout.leaves if f"{leaf}.".startswith(inside)}
        return self._saved[wanted]

    def saved_names(self) -> tuple[str, ...]:
        """``modules_to_save``, with the input embedding where ``ensure_weight_tying`` adds it."""
        names = self._config.saved_names
        if self._ties != "saved":
            return names
        return (*(name for name in names if name.split(".")[-1] != "lm_head"), self._layout.embedding)

    @property
    def ties_saved(self) -> bool:
        """Whether the head must equal the embedding that the adapter saves."""
        return self._ties == "saved"

    @property
    def ties_lora(self) -> bool:
        """Whether the head's low-rank delta must be that of the embedding, transposed."""
        return self._ties == "targets"

    def _targets(self, spelling: int) -> Targets:
        layout = self._layout
        keys: dict[str, str] = {}
        required: set[str] = set()
        refused: list[str] = []
        for name in (*layout.leaves, *layout.containers):
            key = spellings(name)[spelling]
            if not self._is_target(name, key):
                continue
            inside = self._is_saved(key)
            if name not in layout.leaves or layout.leaves[name].kind == "norm":
                refused += [] if inside else [name]
                continue
            keys[name] = key
            required |= set() if inside else {name}
        if self.ties_lora:
            head = next(iter(layout.tied))
            keys[head] = spellings(head)[spelling]
            required.discard(head)
        return Targets(keys, frozenset(required), tuple(refused))

    def _is_target(self, name: str, key: str) -> bool:
        wanted = self._config.target_modules
        if wanted is None or wanted == NO_TARGETS or self._is_excluded(key):
            return False
        if self.ties_lora and name == self._layout.embedding:
            return True
        if isinstance(wanted, str):
            if wanted.lower() == "all-linear":
                leaf = self._layout.leaves.get(name)
                return leaf is not None and leaf.kind == "linear" and name != "lm_head"
            return self._matches(wanted, key, whole=True)
        return key in wanted or (any(key.endswith(f".{end}") for end in wanted) and self._is_in_layers(key))

    def _is_excluded(self, key: str) -> bool:
        names = self._config.exclude_modules
        return bool(names) and self.is_named(names, key)

    def _is_saved(self, key: str) -> bool:
        return any(
            self._matches(rf"(^|.*\.){name}($|\..*)", key) for name in self.saved_names() if _may_match(name, key)
        )

    def _is_in_layers(self, key: str) -> bool:
        wanted = self._config.layers_to_transform
        if wanted is None or wanted == []:
            return True
        patterns = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in self._config.layer_patterns]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if found := self._match(pattern, key):
                return int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)
        return False

    def _pattern_key(self, patterns: Iterable[str], key: str) -> str:
        """PEFT's ``get_pattern_key``: the first pattern that matches the end of ``key``, else ``key``."""
        return next((pattern for pattern in patterns if self._matches(rf"(.*\.)?({pattern})$", key)), key)

    def _tied_kind(self) -> str | None:
        """What ``ensure_weight_tying`` ties on a base whose head shares the embedding: "saved", "targets" or None."""
        config = self._config
        if not config.ensure_weight_tying or not self._layout.tied:
            return None
        if any(name.split(".")[-1] in _EMBEDDING_NAMES for name in config.saved_names):
            return "saved"
        wanted = config.target_modules
        if isinstance(wanted, str):
            is_target = any(self._matches(wanted, name, whole=True) for name in _EMBEDDING_NAMES)
        else:
            is_target = any(name.split(".")[-1] in _EMBEDDING_NAMES for name in wanted or ())
        return "targets" if is_target else None

    def _matches(self, pattern: str, key: str, *, whole: bool = False) -> bool:
        return self._match(pattern, key, whole=whole) is not None

    def _match(self, pattern: str, key: str, *, whole: bool = False) -> regex.Match[str] | None:
        start = time.monotonic()
        try:
            compiled = self._compiled.get(pattern) or regex.compile(pattern)
            self._compiled[pattern] = compiled
            match = compiled.fullmatch if whole else compiled.match
            return match(key, timeout=max(self._left_s, 1e-3))
        except TimeoutError as error:
            raise MalformedAdapter(
                f"{CONFIG_NAME}: the pattern '{shown(pattern)}' takes too long to match; write it without nested "
                "repetitions."
            ) from error
        except (regex.error, IndexError, RecursionError, MemoryError) as error:
            raise MalformedAdapter(f"{CONFIG_NAME}: '{shown(pattern)}' is no pattern ({error}).") from error
        finally:
            self._left_s -= time.monotonic() - start


def _may_match(pattern: str, key: str) -> bool:
    """False where a plain name of modules has a part that ``key`` lacks: cheaper than asking the pattern itself."""
    if not pattern.replace(".", "").replace("_", "").isalnum():
        return True
    return all(part in key for part in pattern.split("."))


def _ends(name: str, wanted: str) -> bool:
    return any(key.endswith(wanted) for key in spellings(name))
