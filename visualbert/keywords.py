"""What becomes of the keywords that transformers' from_pretrained knows: one table for every class.

A keyword that means here what it means there is taken, one that asks for nothing is dropped, and
any other is refused with the way out.
"""

import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from visualbert.errors import UsageError, did_you_mean


class _Refused(NamedTuple):
    """The way out, and the value, beside None and "", that asks for nothing."""

    way: str
    default: bool = False


# Nothing in a file is run, weights are mapped, and every framework reads what any of them wrote.
_WITHOUT_EFFECT = (
    *("use_safetensors", "weights_only", "trust_remote_code", "low_cpu_mem_usage"),
    *("from_pt", "from_tf", "from_flax", "resume_download"),
)
_QUANTISED = _Refused("quantised models are transformers', which loads the same folders")
_REFUSED = {
    "add_pooling_layer": _Refused("every model has its pooler; leave pooler_output unread", True),
    "cache_dir": _Refused("set HF_HUB_CACHE in the environment"),
    "device_map": _Refused(
        "move the model afterwards: model.to(device); TensorFlow and Flax use their default device"
    ),
    "force_download": _Refused("remove the repository from the Hub's cache first: hf cache rm"),
    "ignore_mismatched_sizes": _Refused("pass new_head=True, which draws the head anew"),
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "local_files_only": _Refused("set HF_HUB_OFFLINE=1 in the environment, or pass a local folder"),
    "output_loading_info": _Refused("a load that succeeds has nothing to report: it is strict"),
    "proxies": _Refused("set HTTPS_PROXY in the environment"),
    "quantization_config": _QUANTISED,
    "return_dict": _Refused("pass return_dict=False when you call the model", True),
    "subfolder": _Refused("pass the path of that folder in a local copy of the repository"),
    "token": _Refused("set HF_TOKEN in the environment, or log in: hf auth login", True),
    "use_auth_token": _Refused("set HF_TOKEN in the environment, or log in: hf auth login", True),
    "variant": _Refused("pass the path of that weight file, and its config.json as config"),
}


def without_habits(function: str, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """`keywords` without those of transformers' that ask for nothing here.

    Raises:
        UsageError: one asks for what `function` does not do.
    """
    kept = {name: x for name, x in keywords.items() if name not in _WITHOUT_EFFECT}
    for name, (way, default) in _REFUSED.items():
        if name in kept:
            value = kept.pop(name)
            if not (value is None or value is default or value == ""):
                raise UsageError(f"{function}() takes no {name!r}; {way}")
    if "label2id" in kept:
        kept["id2label"] = _names(function, kept.pop("label2id"), kept.get("id2label"))
    return kept


def check_keywords(function: str, keywords: Iterable[str], fields: set[str], own: set[str]) -> None:
    """Refuse a keyword that is neither a field of the configuration nor the function's own.

    Raises:
        UsageError: the first one, with the name that may have been meant.
    """
    known = own | {"torch_dtype", *_WITHOUT_EFFECT, *_REFUSED}
    for name in sorted(set(keywords) - fields):
        way = did_you_mean(name, known, cutoff=0.8) or did_you_mean(name, fields, cutoff=0.5)
        way = way or "; its other keywords are fields of VisualBertConfig"
        raise UsageError(f"{function}() takes no {name!r}{way}")


def check_source(function: str, source: Any) -> None:
    """Refuse what cannot name a checkpoint.

    Raises:
        UsageError: it is neither a string nor a path.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UsageError(
            f"{function}() needs a folder, a file or a Hub id, got {_described(source)}"
        )


def _described(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _names(function: str, numbers: Any, names: Any) -> Any:
    """`id2label`, given or as the inverse of `label2id`."""
    inverse = {}
    if isinstance(numbers, Mapping):
        inverse = {str(number): name for name, number in numbers.items()}
    given = names if isinstance(names, Mapping) else inverse
    if not inverse or {str(number): name for number, name in given.items()} != inverse:
        raise UsageError(
            f"{function}() takes no 'label2id' but the inverse of id2label; give id2label alone"
        )
    return inverse if names is None else names
