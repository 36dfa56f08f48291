"""The families of published weight files, and how each one's names become this package's.

A family is recognised by its own signature, the names of its tensors, never by the name of a file.
Its names are rewritten at the door by rules on whole components of a dotted name; rewriting twice
changes nothing. Sizes and the task head are then read off the shapes, through the table of
`visualbert.schema`. Sources: uclanlp/visualbert, mmf/models/visual_bert.py, google-research/bert.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from visualbert.checkpoint.tensors import Spec, Tensors, transpose
from visualbert.config import VisualBertConfig
from visualbert.errors import CheckpointError
from visualbert.schema import BODY, DIMENSIONS, PREFIX, parameters


class Rule(NamedTuple):
    """Components that a name begins with, and those that stand there instead."""

    old: str
    new: str
    whole: bool = False  # only where nothing follows


_WRAPPERS = ("module", "model")  # DataParallel's; MMF's and Lightning's
_ORIGINAL_RULES = (
    Rule("bert.bert", "visual_bert"),  # AllenNLP's wrapper
    Rule("bert.cls", "cls"),
    Rule("bert.classifier", "classifier"),
    Rule("bert.flickr_attention", "attention"),
    Rule("bert", "visual_bert"),
    Rule("flickr_attention", "attention"),
    Rule("classifier.0", "cls.transform"),  # MMF's head of two layers
    Rule("classifier.1", "cls.decoder"),
    Rule("classifier", "cls"),
    *(
        Rule(f"{prefix}embeddings.{old}", f"{prefix}embeddings.{new}")
        for prefix in (PREFIX, "")
        for old, new in (
            ("token_type_embeddings_visual", "visual_token_type_embeddings"),
            ("position_embeddings_visual", "visual_position_embeddings"),
            ("projection", "visual_projection"),
        )
    ),
)
_GOOGLE_RULES = (
    Rule("bert", ""),
    Rule("cls.predictions.output_bias", "cls.predictions.bias"),
    Rule("cls.seq_relationship.output_weights", "cls.seq_relationship.weight"),
    Rule("cls.seq_relationship.output_bias", "cls.seq_relationship.bias"),
    *(
        Rule(f"embeddings.{table}", f"embeddings.{table}.weight", whole=True)
        for table in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    ),
)


@dataclass(frozen=True)
class Family:
    """One kind of file: its names begin with one of `marks`, behind the wrappers."""

    title: str
    marks: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    bert: bool = False  # a text-only model, from which a VisualBERT can start


_VISUAL = ("visual_projection.", "visual_position_embeddings.", "visual_token_type_embeddings.")
_VISUAL_BEFORE = ("projection.", "position_embeddings_visual.", "token_type_embeddings_visual.")

HUGGING_FACE = Family(
    "VisualBERT under transformers' names", (PREFIX, *(f"embeddings.{end}" for end in _VISUAL))
)
ORIGINAL = Family(
    "the original authors' VisualBERT",
    tuple(f"{p}embeddings.{end}" for p in ("bert.bert.", "bert.", "") for end in _VISUAL_BEFORE),
    _ORIGINAL_RULES,
)
MMF = Family("MMF's VisualBERT", ORIGINAL.marks, _ORIGINAL_RULES)
GOOGLE = Family(
    "Google's BERT for TensorFlow", ("bert/embeddings/word_embeddings",), _GOOGLE_RULES, bert=True
)
BERT = Family(
    "a BERT", ("bert.embeddings.word_embeddings.", "embeddings.word_embeddings."), bert=True
)

_LOOKED_FOR = (
    "embeddings.visual_projection.weight (VisualBERT under transformers' names), "
    "embeddings.projection.weight (the original authors', MMF's), embeddings.word_embeddings.weight"
    " (a BERT) behind visual_bert., bert., bert.bert. or nothing, and behind module. or model., or "
    "for bert/embeddings/word_embeddings (Google's)"
)
_OTHERS = {  # whole components of neighbours that are easily mistaken for a VisualBERT
    "embeddings.symbolic_embedding": "an Unsupervised VisualBERT (LXMERT's code), whose embeddings "
    "have other tables and norms",
    "embeddings.visn_fc": "an Unsupervised VisualBERT or LXMERT, whose embeddings have other "
    "tables and norms",
    "encoder.visn_fc": "an LXMERT, which reads the two modalities apart",
    "encoder.x_layers": "an LXMERT, which reads the two modalities apart",
    "v_embeddings.image_embeddings": "a ViLBERT, which reads the two modalities apart",
    "encoder.v_layer": "a ViLBERT, which reads the two modalities apart",
    "img_embeddings.img_linear": "a UNITER, whose regions have boxes and norms of their own",
    "img_embedding": "an OSCAR or VinVL, whose regions come in without a segment or a position",
    "modal_encoder": "an MMBT, whose image comes from a network of its own",
    "text_embeddings.word_embeddings": "a ViLT, which reads patches of the image",
}
DETECTOR = "detector."
_STEPS = ("adam_m", "adam_v", "AdamWeightDecayOptimizer", "global_step")  # of Google's training


def recognise(tensors: Tensors) -> Family:
    """The family that the names in a file belong to.

    Raises:
        CheckpointError: none, or more than one; the sentence says what was looked for.
    """
    names = [_unwrapped(name) for name in tensors.specs]
    for mark, what in _OTHERS.items():
        if any(f".{mark}." in f".{name}." for name in names):
            raise CheckpointError(f"{tensors.label!r} is {what}; it cannot become a VisualBERT")
    found = [
        family
        for family in (HUGGING_FACE, ORIGINAL, GOOGLE)
        if any(name.startswith(family.marks) for name in names)
    ]
    if len(found) > 1:
        raise CheckpointError(
            f"{tensors.label!r} holds the names of {found[0].title} and of {found[1].title}; "
            "remove the tensors of one of the two"
        )
    if not found and any(name.startswith(BERT.marks) for name in names):
        return BERT
    if not found:
        raise CheckpointError(
            f"{tensors.label!r} is none of the known families of weights: it holds "
            f"{', '.join(sorted(tensors.specs)[:3]) or 'nothing'}; looked for {_LOOKED_FOR}"
        )
    if found == [ORIGINAL] and any(_is_mmf(name) for name in tensors.specs):
        return MMF
    return found[0]


def _is_mmf(name: str) -> bool:
    name = name.removeprefix("module.")
    return name.startswith(("model.", "classifier.0.", "classifier.1."))


def _unwrapped(name: str) -> str:
    """`name` without the wrappers that it begins with."""
    parts = name.split(".")
    at = 0
    while at < len(parts) - 1 and parts[at] in _WRAPPERS:
        at += 1
    return ".".join(parts[at:])


def rename(name: str, rules: Iterable[Rule]) -> str:
    """`name` without its wrappers and by `rules`, each on whole components; renaming a second time
    changes nothing.
    """
    name = _unwrapped(name)
    for old, new, whole in rules:
        if name == old:
            name = new
        elif not whole and name.startswith(old + "."):
            name = name.replace(old, new, 1) if new else name.removeprefix(old + ".")
    return name


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
        return transpose(array) if name in self._transposed else array

    def recorded(self, name: str) -> int | None:
        """As that of the file, where it records one of the same bytes."""
        if name in self._transposed or not hasattr(self._tensors, "recorded"):
            return None
        return self._tensors.recorded(self.names[name])

    def verify_checksum(self, besides: Collection[str] = ()) -> bool:
        """As that of the file, where it has one."""
        if not hasattr(self._tensors, "verify_checksum"):
            return False
        if not besides:
            return self._tensors.verify_checksum()
        return self._tensors.verify_checksum([self.names[name] for name in besides])


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
    same = not beside and all(name == old for name, old in named.items())
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
    tensors: Tensors, given: Mapping[str, Any], pooled: bool | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Values of a config.json that the shapes of `tensors` show, under `given`; and a line for
    each.

    Args:
        tensors: under this package's names.
        given: what is known already and not asked again.
        pooled: whether MMF's classifier reads the pooled state, where that is known.

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
    architecture, reason = infer_architecture(specs, pooled)
    labels = _labels(specs)
    if labels is not None and architecture != "VisualBertForMultipleChoice":
        seen["num_labels"] = labels
    notes = [f"architecture={architecture} ({reason}; if not, --architecture CLASS)"]
    notes += [f"{k}={v}" for k, v in seen.items() if k not in given]
    seen["architectures"] = [architecture]
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
    return hidden // 64, (
        "hidden_size / 64, as shapes do not show it; if not, --set num_attention_heads=N"
    )


def infer_architecture(specs: Mapping[str, Spec], pooled: bool | None = None) -> tuple[str, str]:
    """The class whose head a file holds, and what shows it.

    A classifier of one row is VCR's; one of two is NLVR2's; a larger one is VQA's and reads the
    second-last word. MMF's head of two layers reads the pooled state, its default, unless `pooled`
    is false.
    """
    names = {name.removeprefix(PREFIX) for name in specs}
    labels = _labels(specs)
    if "attention.query.weight" in names:
        return "VisualBertForRegionToPhraseAlignment", "it has an attention over regions"
    if "cls.decoder.weight" in names:
        if pooled is None:
            why = "nothing says which state the classifier reads: MMF's default is the pooled one"
            return "VisualBertForVisualReasoning", why
        if pooled:
            return "VisualBertForVisualReasoning", "the classifier reads the pooled state"
        return "VisualBertForQuestionAnswering", "pooler_strategy is vqa"
    if labels is not None:
        found = {1: "VisualBertForMultipleChoice", 2: "VisualBertForVisualReasoning"}
        rows = f"a classifier of {labels} row{'s' * (labels != 1)}"
        return found.get(labels, "VisualBertForQuestionAnswering"), rows
    if any(name.startswith("cls.predictions.") for name in names):
        return "VisualBertForPreTraining", "it has a language-model head"
    return BODY, "it has no head"
