"""Train the checkpoint that comes with the package: questions about scenes, from pixels.

Scenes are drawn, the embedded extractor finds their regions, and a small VisualBERT learns to
answer questions about them as VQA models do: the answer is read at `[MASK]`, the loss is that of
the original's VQA head. Two more losses, whose heads are dropped afterwards, ask every region which
digit and colour it is, and whether it is what the answer is about. Test scenes hold only
handwriting that training never saw.

    python tools/train_embedded.py OUT [--scenes 9000] [--minutes 42] [--seed 1]
"""

import argparse
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROUNDS = 4  # questions of every kind about a training scene
BATCH = 128
RATE = 1.5e-3
WARMUP = 300  # steps
CLASSES = (10, 6)  # digits and colours
NOISE = 0.05  # standard deviation, added to region features in training
REGION_WEIGHT, ABOUT_WEIGHT = 0.5, 1.0
VALIDATION, TEST = (90_001, "train"), (90_002, "test")  # seed and split


class Data(NamedTuple):
    """Questions about scenes as arrays; `scene` leads from a question to its regions."""

    ids: np.ndarray  # N T
    answer: np.ndarray  # N
    scene: np.ndarray  # N
    kind: list[str]
    about: np.ndarray  # N V, 1 where the answer is about a region's thing
    features: np.ndarray  # scenes V F
    regions: np.ndarray  # scenes, how many
    digit: np.ndarray  # scenes V, -1 where a region is none
    colour: np.ndarray  # scenes V


def see(number: int, seed: int, split: str) -> tuple[np.ndarray, list[int]]:
    """A scene's region features, and which of its things each region shows, -1 for none."""
    from visualbert.regions import get_extractor
    from visualbert.scenes.draw import make_scene, paint
    from visualbert.scenes.tasks import matching

    scene = make_scene(number, seed, split)
    regions = get_extractor()(paint(scene))
    assert regions.boxes is not None
    return regions.features.astype(np.float16), matching(regions.boxes, scene)


def make_processor() -> Any:
    """The processor that goes with the checkpoint."""
    from visualbert.inputs.processor import VisualBertProcessor
    from visualbert.scenes.words import vocabulary

    return VisualBertProcessor("scenes", vocabulary())


def prepare(pool: Any, scenes: int, seed: int, split: str, rounds: int) -> Data:
    """All questions about `scenes` scenes."""
    from visualbert.scenes.draw import COLOURS, make_scene
    from visualbert.scenes.questions import ANSWERS, questions

    seen = list(pool.map(see, range(scenes), [seed] * scenes, [split] * scenes, chunksize=50))
    drawn = [make_scene(n, seed, split) for n in range(scenes)]
    asked = [(n, q) for n in range(scenes) for q in questions(drawn[n], rounds)]
    most, width = max(len(shown) for _, shown in seen), seen[0][0].shape[1]
    features = np.zeros((scenes, most, width), np.float16)
    classes = np.full((2, scenes, most), -1)
    about = np.zeros((len(asked), most), np.float32)
    for n, (vectors, shown) in enumerate(seen):
        features[n, : len(vectors)] = vectors
        for region, thing in enumerate(shown):
            if thing >= 0:
                own = drawn[n].things[thing]
                classes[:, n, region] = own.digit, list(COLOURS).index(own.colour)
    for number, (n, q) in enumerate(asked):
        for region, thing in enumerate(seen[n][1]):
            about[number, region] = thing >= 0 and drawn[n].things[thing] in q.about
    return Data(
        make_processor()([q.text for _, q in asked])["input_ids"],
        np.array([ANSWERS.index(q.answer) for _, q in asked]),
        np.array([n for n, _ in asked]),
        [q.kind for _, q in asked],
        about,
        features,
        np.array([len(shown) for _, shown in seen]),
        *classes,
    )


