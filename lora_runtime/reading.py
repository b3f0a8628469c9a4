"""An adapter between its file and its form: what its config promises against what its file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lora_runtime.config import NO_TARGETS, read_config
from lora_runtime.errors import (
    AdapterMissing,
    AdapterRejected,
    MissingTensors,
    ShapeMismatch,
    UnknownModules,
    UnsupportedAdapter,
)
from lora_runtime.layout import BaseLayout
from lora_runtime.materialise import MethodLayer
from lora_runtime.names import canonical, listed, nearest, shown, spellings, tail
from lora_runtime.placement import CLASSIFIER_NAMES, MAX_EXPLAINED, Placed, place
from lora_runtime.targets import Matcher, Targets
from lora_runtime.tensor_file import read_tensors


class Reading:
    """One adapter, placed on a base. Nothing of it means anything before :meth:`check` has passed.

    Raises AdapterMissing or AdapterRejected for a file or config that cannot be read at all.
    """

    def __init__(self, folder: Path, layout: BaseLayout, *, reads_values: bool = True) -> None:
        """Without ``reads_values`` weights may be NaN or infinite, and are not read from the disk."""
        config, tensors = read_config(folder), read_tensors(folder)
        self._folder = folder
        self._config = config
        self._layout = layout
        self._matcher = Matcher(config, layout)
        self._layers: dict[str, MethodLayer] = {}
        self._placed: Placed = place(tensors, layout, config, reads_values=reads_values)
        self._targets: Targets = self._matcher.targets(self._placed.factored(), self._placed.spelled)

    def problems(self) -> list[AdapterRejected | AdapterMissing]:
        found: list[AdapterRejected | AdapterMissing] = []
        for check in self._checks():
            try:
                check()
            except (AdapterRejected, AdapterMissing) as error:
                found.append(error)
            except LookupError:
                # What names have no meaning has no shape either; the error about them is found already.
                if not found:
                    raise
        return found

    def check(self) -> None:
        """Raise the first kind of AdapterRejected that fits, with all that is wrong of that kind."""
        for check in self._checks():
            check()

    def _checks(self) -> tuple[Callable[[], None], ...]:
        """In this order: what a name means is known before what must be there, and that before its shape."""
        return self._check_names, self._check_complete, self._check_shapes

    def _check_names(self) -> None:
        """Each name in the config must mean something, and mean what the file holds."""
        unknown = self._unknown_targets() | self._unknown_saved() | self._unknown_tokens()
        if unknown:
            lines = [
                f"'{shown(name)}'" + (f" (did you mean {', '.join(near)}?)" if near else "")
                for name, near in list(unknown.items())[:8]
            ]
            raise UnknownModules(
                f"The config names {len(unknown)} modules that the adapter cannot act on in the base: "
                f"{'; '.join(lines)}. Was the adapter trained on another base?",
                unmatched=unknown,
            )
        if self._targets.refused:
            raise UnsupportedAdapter(
                f"The config targets {listed(self._targets.refused)}, on which no LoRA can act; target the Linear, "
                "Embedding or Conv modules inside.",
                modules=list(self._targets.refused),
            )
        stray = sorted(self._placed.factored() - set(self._targets.keys))
        if stray:
            raise UnknownModules(
                f"The file holds tensors of modules that the config's target_modules do not name: {listed(stray)}. "
                "PEFT would ignore them. Save config and tensors together again.",
                unmatched={name: [] for name in stray},
            )

    def _unknown_targets(self) -> dict[str, list[str]]:
        wanted = self._config.target_modules
        if isinstance(wanted, str):
            means = bool(self._targets.keys or self._targets.refused) or wanted == NO_TARGETS
            return {} if means else {wanted: nearest(canonical(wanted), self._layout.leaves)}
        leaves = self._layout.leaves
        known = {end for leaf in leaves if leaves[leaf].kind != "norm" for end in _ends(leaf)}
        # "all-linear" lists a classifier's head too, which is saved and never targeted.
        unknown = [name for name in wanted or () if name not in known and tail(name) not in CLASSIFIER_NAMES]
        return self._explained(unknown)

    def _unknown_saved(self) -> dict[str, list[str]]:
        known = {name for name, _ in self._placed.heads} | set(CLASSIFIER_NAMES)
        names = [name for name in self._matcher.saved_names() if tail(name) not in known]
        return self._explained([name for name in names if not self._matcher.saved_leaves(name)])

    def _unknown_tokens(self) -> dict[str, list[str]]:
        names = self._config.token_indices(self._layout.embedding)
        return self._explained([name for name in names if not self._token_leaves(name)])

    def _explained(self, names: list[str]) -> dict[str, list[str]]:
        """Unknown names with near ones, for as many as a message shows."""
        return {name: self._near(name) if i < MAX_EXPLAINED else [] for i, name in enumerate(names)}

    def _near(self, name: str) -> list[str]:
        """The leaves inside the module of that name, else the names or the leaves that read most like it."""
        roots = tuple(f"{c}." for c in self._layout.containers if name in _ends(c))
        inside = [leaf for leaf in self._layout.leaves if leaf.startswith(roots)]
        ends = {leaf.rpartition(".")[2] for leaf in self._layout.leaves} if "." not in name else ()
        return inside[:4] or nearest(name, sorted(ends), 2) or nearest(canonical(name), self._layout.leaves)

    def _token_leaves(self, name: str) -> list[str]:
        leaves = self._layout.leaves
        return [
            leaf
            for leaf in leaves
            if leaves[leaf].kind in ("embedding", "linear") and any(k.endswith(name) for k in spellings(leaf))
        ]

    def _check_complete(self) -> None:
        missing = self._missing_lora() | self._missing_parameters() | self._missing_heads()
        missing |= {f"{name}.token_adapter.trainable_tokens_delta" for name in self._missing_tokens()}
        if missing:
            names = sorted(missing)
            raise MissingTensors(
                f"{len(names)} tensors that the config promises are not in the file: {listed(names)}. "
                "The adapter was saved in part, or its config is another's; save it again.",
                missing=names,
            )
        stray = sorted(set(self._placed.tokens) - set(self._trained_tokens()))
        if stray:
            raise UnknownModules(
                f"The file trains tokens of {listed(stray)}, which the config's trainable_token_indices do not name.",
                unmatched={name: [] for name in stray},
            )

    def _missing_lora(self) -> set[str]:
        placed = self._placed
        names = self._targets.required | placed.factored()
        if self._config.method is not None:
            wanted = {(name, part) for name in names for part in self._layer(name).shapes()}
            return {f"{name}.{part}" for name, part in wanted if part not in placed.method.get(name, ())}
        missing = set()
        for name in names:
            if self._layout.leaves[name].kind == "embedding":
                parts = {"lora_embedding_A": placed.embedding_a, "lora_embedding_B": placed.embedding_b}
            else:
                parts = {"lora_A.weight": placed.a, "lora_B.weight": placed.b}
                if self._config.lora_bias:
                    parts["lora_B.bias"] = placed.b_bias
            missing |= {f"{name}.{part}" for part, table in parts.items() if name not in table}
        return missing

    def _missing_parameters(self) -> set[str]:
        leaves = self._layout.leaves
        wanted = {(leaf, p) for leaf in self._saved_leaves() for p in leaves[leaf].parameters}
        if self._config.bias != "none":
            reach = leaves if self._config.bias == "all" else self._targets.required
            wanted |= {(leaf, "bias") for leaf in reach if "bias" in leaves[leaf].parameters}
        return {f"{leaf}.{parameter}" for leaf, parameter in wanted - set(self._placed.parameters)}

    def _saved_leaves(self) -> set[str]:
        found: set[str] = set()
        for name in self._matcher.saved_names():
            found |= self._matcher.saved_leaves(name)
        return found

    def _missing_heads(self) -> set[str]:
        """Of the usual head names a config may list both; a model has one."""
        wanted = {tail(name) for name in self._config.saved_names} & set(CLASSIFIER_NAMES)
        wanted |= set(CLASSIFIER_NAMES) if self._config.is_classifier else set()
        found = {name for name, parameter in self._placed.heads if parameter == "weight"}
        bare = {name for name, _ in self._placed.heads} - found
        return {f"{name}.weight" for name in bare or (wanted if not wanted & found else ())}

    def _trained_tokens(self) -> dict[str, list[int]]:
        """Trained ids by leaf, without the head that takes them from a tied embedding."""
        found: dict[str, list[int]] = {}
        for name, indices in self._config.token_indices(self._layout.embedding).items():
            for leaf in self._token_leaves(name):
                found[leaf] = indices
        for head, embedding in self._layout.tied.items():
            if head in found and found.get(embedding) == found[head]:
                del found[head]
        return found

    def _missing_tokens(self) -> set[str]:
        return set(self._trained_tokens()) - set(self._placed.tokens)

    def _check_shapes(self) -> None:
        wrong = [line for line in self._shapes() if line]
        if wrong:
            raise ShapeMismatch(
                f"{len(wrong)} tensors have a shape that the base or the config refutes: {listed(wrong)}. "
                "The config's r or rank_pattern, or the base, is another than the adapter was trained with.",
                tensors=wrong,
            )

    def _shapes(self) -> list[str]:
        placed, leaves = self._placed, self._layout.leaves
        lines = []
        for name in sorted(placed.factored()):
            lines += self._factor_shapes(name)
        for (name, parameter), tensor in placed.parameters.items():
            lines.append(_wrong(f"{name}.{parameter}", tensor, leaves[name].parameters[parameter]))
        for name, indices in self._trained_tokens().items():
            height, width = leaves[name].parameters["weight"]
            lines.append(_wrong(f"{name} (trained tokens)", placed.tokens[name], (len(indices), width)))
            if len(set(indices)) != len(indices) or max(indices, default=0) >= height:
                lines.append(f"trainable_token_indices of {name}: must be distinct and below {height}")
        for name in sorted({name for name, _ in placed.heads}):
            weight = placed.heads[name, "weight"]
            labels = weight.shape[0] if weight.ndim == 2 else 1
            lines.append(_wrong(f"{name}.weight", weight, (labels, self._layout.hidden_size)))
            if (name, "bias") in placed.heads:
                lines.append(_wrong(f"{name}.bias", placed.heads[name, "bias"], (labels,)))
        return lines

    def _factor_shapes(self, name: str) -> list[str]:
        placed, leaf = self._placed, self._layout.leaves[name]
        if self._config.method is not None:
            wanted, found = self._layer(name).shapes(), placed.method[name]
            unknown = sorted(set(found) - set(wanted))
            lines = [f"{name}.{part} is nothing that {self._config.method.name} has" for part in unknown]
            return lines + [_wrong(f"{name}.{part}", found[part], shape) for part, shape in wanted.items()]
        rank, _ = self._matcher.rank_and_scaling(self._targets.keys[name])
        if leaf.kind == "embedding":
            return [
                _wrong(f"{name}.lora_embedding_A", placed.embedding_a[name], (rank, leaf.in_features)),
                _wrong(f"{name}.lora_embedding_B", placed.embedding_b[name], (leaf.out_features, rank)),
            ]
        # A convolution's A has its kernel, and its B is a convolution with kernel 1.
        kernel = leaf.parameters["weight"][2:]
        lines = [
            _wrong(f"{name}.lora_A", placed.a[name], (rank, *leaf.parameters["weight"][1:])),
            _wrong(f"{name}.lora_B", placed.b[name], (leaf.out_features, rank, *(1,) * len(kernel))),
        ]
        if name in placed.b_bias:
            lines.append(_wrong(f"{name}.lora_B.bias", placed.b_bias[name], (leaf.out_features,)))
        return lines

    def _layer(self, name: str) -> MethodLayer:
        if name not in self._layers:
            key, leaf = self._targets.keys[name], self._layout.leaves[name]
            self._layers[name] = MethodLayer(self._config, self._matcher, key, leaf)
        return self._layers[name]


def _ends(name: str) -> set[str]:
    """What a list of module names may call ``name``: any of its spellings from any of their parts on."""
    return {key[at:] for key in spellings(name) for at in range(len(key)) if at == 0 or key[at - 1] == "."}


def _wrong(name: str, tensor: Tensor, wanted: tuple[int, ...]) -> str:
    found = tuple(tensor.shape)
    return "" if found == wanted else f"{name} is {found}, wanted {wanted}"
