"""The families of published weight files, and how each one's names become this package's.

A family is recognised by its own signature, the names of its tensors, never by the name of a file.
Its names are rewritten at the door by rules on whole components of a dotted name; rewriting twice
changes nothing. Sizes and the task head are then read off the shapes, through the table of
`visualbert.schema`. Sources: uclanlp/visualbert, mmf/models/visual_bert.py, google-research/bert.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from visualbert.checkpoint.tensors import Spec, Tensors
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError
from visualbert.schema import ARCHITECTURES, BODY, DIMENSIONS, PREFIX, parameters


class Rule(NamedTuple):
    """Components of a name, and those that stand there instead."""

    old: str
    new: str
    start: bool = False  # only at the beginning of a name


_ORIGINAL_RULES = (
    Rule("module", "", start=True),  # DataParallel
    Rule("model", "", start=True),  # MMF's wrapper
    Rule("bert.bert", "visual_bert", start=True),  # AllenNLP's wrapper
    Rule("bert.cls", "cls", start=True),
    Rule("bert.classifier", "classifier", start=True),
    Rule("bert.flickr_attention", "attention", start=True),
    Rule("bert", "visual_bert", start=True),
    Rule("flickr_attention", "attention", start=True),
    Rule("classifier.0", "cls.transform", start=True),  # MMF's head of two layers
    Rule("classifier.1", "cls.decoder", start=True),
    Rule("classifier", "cls", start=True),
    Rule("embeddings.token_type_embeddings_visual", "embeddings.visual_token_type_embeddings"),
    Rule("embeddings.position_embeddings_visual", "embeddings.visual_position_embeddings"),
    Rule("embeddings.projection", "embeddings.visual_projection"),
)
_TORCH_RULES = (Rule("module", "", start=True),)  # older leaves are `match`'s
_GOOGLE_RULES = (
    Rule("bert", "", start=True),
    Rule("cls.predictions.output_bias", "cls.predictions.bias"),
    Rule("cls.seq_relationship.output_weights", "cls.seq_relationship.weight"),
    Rule("cls.seq_relationship.output_bias", "cls.seq_relationship.bias"),
    *(
        Rule(f"embeddings.{table}", f"embeddings.{table}.weight")
        for table in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ),
)


@dataclass(frozen=True)
class Family:
    """One kind of file."""

    title: str
    rules: tuple[Rule, ...]
    bert: bool = False  # a text-only model, from which a VisualBERT can start


HUGGING_FACE = Family("VisualBERT under transformers' names", _TORCH_RULES)
ORIGINAL = Family("the original authors' VisualBERT", _ORIGINAL_RULES)
MMF = Family("MMF's VisualBERT", _ORIGINAL_RULES)
BERT = Family("a BERT", _TORCH_RULES, bert=True)
GOOGLE = Family("Google's BERT for TensorFlow", _GOOGLE_RULES, bert=True)

# What only the family's files have: the ends of names (behind whatever prefix they carry).
_SIGNATURES = {
    HUGGING_FACE: ("embeddings.visual_projection.weight",),
    ORIGINAL: ("embeddings.projection.weight", "embeddings.position_embeddings_visual.weight"),
    GOOGLE: ("bert/embeddings/word_embeddings",),
}
_BERT_SIGNATURE = ("embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight")
_OTHERS = {  # neighbours that are easily mistaken for a VisualBERT
    "embeddings.symbolic_embedding.weight": "an Unsupervised VisualBERT (LXMERT's code), whose "
    "embeddings have other tables and norms",
    "embeddings.visn_fc.weight": "an Unsupervised VisualBERT or LXMERT, whose embeddings have "
    "other tables and norms",
    "encoder.visn_fc.visn_fc.weight": "an LXMERT, which reads the two modalities apart",
}
DETECTOR = "detector."
_STEPS = ("adam_m", "adam_v", "AdamWeightDecayOptimizer", "global_step")  # of Google's training


def recognise(tensors: Tensors) -> Family:
    """The family that the names in a file belong to.

    Raises:
        CheckpointError: none, or more than one; the sentence says what was looked for.
    """
    names = set(tensors.specs)
    for mark, what in _OTHERS.items():
        if _ends(names, mark):
            raise CheckpointError(f"{tensors.label!r} is {what}; it cannot become a VisualBERT")
    found = [family for family, marks in _SIGNATURES.items() if any(_ends(names, m) for m in marks)]
    if len(found) > 1:
        raise CheckpointError(
            f"{tensors.label!r} holds the names of {found[0].title} and of {found[1].title}; "
            "remove the tensors of one of the two"
        )
    if not found and any(_ends(names, mark) for mark in _BERT_SIGNATURE):
        return BERT
    if not found:
        looked = ", ".join(dict.fromkeys(mark for m in _SIGNATURES.values() for mark in m[:1]))
        raise CheckpointError(
            f"{tensors.label!r} is none of the known families of weights: it holds "
            f"{', '.join(sorted(names)[:3]) or 'nothing'}; looked for names ending in {looked} or "
            f"{_BERT_SIGNATURE[0]}"
        )
    if found == [ORIGINAL] and any(_is_mmf(name) for name in names):
        return MMF
    return found[0]


def _ends(names: Iterable[str], mark: str) -> bool:
    return any(name == mark or name.endswith(("." + mark, "/" + mark)) for name in names)


def _is_mmf(name: str) -> bool:
    name = name.removeprefix("module.")
    return name.startswith(("model.bert.", "model.cls.", "classifier.0.", "model.classifier."))


def rename(name: str, rules: Iterable[Rule]) -> str:
    """`name` by `rules`, each on whole components."""
    parts = name.split(".")
    for rule in rules:
        old, new = rule.old.split("."), rule.new.split(".") if rule.new else []
        last = 0 if rule.start else len(parts) - len(old)
        for at in range(last + 1):
            if parts[at : at + len(old)] == old:
                parts[at : at + len(old)] = new
                break
    return ".".join(parts)


class Renamed:
    """`Tensors` under other names, some of them transposed."""

    def __init__(
        self, tensors: Tensors, names: Mapping[str, str], transposed: frozenset[str] = frozenset()
    ) -> None:
        self.label = tensors.label
        self._tensors, self.names, self._transposed = tensors, names, transposed
        self.specs = {
            name: Spec(spec.shape[::-1], spec.dtype) if name in transposed else spec
            for name, spec in ((name, tensors.specs[old]) for name, old in names.items())
        }

    def read(self, name: str) -> np.ndarray:
        array = self._tensors.read(self.names[name])
        return np.ascontiguousarray(array.T) if name in self._transposed else array

    def verify_checksum(self) -> bool:
        """As that of the file, where it has one."""
        check = getattr(self._tensors, "verify_checksum", None)
        return check is not None and check()


class Rewritten(NamedTuple):
    """The tensors of a file under this package's names."""

    tensors: Tensors
    aside: Tensors | None  # of a detector that the model does not contain
    dropped: tuple[str, ...]  # of an optimizer


