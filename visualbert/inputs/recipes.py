"""What each checkpoint was trained with, as data: text, segments, regions, detector, and answers.

A checkpoint gives its published numbers only with the inputs that it was trained on, and its files
do not say which these are. Sources: the data loaders and configurations of uclanlp/visualbert,
those of MMF, and the demonstration of transformers for `hf`.
"""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args, get_origin

from visualbert.errors import ConfigError, UsageError, did_you_mean

if TYPE_CHECKING:
    from visualbert.config import VisualBertConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How text and regions become the inputs of a checkpoint.

    Args:
        name: what it is called in a file and on the command line.
        architecture: the class whose head it feeds.
        template: the text's pieces in order, with spaces between; `{a}` and `{b}` stand for the
            texts, everything else is a token. Text behind the first `[SEP]` is of segment 1.
        words: "pythia" for questions that are lower-cased and lose `,` and `?` first, "" for text
            as it is.
        context: wordpieces of a pair's first text that truncation leaves; None where it takes none.
        max_length: of the text, in wordpieces with special tokens.
        visual_segments: the segment id of the regions of each image.
        regions: most regions of one image; None where the original took all.
        width: of a region's feature vector; None where the recipe fits any.
        detector: what made the regions, as `Regions.provenance` has it.
        read: the position whose state the head reads: "mask" (of `[MASK]`, the last but one),
            "last" (the last token before `[SEP]`), "first" (`[CLS]`, through the pooler), "phrases"
            or "every".
        scores: what makes probabilities of a VQA head's logits: "softmax" or "sigmoid".
        choices: how many texts are one example; 1 but for multiple choice.
        answers: the answer vocabulary, as `visualbert.inputs.answers` calls it, or "".
        labels: what the labels of a classifier mean, in order.
        source: where this is to be seen.
        published: the checkpoints that were trained so.

    Raises:
        ConfigError: a value that is none of these.
    """

    name: str
    architecture: str
    template: str
    words: str = ""
    context: int | None = 32
    max_length: int = 128
    visual_segments: tuple[int, ...] = (0,)
    regions: int | None = None
    width: int | None = None
    detector: str = ""
    read: str = "first"
    scores: str = "softmax"
    choices: int = 1
    answers: str = ""
    labels: tuple[str, ...] = ()
    source: str = ""
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is(value, field.type):
                words = field.type.__name__ if field.type in (int, str) else field.type
                raise ConfigError(f"{field.name}={value!r} must be of type {words}")
        for name, least in _LEAST.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {least}")
        for name, known in _ONE_OF.items():
            if getattr(self, name) not in known:
                expected = ", ".join(map(repr, known))
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {expected}")
        if not self.visual_segments or min(self.visual_segments) < 0:
            raise ConfigError(f"visual_segments={self.visual_segments} must be segment ids")
        self._check_template()

    def _check_template(self) -> None:
        pieces = self.pieces
        if pieces.count("{a}") != 1 or pieces.count("{b}") > 1:
            raise ConfigError(f"template={self.template!r} must hold one {{a}}, and {{b}} at most")
        if self.read == "mask" and pieces[-2:] != ["[MASK]", "[SEP]"]:
            raise ConfigError(f"template={self.template!r} must end in [MASK] [SEP] to be read so")
        if self.max_length < len(pieces):
            raise ConfigError(
                f"max_length={self.max_length} must be at least {len(pieces)}, or nothing of the "
                f"text is left in {self.template!r}"
            )

    @property
    def pieces(self) -> list[str]:
        """The template's."""
        return self.template.split()


_LEAST = {"context": 0, "regions": 1, "width": 1, "choices": 1}
_ONE_OF = {
    "words": ("", "pythia"),
    "read": ("mask", "last", "first", "phrases", "every"),
    "scores": ("softmax", "sigmoid"),
}


def _is(value: object, kind: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is(one, get_args(kind)[0]) for one in value)
    return isinstance(value, kind) and not isinstance(value, bool)


DETECTORS = {
    "pythia-x101-fc6": "Pythia's Faster R-CNN on Visual Genome (ResNeXt-101, fc6, 2048 wide)",
    "detectron-r101-fpn-fc6": "Detectron's Mask R-CNN on COCO (ResNet-101-FPN, fc6, 1024 wide)",
    "vcr-simple-detector": "the ResNet-50 inside the VCR checkpoints (512 wide)",
    "butd-r101-spatial": "bottom-up attention's Faster R-CNN on Visual Genome (ResNet-101, 2048 "
    "wide) with six numbers of each box",
    "butd-r101": "bottom-up attention's Faster R-CNN on Visual Genome (ResNet-101, 2048 wide)",
    "blobs": "the embedded extractor of this package",
}

SENTENCE = "[CLS] {a} [SEP]"
PAIR = "[CLS] {a} [SEP] {b} [SEP]"
QUESTION = "[CLS] {a} ? [MASK] [SEP]"