def batch(data: Data, rows: np.ndarray) -> dict[str, Any]:
    """Model inputs of some questions."""
    import torch

    ids, scene = data.ids[rows], data.scene[rows]
    ids = ids[:, : (ids > 0).sum(1).max()]
    length = data.regions[scene].max()
    visible = np.arange(length) < data.regions[scene][:, None]
    arrays = {
        "input_ids": ids,
        "attention_mask": (ids > 0).astype(np.int64),
        "visual_embeds": data.features[scene][:, :length].astype(np.float32),
        "visual_attention_mask": visible.astype(np.int64),
        "visual_token_type_ids": np.zeros(visible.shape, np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def accuracy(model: Any, data: Data) -> dict[str, float]:
    """The share of right answers by kind of question, and of all."""
    import torch

    right, asked = Counter[str](), Counter[str]()
    model.eval()
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(data.ids)), len(data.ids) // 512 + 1):
            found = model(**batch(data, rows)).logits.argmax(1).numpy()
            for row, ok in zip(rows, found == data.answer[rows], strict=True):
                for name in (data.kind[row], "all"):
                    asked[name] += 1
                    right[name] += int(ok)
    model.train()
    return {name: right[name] / asked[name] for name in asked}


def make_model(width: int, seed: int) -> Any:
    """The model before training."""
    from visualbert import VisualBertConfig, VisualBertForQuestionAnswering
    from visualbert.scenes.questions import ANSWERS
    from visualbert.scenes.words import SIZE

    config = VisualBertConfig(
        vocab_size=SIZE,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        visual_embedding_dim=width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(ANSWERS)),
    )
    return VisualBertForQuestionAnswering(config, seed=seed).train()


class RegionLosses:
    """What regions are asked beside the question; its heads are no part of the checkpoint."""

    def __init__(self, hidden: int) -> None:
        import torch

        self.heads = torch.nn.ModuleList(torch.nn.Linear(hidden, n) for n in (*CLASSES, 1))

    def __call__(self, data: Data, rows: np.ndarray, states: Any, text: int) -> Any:
        """The loss of a batch from its hidden states, the first layer's and the last one's."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

        first, last = (states[n][:, text:] for n in (1, -1))  # B V H
        loss = torch.zeros(())
        for head, classes in zip(self.heads, (data.digit, data.colour), strict=False):
            wanted = torch.from_numpy(classes[data.scene[rows]][:, : first.shape[1]])
            found = head(first).flatten(0, 1)
            loss += REGION_WEIGHT * cross_entropy(found, wanted.flatten(), ignore_index=-1)
        about = torch.from_numpy(data.about[rows][:, : last.shape[1]])
        found = self.heads[2](last)[..., 0]
        return loss + ABOUT_WEIGHT * binary_cross_entropy_with_logits(found, about)


def train(model: Any, data: Data, validation: Data, minutes: float, seed: int) -> None:
    """Fit `model` to `data` in `minutes`, the rate falling linearly with time."""
    import torch
    from torch.nn.functional import one_hot

    losses = RegionLosses(model.config.hidden_size)
    parameters = [*model.parameters(), *losses.heads.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    start, step, shown = time.monotonic(), 0, 0.0
    while (past := (time.monotonic() - start) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARMUP) * (1 - past)
        rows = rng.integers(0, len(data.ids), BATCH)
        inputs = batch(data, rows)
        features = inputs["visual_embeds"]
        features += NOISE * torch.randn(features.shape, generator=noise)
        labels = one_hot(torch.from_numpy(data.answer[rows]), model.config.num_labels).float()
        out = model(**inputs, labels=labels, output_hidden_states=True)
        text = inputs["input_ids"].shape[1]
        loss = out.loss + losses(data, rows, out.hidden_states, text)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        shown += (out.loss.item() - shown) * max(0.01, 1 / step)
        if step % 250 == 0:
            right = accuracy(model, validation)["all"]
            print(f"{past:6.1%} step {step} loss {shown:.3f} validation {right:.3f}", flush=True)


def main() -> None:
    """Draw, see, train, test, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=9000)
    parser.add_argument("--minutes", type=float, default=42)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        data = prepare(pool, args.scenes, args.seed, "train", ROUNDS)
        validation = prepare(pool, 300, *VALIDATION, 1)
        test = prepare(pool, 1000, *TEST, 1)
    print(f"{len(data.ids)} questions about {args.scenes} scenes", flush=True)
    model = make_model(data.features.shape[2], args.seed)
    train(model, data, validation, args.minutes, args.seed)
    model.eval().half().float()
    for kind, share in accuracy(model, test).items():
        print(f"{kind:10} {share:.1%}")
    model.half().save_pretrained(args.out)
    make_processor().save_pretrained(args.out)


if __name__ == "__main__":
    main()