def rewrite(tensors: Tensors, family: Family) -> Rewritten:
    """Rename every tensor by the rules of `family`, and part a detector from the model.

    Raises:
        CheckpointError: two names become one.
    """
    dropped = tuple(n for n in tensors.specs if family is GOOGLE and _is_step(n))
    named: dict[str, str] = {}
    transposed = set()
    for old in tensors.specs:
        if old in dropped:
            continue
        dotted = _dotted(old) if family is GOOGLE else old
        name = rename(dotted, family.rules)
        if family is GOOGLE and name.endswith(".kernel"):
            name = name.removesuffix("kernel") + "weight"
            transposed.add(name)
        if name in named:
            raise CheckpointError(f"{tensors.label!r}: {named[name]} and {old} both become {name}")
        named[name] = old
    beside = {name: old for name, old in named.items() if name.startswith(DETECTOR)}
    inside = {name: old for name, old in named.items() if name not in beside}
    same = all(name == old for name, old in named.items())
    return Rewritten(
        tensors if same else Renamed(tensors, inside, frozenset(transposed)),
        Renamed(tensors, beside) if beside else None,
        dropped,
    )


def _is_step(name: str) -> bool:
    return any(part in _STEPS for part in name.split("/"))


def _dotted(name: str) -> str:
    """Google's slashes as dots, `layer_3` as `layer.3`."""
    return name.replace("/layer_", "/layer.").replace("/", ".")