_VQA = {"regions": 100, "width": 2048, "detector": "pythia-x101-fc6"}
_NLVR2 = {
    "template": SENTENCE,
    "visual_segments": (0, 1),
    "regions": 144,
    "width": 1024,
    "detector": "detectron-r101-fpn-fc6",
}
# vcr_data_utils.py takes the length of a pair of lists for that of the context, which is thus kept.
_VCR = {"template": PAIR, "context": None, "width": 512, "detector": "vcr-simple-detector"}
_FLICKR = {"regions": 100, "width": 2054, "detector": "butd-r101-spatial"}
_CAPTIONS = {
    "architecture": "VisualBertForPreTraining",
    "template": PAIR,
    "read": "every",
    "labels": ("a random caption", "a caption of the image"),
    "source": "dataloaders/coco_dataset.py, configs/*/coco-pre-train.json",
}
_PRE = {"architecture": "VisualBertForPreTraining", "read": "every"}
_MMF = {"regions": 100, "width": 2048, "detector": "pythia-x101-fc6", "source": "mmf/datasets"}

_ALL: tuple[dict, ...] = (
    {
        **_VQA,
        "name": "vqa",
        "architecture": "VisualBertForQuestionAnswering",
        "template": QUESTION,
        "words": "pythia",
        "read": "mask",
        "answers": "pythia-vqa",
        "source": "dataloaders/vqa_dataset.py; BertVQA in models/model.py reads sum(mask) - 2",
        "published": ("uclanlp/visualbert-vqa", "vqa_fine_tuned"),
    },
    {
        **_VQA,
        **_PRE,
        "name": "vqa-pre",
        "template": "[CLS] {a} ? {b} [SEP]",
        "words": "pythia",
        "source": "dataloaders/vqa_dataset.py, pretraining with no_next_sentence",
        "published": ("uclanlp/visualbert-vqa-pre", "vqa_pre_trained"),
    },
    {
        **_VQA,
        **_CAPTIONS,
        "name": "vqa-coco-pre",
        "published": ("uclanlp/visualbert-vqa-coco-pre", "vqa_coco_pre_trained"),
    },
    {
        **_NLVR2,
        "name": "nlvr2",
        "architecture": "VisualBertForVisualReasoning",
        "labels": ("False", "True"),
        "source": "dataloaders/nlvr_dataset.py, configs/nlvr2/fine-tune.json",
        "published": ("uclanlp/visualbert-nlvr2", "nlvr2_fine_tuned"),
    },
    {
        **_NLVR2,
        **_PRE,
        "name": "nlvr2-pre",
        "labels": ("False", "True"),
        "source": "dataloaders/nlvr_dataset.py, configs/nlvr2/pre-train.json",
        "published": ("uclanlp/visualbert-nlvr2-pre", "nlvr2_pre_trained"),
    },
    {
        **_NLVR2,
        **_CAPTIONS,
        "name": "nlvr2-coco-pre",
        "visual_segments": (0,),
        "published": ("uclanlp/visualbert-nlvr2-coco-pre", "nlvr2_coco_pre_trained"),
    },
    {
        **_VCR,
        "name": "vcr",
        "architecture": "VisualBertForMultipleChoice",
        "choices": 4,
        "source": "dataloaders/vcr.py, configs/vcr/fine-tune-qa.json and fine-tune-qar.json",
        "published": ("uclanlp/visualbert-vcr", "vcr_fine_tune"),
    },
    {
        **_VCR,
        **_PRE,
        "name": "vcr-pre",
        "labels": ("a wrong choice", "the right choice"),
        "source": "dataloaders/vcr.py, configs/vcr/pre-train.json",
        "published": ("uclanlp/visualbert-vcr-pre", "vcr_pre_train"),
    },
    {
        **_VCR,
        **_CAPTIONS,
        "context": 32,
        "name": "vcr-coco-pre",
        "published": ("uclanlp/visualbert-vcr-coco-pre", "vcr_coco_pre_train"),
    },
    {
        **_FLICKR,
        "name": "flickr",
        "architecture": "VisualBertForRegionToPhraseAlignment",
        "template": SENTENCE,
        "read": "phrases",
        "source": "dataloaders/flickr_dataset.py, configs/flickr/fine-tune.json",
    },
    {
        **_FLICKR,
        **_PRE,
        "name": "flickr-pre",
        "template": SENTENCE,
        "source": "dataloaders/flickr_dataset.py, configs/flickr/pre-train.json",
    },
    {**_FLICKR, **_CAPTIONS, "name": "flickr-coco-pre"},
    {
        **_MMF,
        "name": "mmf-vqa",
        "architecture": "VisualBertForQuestionAnswering",
        "template": SENTENCE,
        "read": "last",
        "scores": "sigmoid",
        "answers": "pythia-vqa",
        "source": "mmf/models/visual_bert.py, pooler_strategy: vqa; no [MASK] is added",
        "published": ("visual_bert.finetuned.vqa2",),
    },
    {
        **_MMF,
        "name": "mmf-vizwiz",
        "architecture": "VisualBertForQuestionAnswering",
        "template": SENTENCE,
        "read": "last",
        "scores": "sigmoid",
        "source": "mmf/models/visual_bert.py, projects/visual_bert/configs/vizwiz",
        "published": ("visual_bert.finetuned.vizwiz",),
    },
    {
        **_MMF,
        "name": "mmf-classification",
        "architecture": "VisualBertForVisualReasoning",
        "template": SENTENCE,
        "source": "mmf/models/visual_bert.py: the pooled state; projects/visual_bert/configs",
        "published": (
            "visual_bert.finetuned.hateful_memes",
            "visual_bert.finetuned.visual_entailment",
            "visual_bert.finetuned.mmimdb",
        ),
    },
    {
        **_MMF,
        **_PRE,
        "name": "mmf-pre",
        "template": PAIR,
        "source": "mmf/datasets/builders/masked_coco; words only, no match",
        "published": ("visual_bert.pretrained",),
    },
    {
        "name": "hf",
        "architecture": "VisualBertForQuestionAnswering",
        "template": SENTENCE,
        "max_length": 512,
        "visual_segments": (1,),
        "regions": 36,
        "width": 2048,
        "detector": "butd-r101",
        "read": "last",
        "answers": "pythia-vqa",
        "source": "examples/research_projects/visual_bert/demo.ipynb of transformers",
    },
    {
        "name": "scenes",
        "architecture": "VisualBertForQuestionAnswering",
        "template": QUESTION,
        "words": "pythia",
        "max_length": 64,
        "regions": 36,
        "width": 573,
        "detector": "blobs",
        "read": "mask",
        "source": "tools/train_embedded.py",
    },
)
RECIPES: dict[str, Recipe] = {values["name"]: Recipe(**values) for values in _ALL}

