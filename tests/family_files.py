"""Checkpoints of every family, small, made the way their users' files were made."""

import json
import tarfile

import numpy as np
import torch
import yaml
from golden_cases import golden, prepared

from visualbert.pt.convert import from_numpy

HEADS = {"num_attention_heads": 3}  # the golden models are too narrow to guess
DETECTOR = {  # SimpleDetector's layers (utils/detector.py), narrower
    "backbone.0.weight": (8, 3, 7, 7),
    "backbone.1.weight": (8,),
    "backbone.1.bias": (8,),
    "backbone.1.running_mean": (8,),
    "backbone.1.running_var": (8,),
    "backbone.1.num_batches_tracked": (),
    "backbone.4.0.conv1.weight": (4, 8, 1, 1),
    "backbone.4.0.bn1.num_batches_tracked": (),
    "backbone.4.0.downsample.0.weight": (16, 8, 1, 1),
    "backbone.6.5.conv3.weight": (16, 4, 1, 1),
    "after_roi_align.0.2.conv2.weight": (4, 4, 3, 3),
    "object_embed.weight": (81, 12),
    "mask_upsample.weight": (4, 1, 3, 3),
    "mask_upsample.bias": (4,),
    "obj_downsample.1.weight": (20, 28),
    "obj_downsample.1.bias": (20,),
    "regularizing_predictor.weight": (81, 16),
    "regularizing_predictor.bias": (81,),
}


def save(path, value, legacy=False):
    """`torch.save`, as of before 1.6 or as of today."""
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def tensors_of(arrays):
    return {name: from_numpy(np.array(array)) for name, array in arrays.items()}


def original_state(case, outer="bert.", wrapper=""):
    """A golden model as the authors' `model_state_epoch_N.th` has it."""
    weights = golden(case)[1]["weights"]
    return tensors_of({wrapper + outer + name: x for name, x in weights.items()})


def detector_state(wrapper=""):
    rng = np.random.default_rng(7)
    return tensors_of(
        {
            f"{wrapper}detector.{name}": rng.standard_normal(shape).astype(np.float32)
            if "tracked" not in name
            else np.int64(3 + len(name))
            for name, shape in DETECTOR.items()
        }
    )


def training_state(state):
    """AllenNLP's second file of an epoch: the optimizer after one step, and the metrics."""
    parameters = [torch.nn.Parameter(t.clone()) for t in list(state.values())[:3]]
    optimizer = torch.optim.Adam(parameters, lr=2e-5)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "epoch": 3,
        "val_metric_per_epoch": [0.5, 0.625, 0.75, 0.75],
        "optimizer": optimizer.state_dict(),
    }


def mmf_state(case, wrapper="model.", labels=None, pairs=False, seed=5):
    """A golden body as MMF's; with its own head, or with a classifier of `labels` rows."""
    weights = golden(case)[1]["weights"]
    state = {
        f"{wrapper}{name}": x for name, x in weights.items() if labels is None or "bert." in name
    }
    positions = weights["bert.embeddings.position_embeddings.weight"].shape[0]
    state[f"{wrapper}bert.embeddings.position_ids"] = np.arange(positions)[None]
    if labels is None:
        state[f"{wrapper}cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    else:
        head = mmf_head(labels, 48 if pairs else 24, seed)
        state |= {f"{wrapper}classifier.{name}": x for name, x in head.items()}
    return tensors_of(state)


def mmf_head(labels, width=24, seed=5):
    rng = np.random.default_rng(seed)
    shapes = {
        "0.dense.weight": (width, width),
        "0.dense.bias": (width,),
        "0.LayerNorm.weight": (width,),
        "0.LayerNorm.bias": (width,),
        "1.weight": (labels, width),
        "1.bias": (labels,),
    }
    return {n: rng.standard_normal(s).astype(np.float32) * 0.3 for n, s in shapes.items()}


def mmf_config(labels=None, models="model_config", **changes):
    """MMF's saved configuration, as far as the model goes."""
    model = {
        "bert_model_name": "bert-base-uncased",
        "training_head_type": "pretraining" if labels is None else "classification",
        "visual_embedding_dim": 20,
        "special_visual_initialize": True,
        "hidden_dropout_prob": 0.2,
        "num_attention_heads": 3,
        "embedding_strategy": "plain",
        "bypass_transformer": False,
        "losses": [{"type": "logit_bce"}],
        **({} if labels is None else {"num_labels": labels}),
        **changes,
    }
    return {models: {"visual_bert": model}, "training": {"seed": 1}, "model": "visual_bert"}


def mmf_checkpoint(state, config=None):
    """What MMF's trainer saves: the model beside the optimizer, the schedule and counters."""
    parameters = [torch.nn.Parameter(t.float().clone()) for t in list(state.values())[:3]]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5, eps=1e-8)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    optimizer.step()
    schedule.step()
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "best_iteration": 4,
        "best_metric_value": torch.tensor(0.5),
        "fp16_scaler": None,
        **({} if config is None else {"config": config}),
        "git/branch": "main",
    }


def write_yaml(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


def pack(path, *members, folder="visual_bert.finetuned"):
    """A zoo archive, gzipped where its name says so."""
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for member in members:
            archive.add(member, f"{folder}/{member.name}")
    return path


def canonical(case):
    """Architecture, configuration and arrays of a golden model under this package's names."""
    architecture, config, tensors, _, _ = prepared(case)
    if architecture == "VisualBertForMultipleChoice":
        config = config.replace(num_labels=2)  # its head has one row whatever the number of labels
    return architecture, config.replace(architectures=(architecture,)), tensors.arrays


def google_state(bert):
    """The variables of Google's TensorFlow BERT that hold the values of a transformers one."""
    state = {}
    for name, tensor in bert.state_dict().items():
        array = tensor.numpy()
        if name.endswith("position_ids") or name.startswith("cls.predictions.decoder"):
            continue
        if name.endswith("_embeddings.weight"):
            name = name.removesuffix(".weight")
        elif name.startswith("cls.seq_relationship."):
            name = name.replace("relationship.", "relationship.output_")
            name = name.replace("output_weight", "output_weights")
        elif name == "cls.predictions.bias":
            name = "cls.predictions.output_bias"
        elif "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        elif name.endswith(".weight"):
            name, array = name.removesuffix("weight") + "kernel", array.T
        state[name.replace("layer.", "layer_").replace(".", "/")] = np.ascontiguousarray(array)
    return state


def write_google(folder, state, values=None):
    """`bert_model.ckpt` as tf.compat.v1's Saver writes it, with Adam's moments and the step."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, array in state.items():
            tf.compat.v1.get_variable(name, initializer=array)
            for slot in ("adam_m", "adam_v"):
                tf.compat.v1.get_variable(f"{name}/{slot}", initializer=np.full_like(array, 0.5))
        tf.compat.v1.get_variable("global_step", initializer=np.int64(1000))
        session.run(tf.compat.v1.global_variables_initializer())
        saver = tf.compat.v1.train.Saver()
        saver.save(session, str(folder / "bert_model.ckpt"), write_meta_graph=True)
    (folder / "checkpoint").unlink(missing_ok=True)
    (folder / "vocab.txt").write_text("[PAD]\n")
    if values is not None:
        (folder / "bert_config.json").write_text(json.dumps(values))
    return folder