def infer_config(
    tensors: Tensors, given: Mapping[str, Any], pooled: bool = True
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values of a config.json that the shapes of `tensors` show, under `given`; and a line for
    each.

    Args:
        tensors: under this package's names.
        given: what is known already and not asked again.
        pooled: a classifier reads the pooled state, where its size does not tell.

    Raises:
        CheckpointError: the shapes show no model at all.
    """
    specs = {
        name.removeprefix(PREFIX).removeprefix("bert."): spec
        for name, spec in tensors.specs.items()
    }
    layers = _count_layers(specs)
    nominal = VisualBertConfig(
        num_hidden_layers=layers,
        bypass_transformer=any(name.startswith("additional_layer.") for name in specs),
    )
    seen: dict[str, Any] = {"num_hidden_layers": layers}
    if nominal.bypass_transformer:
        seen["bypass_transformer"] = True
    if "cls.transform.dense.weight" in specs:
        seen["classifier_head"] = "mlp"
    for param in parameters(BODY, nominal):
        spec = specs.get(param.name)
        symbols = param.symbols.split()
        if spec is not None and len(spec.shape) == len(symbols):
            for symbol, size in zip(symbols, spec.shape, strict=True):
                if symbol in DIMENSIONS:
                    seen.setdefault(DIMENSIONS[symbol], size)
    if "hidden_size" not in seen:
        raise CheckpointError(f"{tensors.label!r} shows no hidden size: it has no tables of a BERT")
    architecture = infer_architecture(specs, pooled)
    seen["architectures"] = [architecture]
    labels = _labels(specs)
    if labels is not None and architecture != "VisualBertForMultipleChoice":
        seen["num_labels"] = labels
    notes = [f"{k}={v}" for k, v in seen.items() if k not in given and k != "architectures"]
    if "num_attention_heads" not in given:
        count, why = _count_heads(specs, seen["hidden_size"], tensors.label)
        seen["num_attention_heads"] = count
        notes.append(f"num_attention_heads={count} ({why})")
    return {**seen, **given}, tuple(notes)


def _count_layers(specs: Mapping[str, Spec]) -> int:
    numbers = [
        int(name.split(".")[2])
        for name in specs
        if name.startswith("encoder.layer.")
        and name.split(".")[2].isdecimal()
        and len(name.split(".")[2]) < 4
    ]
    return max(numbers, default=-1) + 1


def _labels(specs: Mapping[str, Spec]) -> int | None:
    """Rows of the classifier."""
    for name in ("cls.weight", "cls.decoder.weight"):
        if name in specs and len(specs[name].shape) == 2:
            return specs[name].shape[0]
    return None


def _count_heads(specs: Mapping[str, Spec], hidden: int, label: str) -> tuple[int, str]:
    """Attention heads: from the phrase head, which is one head wide, or BERT's 64 a head."""
    query = specs.get("attention.query.weight")
    if (
        query is not None
        and len(query.shape) == 2
        and query.shape[0]
        and not hidden % query.shape[0]
    ):
        return hidden // query.shape[0], "hidden_size / rows of attention.query"
    if hidden % 64:
        raise CheckpointError(
            f"{label!r}: hidden_size={hidden} is no multiple of 64, so the number of attention "
            "heads cannot be guessed; give it as num_attention_heads (--set num_attention_heads=N)"
        )
    return hidden // 64, "hidden_size / 64: shapes do not show it"


def infer_architecture(specs: Mapping[str, Spec], pooled: bool = True) -> str:
    """The class whose head a file holds.

    A classifier of one row is VCR's; one of two is NLVR2's; a larger one is VQA's and reads the
    second-last word, unless it is MMF's head of two layers on the pooled state.
    """
    names = {name.removeprefix(PREFIX) for name in specs}
    if "attention.query.weight" in names:
        return "VisualBertForRegionToPhraseAlignment"
    if "cls.decoder.weight" in names:
        return ARCHITECTURES[4] if pooled else ARCHITECTURES[3]
    labels = _labels(specs)
    if labels is not None:
        return {1: ARCHITECTURES[2], 2: ARCHITECTURES[4]}.get(labels, ARCHITECTURES[3])
    if any(name.startswith("cls.predictions.") for name in names):
        return "VisualBertForPreTraining"
    return BODY