_BY_HEAD = {
    "VisualBertForQuestionAnswering": "vqa",
    "VisualBertForVisualReasoning": "nlvr2",
    "VisualBertForMultipleChoice": "vcr",
    "VisualBertForRegionToPhraseAlignment": "flickr",
}
_BY_HEAD_MMF = {
    "VisualBertForQuestionAnswering": "mmf-vqa",
    "VisualBertForVisualReasoning": "mmf-classification",
}
_BY_WIDTH = {2048: "vqa", 1024: "nlvr2", 512: "vcr", 2054: "flickr"}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in RECIPES:
        hint = did_you_mean(name, RECIPES) or f"; expected one of {', '.join(RECIPES)}"
        raise UsageError(f"unknown recipe {name!r}{hint}")
    return RECIPES[name]


def guess_recipe(source: str, config: "VisualBertConfig") -> Recipe:
    """The recipe that a checkpoint without processor files was most probably trained with.

    By its name, where it is a published one, else by its head and the width of its regions; a
    warning says which it became and how to choose another.

    Args:
        source: what the checkpoint was opened as: a folder, a file or a Hub id.
        config: its configuration.
    """
    found, why = _by_name(source, config), "its name"
    if found is None:
        found, why = _by_head(config), "its head and the width of its regions"
    if found.width not in (None, config.visual_embedding_dim):
        found = dataclasses.replace(found, width=config.visual_embedding_dim, detector="")
        why += ", with regions of another width"
    warnings.warn(
        f"{source} has no processor files; the recipe {found.name!r} is taken by {why}. Another "
        "one: recipe=…, or --recipe on the command line",
        stacklevel=3,
    )
    return found


def _by_name(source: str, config: "VisualBertConfig") -> Recipe | None:
    """The published checkpoint with the longest name that `source` holds as a whole part."""
    parts = "/" + source.replace("\\", "/").strip("/").lower() + "/"
    names = {name: recipe for recipe in RECIPES.values() for name in recipe.published}
    for name in sorted(names, key=len, reverse=True):
        short = name.rpartition("/")[2]
        at = parts.rfind("/" + short)
        if at >= 0 and parts[at + 1 + len(short)] in "/.":
            recipe = names[name]
            own = config.architectures and config.architectures[0].endswith(recipe.architecture)
            return recipe if own or not config.architectures else None
    return None


def _by_head(config: "VisualBertConfig") -> Recipe:
    head = (config.architectures or ("VisualBertModel",))[0]
    head = head.removeprefix("TF").removeprefix("Flax")
    table = _BY_HEAD_MMF if config.classifier_head == "mlp" else _BY_HEAD
    if head in table:
        return RECIPES[table[head]]
    return RECIPES[_BY_WIDTH.get(config.visual_embedding_dim, "vqa") + "-coco-pre"]
