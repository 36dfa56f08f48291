"""VisualBERT in PyTorch, leaf to head.

Twin of `visualbert.tf.modeling` and `visualbert.flax.modeling`: the same classes, submodules and
methods in the same order; `tools/check_parallel.py` holds the list of permitted differences.
Architecture: arXiv 1908.03557 section 3, and `modeling.py` of uclanlp/visualbert.

B batch  C choices  T text  V regions  S=T+V  N heads  D head size  H hidden  F visual features
A aligned positions  E phrases or other chosen positions  L labels  W words  I images
R rows of real tokens, K long (`visualbert.packing`)
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor as Array
from torch import nn
from torch.nn.functional import gelu, relu, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint

from visualbert.config import VisualBertConfig, checked
from visualbert.errors import UsageError
from visualbert.inputs.contract import (
    check_answer_position,
    check_inputs,
    check_packing,
    flatten_choices,
    is_floating,
    require,
)
from visualbert.outputs import ModelOutput, model_output
from visualbert.packing import (
    LEAST_SAVED,
    STEP,
    Packing,
    labelled_positions,
    plan_packing,
    saved,
)
from visualbert.pretrained import PreTrained
from visualbert.pt.products import linear
from visualbert.pt.stretches import Stretches, attend_apart, flash_serves, make_stretches

Dropout = nn.Dropout
ACTIVATIONS = {
    "gelu": gelu,
    "gelu_new": lambda x: gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "silu": silu,
    "swish": silu,
}


class Linear(nn.Linear):
    """`x @ weight.T + bias`; the values come from a checkpoint or from `PreTrained.initialise`."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: it is about to be written."""

    def forward(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """A table of vectors; no row is frozen."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: it is about to be written."""


class LayerNorm(nn.LayerNorm):
    """Normalisation over the last axis with scale and shift."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: it is about to be written."""


class Embeddings(nn.Module):
    """Text and region embeddings in one sequence, text first (paper section 3.2)."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.word_embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.visual_token_type_embeddings = Embedding(config.type_vocab_size, config.hidden_size)
        self.visual_position_embeddings = Embedding(
            config.max_position_embeddings, config.hidden_size
        )
        self.visual_projection = Linear(config.visual_embedding_dim, config.hidden_size)

    def forward(
        self,
        input_ids=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        visual_embeds=None,
        visual_token_type_ids=None,
        image_text_alignment=None,
        region_index=None,
        is_text=None,
    ):
        """Text and regions behind each other, or mixed, where `is_text` (R, K) says which is where;
        regions at `region_index`, flat in (I, V), where several texts share them.
        """
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # B T H
        text_length = inputs_embeds.shape[1]
        if position_ids is None:
            position_ids = torch.arange(text_length, device=inputs_embeds.device)[None]  # 1 T
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(position_ids)
        embeddings = (
            inputs_embeds
            + self.position_embeddings(position_ids)
            + self.token_type_embeddings(token_type_ids)
        )  # B T H
        if visual_embeds is not None:
            projected = self.visual_projection(visual_embeds)
            if region_index is not None:
                projected = take(projected, region_index)  # B V H
            regions = self.embed_regions(projected, visual_token_type_ids, image_text_alignment)
            if is_text is None:
                embeddings = torch.concatenate([embeddings, regions], dim=1)  # B S H
            else:
                embeddings = torch.where(is_text[..., None], embeddings, regions)  # R K H
        return self.dropout(self.LayerNorm(embeddings))

    def embed_regions(self, projected, visual_token_type_ids, image_text_alignment):
        """Projection + segment + position; every region has position 0 of the visual table."""
        first = torch.zeros_like(projected[:, :, 0], dtype=torch.long)  # B V
        if visual_token_type_ids is None:
            visual_token_type_ids = first + 1
        embeddings = (
            projected
            + self.visual_token_type_embeddings(visual_token_type_ids)
            + self.visual_position_embeddings(first)
        )  # B V H
        if image_text_alignment is not None:
            embeddings = embeddings + self.aligned_positions(image_text_alignment)
        return embeddings

    def aligned_positions(self, image_text_alignment):
        """Mean of the text positions that a region is aligned with; zero where there is none."""
        valid = image_text_alignment >= 0  # B V A
        positions = self.position_embeddings(torch.where(valid, image_text_alignment, 0))
        valid = valid[..., None].to(positions.dtype)  # B V A 1
        return (positions * valid).sum(2) / valid.sum(2).clip(1)  # B V H


class SelfAttention(nn.Module):
    """Multi-head attention of every position to every visible one."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.fused = config.attn_implementation != "eager"
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = Linear(config.hidden_size, config.hidden_size)
        self.value = Linear(config.hidden_size, config.hidden_size)
        self.joint: Any = None  # the three products in one, in a predictor
        self.dropout = Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states, visible=None, output_attentions=False, chosen=None):
        query, key, value = map(self.split_heads, self.project(hidden_states, chosen))
        if chosen is not None:
            visible = chosen.visible
        plain = output_attentions or not self.fused
        attend = self.plain_attention if plain else self.fused_attention
        if isinstance(visible, Stretches):
            context, probs = attend_apart(attend, query, key, value, visible), None
        else:
            context, probs = attend(query, key, value, visible)
        return context.reshape(*query.shape[:2], -1), probs  # B S H, B N S S

    def project(self, hidden_states, chosen):
        """Query, key and value; with `chosen`, the query at those positions alone."""
        if chosen is None:
            if self.joint is not None:
                return self.joint(hidden_states).chunk(3, dim=-1)
            return self.query(hidden_states), self.key(hidden_states), self.value(hidden_states)
        query = self.query(take(hidden_states, chosen.positions))
        key, value = self.key(hidden_states), self.value(hidden_states)
        if chosen.places is not None:
            key, value = take(key, chosen.places), take(value, chosen.places)
        return query, key, value

    def split_heads(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, -1)  # B S N D

    def fused_attention(self, query, key, value, visible):
        context = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=None if visible is None else mask_bias(visible, query.dtype),
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return context.transpose(1, 2), None  # B S N D

    def plain_attention(self, query, key, value, visible):
        scores = torch.einsum("bqnd,bknd->bnqk", query, key) / math.sqrt(query.shape[-1])
        if visible is not None:
            scores = scores + mask_bias(visible, scores.dtype)
        probs = torch.softmax(scores, dim=-1)
        return torch.einsum("bnqk,bknd->bqnd", self.dropout(probs), value), probs


class SelfOutput(nn.Module):
    """Projection, residual connection and normalisation after attention."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class Attention(nn.Module):
    """Self-attention with its output projection."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = SelfOutput(config)

    def forward(self, hidden_states, visible=None, output_attentions=False, chosen=None):
        context, probs = self.self(
            hidden_states, visible, output_attentions=output_attentions, chosen=chosen
        )
        if chosen is not None:
            hidden_states = take(hidden_states, chosen.positions)
        return self.output(context, hidden_states), probs


class Intermediate(nn.Module):
    """First half of the feed-forward layer."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, hidden_states):
        return ACTIVATIONS[self.hidden_act](self.dense(hidden_states))


class Output(nn.Module):
    """Second half of the feed-forward layer, residual connection and normalisation."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.intermediate_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class Layer(nn.Module):
    """One Transformer layer of BERT, normalisation last."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config)

    def forward(self, hidden_states, visible=None, output_attentions=False, chosen=None):
        hidden_states, probs = self.attention(
            hidden_states, visible, output_attentions=output_attentions, chosen=chosen
        )
        return self.output(self.intermediate(hidden_states), hidden_states), probs


class Encoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(self, hidden_states, visible=None, output_attentions=False, chosen=None):
        """Every layer's input and output, and attentions; the last output is only `chosen`."""
        all_hidden_states, attentions = [hidden_states], []
        for number, layer in enumerate(self.layer, 1):
            only = chosen if number == len(self.layer) else None
            hidden_states, probs = self.run(layer, hidden_states, visible, output_attentions, only)
            all_hidden_states.append(hidden_states)
            attentions.append(probs)
        return tuple(all_hidden_states), tuple(attentions)

    def run(self, layer, hidden_states, visible, output_attentions, chosen):
        """One layer, whose activations are computed again in the backward pass if so asked."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(
                layer,
                hidden_states,
                visible,
                output_attentions=output_attentions,
                chosen=chosen,
                use_reentrant=False,
            )
        return layer(hidden_states, visible, output_attentions=output_attentions, chosen=chosen)


class Pooler(nn.Module):
    """A dense layer with tanh on the first token."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)

    def forward(self, first):
        return torch.tanh(self.dense(first))  # B H


class PredictionHeadTransform(nn.Module):
    """The layer before the decoder: of the language-model head, and of MMF's classifier."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size)
        self.hidden_act = config.hidden_act
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states):
        return self.LayerNorm(ACTIVATIONS[self.hidden_act](self.dense(hidden_states)))


class LMPredictionHead(nn.Module):
    """Masked language modelling; the decoder is the word table, which the caller passes."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.transform = PredictionHeadTransform(config)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, hidden_states, word_table):
        return linear(self.transform(hidden_states), word_table) + self.bias  # B S W


class PreTrainingHeads(nn.Module):
    """Masked language modelling and sentence-image match (paper section 3.3)."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.predictions = LMPredictionHead(config)
        self.seq_relationship = Linear(config.hidden_size, 2)

    def forward(self, hidden_states, pooled, word_table):
        return self.predictions(hidden_states, word_table), self.seq_relationship(pooled)


class ClassificationHead(nn.Module):
    """MMF's classifier of two layers (`classifier_head="mlp"`, mmf/models/visual_bert.py)."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.transform = PredictionHeadTransform(config)
        self.decoder = Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states):
        return self.decoder(self.transform(hidden_states))  # B L


class RegionToPhraseAttention(nn.Module):
    """Scores of every region for every phrase: one head's query-key product, no softmax."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.query = Linear(config.hidden_size, config.head_size)
        self.key = Linear(config.hidden_size, config.head_size)
        self.value = Linear(config.hidden_size, config.head_size)

    def forward(self, phrases, regions, visible=None):
        query, key = self.query(phrases), self.key(regions)  # B E D, B V D
        scores = torch.einsum("bed,bvd->bev", query, key) / math.sqrt(query.shape[-1])
        if visible is not None:
            scores = scores + mask_bias(visible[:, None, :], scores.dtype)
        return scores


class PreTrainedModel(PreTrained, nn.Module):
    """What the public classes share: loading, saving, and the edges of a call."""

    framework = "pt"

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs=None) -> None:
        """Keep one activation per layer in training and compute the others again."""
        self.body().encoder.gradient_checkpointing = True

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs=None, every_n_layers=1, offload=False
    ) -> None:
        """`gradient_checkpointing_enable` as transformers' `Trainer` calls it.

        Raises:
            UsageError: it is to leave layers out or to offload activations.
        """
        if every_n_layers != 1 or offload:
            raise UsageError("VisualBERT checkpoints every layer, where it is: no other way")
        self.gradient_checkpointing_enable()

    def gradient_checkpointing_disable(self) -> None:
        """Keep every activation again."""
        self.body().encoder.gradient_checkpointing = False

    def body(self) -> Any:
        """The `VisualBertModel` below the head, or the model itself."""
        return getattr(self, "visual_bert", self)

    def get_input_embeddings(self) -> Any:
        """The word table."""
        return self.body().embeddings.word_embeddings

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.get_input_embeddings().weight.dtype

    def edge(self, where: str, inputs: dict[str, Any], **sizes: int) -> dict[str, Any]:
        """Inputs as tensors on the model's device, refused where they do not fit
        (`inputs.contract`).
        """
        if not torch.compiler.is_compiling():
            check_inputs(self.config, where, look, inputs, sizes)
        return {
            name: None
            if x is None
            else as_tensor(x, self.device, is_floating(where, name), self.dtype)
            for name, x in inputs.items()
        }


class VisualBertModel(PreTrainedModel):
    """VisualBERT without a head: hidden states of text and regions, and the pooled first position.

    Args:
        config: the architecture.
        seed: of the initial values; None leaves the memory unwritten.
    """

    architecture = "VisualBertModel"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config)
        if config.bypass_transformer:
            self.additional_layer = Layer(config)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        positions: Any = None,
    ) -> ModelOutput:
        """Run text and regions through one Transformer.

        Args:
            input_ids: (B, T) word-piece ids.
            attention_mask: (B, T), 1 where there is a token; ones when left out. Padding may stand
                on either side.
            token_type_ids: (B, T) text segments; zeros when left out.
            position_ids: (B, T) rows of the position table; 0 … T-1 when left out.
            inputs_embeds: (B, T, H) instead of `input_ids`.
            visual_embeds: (B, V, F) region features of the detector that the checkpoint was trained
                with; text alone when left out.
            visual_attention_mask: (B, V), 1 where there is a region; ones when left out.
            visual_token_type_ids: (B, V) visual segments; ones when left out, as in transformers.
                The published checkpoints were trained with 0 (NLVR2: 0 for the first image, 1 for
                the second).
            image_text_alignment: (B, V, A) text positions that each region belongs to, -1 = padding
                (VCR); longer than V is cut.
            image_index: (B,) row of `visual_embeds`, `visual_attention_mask` and
                `visual_token_type_ids` that each text is about, which are then (I, V, …): many
                questions about few images, whose features are projected once.
            packing: the rows to compute on, from `visualbert.plan_packing`, which stands for masks
                that are left out; where it is left out, planned from the masks as `config.packing`
                says. Attentions cannot be had from it.
            output_attentions: also return each layer's attention after softmax.
            output_hidden_states: also return the embeddings and each layer's output.
            return_dict: False gives the plain tuple, `to_tuple()`, of what is returned.
            positions: (B, E) the only positions at which the last hidden state is asked for, or a
                function that finds them from the text's mask and the text.

        Returns:
            `last_hidden_state` (B, S, H), or (B, E, H) at `positions` and then no `pooler_output`
            (B, H), and on request `hidden_states` and `attentions`. Where the batch is packed,
            hidden states at padding are zero. With `bypass_transformer` the encoder's entries cover
            the text and the last entry, the additional layer's, covers text and regions.

        Raises:
            InputError: shapes or values that do not fit.
        """
        output_attentions = choose(output_attentions, self.config.output_attentions)
        output_hidden_states = choose(output_hidden_states, self.config.output_hidden_states)
        inputs = self.edge(
            "VisualBertModel",
            {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "token_type_ids": token_type_ids,
                "position_ids": position_ids,
                "inputs_embeds": inputs_embeds,
                "visual_embeds": visual_embeds,
                "visual_attention_mask": visual_attention_mask,
                "visual_token_type_ids": visual_token_type_ids,
                "image_text_alignment": image_text_alignment,
                "image_index": image_index,
                "positions": None if callable(positions) else positions,
            },
        )
        text_mask, visual_mask = inputs.pop("attention_mask"), inputs.pop("visual_attention_mask")
        if image_text_alignment is not None:
            aligned = inputs["image_text_alignment"]
            inputs["image_text_alignment"] = aligned[:, : inputs["visual_embeds"].shape[1]]  # B V A
        chosen = inputs.pop("positions")
        packing, text_mask, visual_mask = self.plan(
            packing, text_mask, visual_mask, inputs, output_attentions
        )
        positions = positions(text_mask, text_of(inputs)) if callable(positions) else chosen
        early = None if output_attentions or output_hidden_states else positions
        if packing is None:
            hidden_states, attentions = self.padded(
                inputs, text_mask, visual_mask, early, output_attentions
            )
        else:
            hidden_states, attentions = self.packed(inputs, packing, early, output_hidden_states)
        last = hidden_states[-1]
        if positions is not None and early is None:
            last = gather(last, positions)
        return model_output(
            last_hidden_state=last,
            pooler_output=self.pooler(first_token(last, text_mask)) if positions is None else None,
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            return_dict=return_dict,
        )

    def plan(self, packing, text_mask, visual_mask, inputs, output_attentions):
        """The packing that is passed or, where `config.packing` allows one, pays and can be
        planned, else None; and the masks, None where nothing is masked.
        """
        self.flash()
        words, features = text_of(inputs), inputs["visual_embeds"]
        late = self.config.bypass_transformer and features is not None
        if packing is not None:
            sizes = words.shape[0], words.shape[1], 0 if features is None else features.shape[1]
            if not torch.compiler.is_compiling():
                check_packing(packing, late, output_attentions, sizes)
            packing = as_packing(packing, self.device)
            if text_mask is None:
                text_mask = as_index(packing.places[:, : words.shape[1]] >= 0, self.device)
            return packing, text_mask, visual_mask
        resting = not self.training
        allowed = {"always": True, "never": False}.get(self.config.packing, resting)
        given = text_mask, visual_mask, inputs["image_index"]
        text, regions, index = seen = [values(x) for x in given]
        hidden = any(x is None and y is not None for x, y in zip(seen, given, strict=True))
        if hidden or (text_mask is None and visual_mask is None):
            return None, text_mask, visual_mask
        if all(mask is None or mask.all() for mask in (text, regions)):
            return None, None, None
        if not allowed or output_attentions:
            return None, text_mask, visual_mask
        text = np.ones(tuple(words.shape[:2]), bool) if text is None else text
        if regions is None and features is not None:
            regions = np.ones(tuple(features.shape[:2]), bool)
        if not text.any(1).all():
            return None, text_mask, visual_mask  # an example without text
        plan = plan_packing(
            text, regions, image_index=index, late_fusion=late, step=self.row_step()
        )
        if saved(plan) < LEAST_SAVED:
            return None, text_mask, visual_mask
        return as_packing(plan, self.device), text_mask, visual_mask

    def row_step(self):
        """Of the lengths of rows, as `plan_packing` takes it. Where each example can attend to
        itself, there is one row.
        """
        return None if self.flash() or self.device.type == "cpu" else STEP

    def flash(self):
        """Whether variable-length flash attention serves.

        Raises:
            UsageError: it is asked for by name and cannot.
        """
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        asked = self.config.attn_implementation
        serves = flash_serves(self.device, self.dtype, self.config.head_size, dropout)
        if asked == "flash" and not serves:
            dtype = str(self.dtype).removeprefix("torch.")
            raise UsageError(
                "attn_implementation='flash' needs a GPU of compute capability 8, float16 or "
                "bfloat16, heads of a multiple of 8 up to 256, PyTorch 2.10, and in training "
                "attention_probs_dropout_prob=0; this model is on "
                f"{self.device.type} in {dtype} with heads of {self.config.head_size}"
                f"{' and dropout' * (dropout > 0)}: pass attn_implementation='sdpa'"
            )
        return serves and asked != "eager"

    def padded(self, inputs, text_mask, visual_mask, positions, output_attentions):
        """Hidden states (B, S, H), the last one only at `positions` if there are some, and
        attentions.
        """
        text_length = text_of(inputs).shape[1]
        inputs, visual_mask = spread(inputs, visual_mask)
        embeddings = self.embeddings(**inputs)  # B S H
        visible = joint_mask(text_mask, visual_mask, embeddings, text_length)
        chosen = choose_positions(positions, embeddings.shape[1], visible)
        if not self.config.bypass_transformer or inputs["visual_embeds"] is None:
            return self.encoder(
                embeddings, visible, output_attentions=output_attentions, chosen=chosen
            )
        text_keys = None if visible is None else visible[..., :text_length]
        hidden_states, attentions = self.encoder(
            embeddings[:, :text_length], text_keys, output_attentions=output_attentions
        )
        joint = torch.concatenate([hidden_states[-1], embeddings[:, text_length:]], dim=1)
        last, probs = self.additional_layer(
            joint, visible, output_attentions=output_attentions, chosen=chosen
        )
        return (*hidden_states, last), (*attentions, probs)

    def packed(self, inputs, packing, positions, output_hidden_states):
        """What `padded` gives, zeros at padding, computed on rows of real tokens."""
        rows, is_text, text_places = packed_inputs(inputs, packing)
        embeddings = self.embeddings(**rows, is_text=is_text)  # R K H
        visible = self.kept_apart(packing)
        chosen = choose_places(positions, packing.places)
        if not self.config.bypass_transformer or is_text is None:
            hidden_states, _ = self.encoder(embeddings, visible, chosen=chosen)
            places = [packing.places] * len(hidden_states)
        else:
            text_rows, _, _ = packed_inputs(text_only(inputs), packing.text)
            hidden_states, _ = self.encoder(
                self.embeddings(**text_rows), self.kept_apart(packing.text)
            )
            places = [packing.text.places] * len(hidden_states) + [packing.places]
            text = take(hidden_states[-1], take(packing.text.places, text_places).clip(0))
            joint = torch.where(is_text[..., None], text, embeddings)  # R K H
            last, _ = self.additional_layer(joint, visible, chosen=chosen)
            hidden_states = (*hidden_states, last)
        if positions is not None:
            there = packing.places.gather(1, positions) >= 0  # B E
            return (torch.where(there[..., None], hidden_states[-1], 0),), ()
        wanted = len(hidden_states) if output_hidden_states else 1
        pairs = zip(hidden_states[-wanted:], places[-wanted:], strict=True)
        return tuple(unpack(x, where) for x, where in pairs), ()

    def kept_apart(self, packing):
        """What keeps the examples in the rows apart: a mask (R, 1, K, K). Where each example can
        attend to itself, it is where they begin.
        """
        flash = self.flash()
        if flash or (self.row_step() is None and not torch.compiler.is_compiling()):
            return make_stretches(packing, flash)
        length = packing.places.shape[1]
        examples = packing.source.div(length, rounding_mode="floor")  # R K
        return (examples[:, :, None] == examples[:, None, :])[:, None]


class VisualBertForPreTraining(PreTrainedModel):
    """VisualBERT with masked language modelling and sentence-image match (paper section 3.3)."""

    architecture = "VisualBertForPreTraining"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.visual_bert = VisualBertModel(config, seed=None)
        self.cls = PreTrainingHeads(config)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Array | None = None,
        sentence_image_labels: Array | None = None,
    ) -> ModelOutput:
        """Run the model and, with labels, its pretraining losses; the other arguments are those of
        `VisualBertModel`.

        Args:
            labels: (B, T) or (B, T+V) word-piece ids to be predicted; -100 and -1 are ignored.
            sentence_image_labels: (B,) 1 where the text belongs to the image, 0 where it is random
                (the original's polarity; transformers documents the opposite).

        Returns:
            `prediction_logits` (B, S, W), `seq_relationship_logits` (B, 2), and `loss`, the sum of
            the losses whose labels were given. With `config.sparse_prediction` and labels, words
            are predicted where there is a label alone, for the loss, and not returned.
        """
        match, labelled = sentence_image_labels, None

        def first_and_labelled(text_mask, text):
            nonlocal labels, match, labelled
            regions = 0 if visual_embeds is None else visual_embeds.shape[1]
            sizes = {"B": text.shape[0], "T": text.shape[1], "V": regions}
            given = {"labels": labels, "sentence_image_labels": match}
            labels, match = self.edge(self.architecture, given, **sizes).values()
            if labels is None or not self.config.sparse_prediction:
                return None
            labelled = self.label_positions(labels, packing)  # B E
            return torch.concatenate([first_position(text_mask, text), labelled.clip(0)], dim=1)

        outputs = self.visual_bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            visual_embeds,
            visual_attention_mask,
            visual_token_type_ids,
            image_text_alignment,
            image_index,
            packing,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            positions=first_and_labelled,
        )
        sequence = outputs.last_hidden_state
        if labelled is None:
            pooled = outputs.pooler_output
        else:
            pooled, sequence = self.visual_bert.pooler(sequence[:, 0]), sequence[:, 1:]
            known: Any = labels
            picked = known.gather(1, labelled.clip(0))
            labels = torch.where(labelled >= 0, picked, -1)  # B E
        word_table = self.visual_bert.embeddings.word_embeddings.weight
        prediction_logits, match_logits = self.cls(sequence, pooled, word_table)
        losses = []
        if labels is not None:
            losses.append(cross_entropy(prediction_logits[:, : labels.shape[1]], labels))
        if match is not None:
            losses.append(cross_entropy(match_logits, match.reshape(-1)))
        return model_output(
            loss=sum(losses) if losses else None,
            prediction_logits=prediction_logits if labelled is None else None,
            seq_relationship_logits=match_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            return_dict=return_dict,
        )

    def label_positions(self, labels, packing):
        """Positions (B, E) with a label, -1 behind them: as planned, or as the labels show, or all
        that labels cover.
        """
        if packing is not None and packing.labelled is not None:
            return as_index(packing.labelled, self.device)
        seen = values(labels)
        if seen is not None:
            return as_index(labelled_positions(seen), self.device)
        return torch.arange(labels.shape[1], device=self.device).expand(labels.shape[0], -1)


class VisualBertForMultipleChoice(PreTrainedModel):
    """VisualBERT that picks one of several texts for an image (VCR, paper section 4.2)."""

    architecture = "VisualBertForMultipleChoice"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.visual_bert = VisualBertModel(config, seed=None)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.cls = Linear(config.hidden_size, 1)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Array | None = None,
    ) -> ModelOutput:
        """Score each choice; the other arguments are those of `VisualBertModel`. Text inputs carry
        a choice axis, (B, C, T); region inputs may.

        Args:
            labels: (B,) the right choice; -100 and -1 are ignored.

        Returns:
            `logits` (B, C), and `loss` with labels. Hidden states and attentions are (B·C, …).
        """
        text = require(self.architecture, input_ids, inputs_embeds)
        batch, choices = text.shape[:2]
        inputs = flatten_choices(
            (batch, choices),
            lambda x: torch.as_tensor(x)[:, None].expand(x.shape[0], choices, *x.shape[1:]),
            lambda x: x.reshape(-1, *x.shape[2:]),
            torch.arange(batch, device=self.device),
            image_index,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            visual_embeds=visual_embeds,
            visual_attention_mask=visual_attention_mask,
            visual_token_type_ids=visual_token_type_ids,
            image_text_alignment=image_text_alignment,
        )
        outputs = self.visual_bert(
            **inputs,
            packing=packing,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            positions=first_position,
        )
        pooled = self.visual_bert.pooler(outputs.last_hidden_state[:, 0])  # B·C H
        (labels,) = self.edge(self.architecture, {"labels": labels}, B=batch, C=choices).values()
        logits = self.cls(self.dropout(pooled)).reshape(-1, choices)
        return model_output(
            loss=None if labels is None else cross_entropy(logits, labels.reshape(-1)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            return_dict=return_dict,
        )


class VisualBertForQuestionAnswering(PreTrainedModel):
    """VisualBERT that chooses an answer from a fixed vocabulary (VQA, paper section 4.1)."""

    architecture = "VisualBertForQuestionAnswering"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.visual_bert = VisualBertModel(config, seed=None)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.cls = classifier(config)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Array | None = None,
    ) -> ModelOutput:
        """Score each answer from the second-last real token, `[MASK]` in `[CLS] question ? [MASK]
        [SEP]`; the other arguments are those of `VisualBertModel`.

        Args:
            labels: (B, L) soft targets, one score for each answer.

        Returns:
            `logits` (B, L), raw with or without labels, and `loss` with labels: the
            Kullback-Leibler divergence summed over answers, averaged over the batch.
        """
        outputs = self.visual_bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            visual_embeds,
            visual_attention_mask,
            visual_token_type_ids,
            image_text_alignment,
            image_index,
            packing,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            positions=answer_position,
        )
        answer = outputs.last_hidden_state[:, 0]
        (labels,) = self.edge(self.architecture, {"labels": labels}, B=answer.shape[0]).values()
        logits = self.cls(self.dropout(answer))
        return model_output(
            loss=None if labels is None else divergence(logits, labels.reshape(logits.shape)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            return_dict=return_dict,
        )


class VisualBertForVisualReasoning(PreTrainedModel):
    """VisualBERT that judges a statement about a pair of images (NLVR2, paper section 4.3)."""

    architecture = "VisualBertForVisualReasoning"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.visual_bert = VisualBertModel(config, seed=None)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.cls = classifier(config)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Array | None = None,
    ) -> ModelOutput:
        """Classify text and regions from the pooled first position; the other arguments are those
        of `VisualBertModel`.

        Args:
            labels: (B,) classes; -100 and -1 are ignored.

        Returns:
            `logits` (B, L), and `loss` with labels.
        """
        outputs = self.visual_bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            visual_embeds,
            visual_attention_mask,
            visual_token_type_ids,
            image_text_alignment,
            image_index,
            packing,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            positions=first_position,
        )
        pooled = self.visual_bert.pooler(outputs.last_hidden_state[:, 0])  # B H
        (labels,) = self.edge(self.architecture, {"labels": labels}, B=pooled.shape[0]).values()
        logits = self.cls(self.dropout(pooled))
        return model_output(
            loss=None if labels is None else cross_entropy(logits, labels.reshape(-1)),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            return_dict=return_dict,
        )


class VisualBertForRegionToPhraseAlignment(PreTrainedModel):
    """VisualBERT that finds the regions of phrases (Flickr30K Entities, paper section 4.4).

    The language-model head is part of the checkpoints and not of the computation.
    """

    architecture = "VisualBertForRegionToPhraseAlignment"

    def __init__(self, config: VisualBertConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = checked(config)
        self.visual_bert = VisualBertModel(config, seed=None)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.cls = PreTrainingHeads(config)
        self.attention = RegionToPhraseAttention(config)
        self.initialise(seed)

    def forward(
        self,
        input_ids: Array | None = None,
        attention_mask: Array | None = None,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        inputs_embeds: Array | None = None,
        visual_embeds: Array | None = None,
        visual_attention_mask: Array | None = None,
        visual_token_type_ids: Array | None = None,
        image_text_alignment: Array | None = None,
        image_index: Array | None = None,
        packing: Packing | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        region_to_phrase_position: Array | None = None,
        labels: Array | None = None,
    ) -> ModelOutput:
        """Score every region for every phrase; the other arguments are those of `VisualBertModel`.

        Args:
            region_to_phrase_position: (B, E) text position of each phrase, its last word piece in
                the original; -1 = padding, whose scores mean nothing.
            labels: (B, E, V) target distribution over regions, zeros where a phrase has none.

        Returns:
            `logits` (B, E, V), hugely negative where a region is masked, and `loss` with labels:
            the Kullback-Leibler divergence summed over phrases and regions, averaged over the
            batch.
        """
        phrases_at: Any = require(
            self.architecture, region_to_phrase_position=region_to_phrase_position
        )
        features: Any = require(self.architecture, visual_embeds=visual_embeds)

        def phrases_and_regions(text_mask, text):
            nonlocal labels
            positions, labels = self.edge(
                self.architecture,
                {"region_to_phrase_position": region_to_phrase_position, "labels": labels},
                B=text.shape[0],
                T=text.shape[1],
                V=features.shape[1],
            ).values()
            count = features.shape[1]
            phrases = torch.where(positions >= 0, positions, 0)  # B E
            regions = torch.arange(count, device=self.device) + text.shape[1]
            return torch.concatenate([phrases, regions.expand(text.shape[0], -1)], dim=1)

        outputs = self.visual_bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            visual_embeds,
            visual_attention_mask,
            visual_token_type_ids,
            image_text_alignment,
            image_index,
            packing,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            positions=phrases_and_regions,
        )
        sequence = outputs.last_hidden_state
        split = phrases_at.shape[1]
        phrases, regions = sequence[:, :split], sequence[:, split:]  # B E H, B V H
        visible = visual_attention_mask
        if visible is None and packing is not None:
            visible = as_packing(packing, self.device).places
            visible = visible[:, visible.shape[1] - regions.shape[1] :] >= 0
        elif visible is not None:
            visible = as_tensor(visible, self.device, False, self.dtype) != 0
            if image_index is not None:
                visible = visible[as_index(image_index, self.device)]
        logits = self.attention(phrases, regions, visible)
        return model_output(
            loss=None if labels is None else divergence(logits, labels),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            return_dict=return_dict,
        )


def classifier(config: VisualBertConfig) -> Any:
    """The head of `num_labels` classes that `config.classifier_head` asks for."""
    if config.classifier_head == "mlp":
        return ClassificationHead(config)
    return Linear(config.hidden_size, config.num_labels)


def mask_bias(visible, dtype):
    """0 where visible; elsewhere so low that it vanishes in a softmax, yet adds without overflow.

    A row with nothing visible gives the mean of all values, as transformers' plain attention does.
    """
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min / 2)


def joint_mask(text_mask, visual_mask, embeddings, text_length):
    """(B, 1, 1, S), true where there is a token or a region; None where nothing is masked."""
    if text_mask is None and visual_mask is None:
        return None
    ones = torch.ones_like(embeddings[:, :, 0], dtype=torch.bool)  # B S
    text_mask = ones[:, :text_length] if text_mask is None else text_mask != 0
    visual_mask = ones[:, text_length:] if visual_mask is None else visual_mask != 0
    return torch.concatenate([text_mask, visual_mask], dim=1)[:, None, None, :]


class Chosen(NamedTuple):
    """The only positions at which a layer's output is asked for."""

    positions: Array  # (B, E) flat index into the layer's input
    places: Array | None  # (B, S) where its keys lie, if they are not (B, S) already
    visible: Array | None  # (B, 1, 1, S) which keys are there


def choose_positions(positions, length, visible):
    """`Chosen` for (B, E) positions of a padded batch."""
    if positions is None:
        return None
    examples = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return Chosen(examples * length + positions, None, visible)


def choose_places(positions, places):
    """`Chosen` for (B, E) positions of the batch that was packed."""
    if positions is None:
        return None
    asked = places.gather(1, positions).clip(0)
    return Chosen(asked, places.clip(0), (places >= 0)[:, None, None])


def packed_inputs(inputs, packing):
    """Inputs in rows, (R, K, …), for a packing of text and regions or of text alone; which
    positions are text, None for text alone; and each position's flat place in the text (B, T).
    """
    text, features = text_of(inputs), inputs["visual_embeds"]
    text_length, length = text.shape[1], packing.places.shape[1]
    source = packing.source.clip(0)  # R K
    example, position = source.div(length, rounding_mode="floor"), source % length
    is_text = position < text_length
    at_text = example * text_length + torch.where(is_text, position, 0)
    rows = {k: taken(inputs[k], at_text) for k in ("input_ids", "token_type_ids", "inputs_embeds")}
    given = inputs["position_ids"]
    rows["position_ids"] = (
        torch.where(is_text, position, 0)
        if given is None
        else take(given.expand(text.shape[0], -1), at_text)
    )
    if features is None:
        return rows, None, at_text
    index, region = inputs["image_index"], torch.where(is_text, 0, position - text_length)
    at_region = (example if index is None else index[example]) * features.shape[1] + region
    rows["visual_embeds"] = features if index is not None else take(features, at_region)
    rows["region_index"] = None if index is None else at_region
    rows["visual_token_type_ids"] = taken(inputs["visual_token_type_ids"], at_region)
    at_pair = example * features.shape[1] + region
    rows["image_text_alignment"] = taken(inputs["image_text_alignment"], at_pair)
    return rows, is_text, at_text


def spread(inputs, visual_mask):
    """Inputs of a padded batch, and its mask of regions, with one row for each text."""
    inputs = {**inputs}
    index = inputs.pop("image_index")
    if index is None:
        return inputs, visual_mask
    count = inputs["visual_embeds"].shape[1]
    at_region = index[:, None] * count + torch.arange(count, device=index.device)  # B V
    inputs["region_index"] = at_region
    inputs["visual_token_type_ids"] = taken(inputs["visual_token_type_ids"], at_region)
    return inputs, taken(visual_mask, at_region)


def text_of(inputs):
    """(B, T) ids or (B, T, H) embeddings, whichever was passed."""
    return inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]


def text_only(inputs):
    """The inputs without regions."""
    regions = ("visual_embeds", "visual_token_type_ids", "image_text_alignment", "image_index")
    return {**inputs, **dict.fromkeys(regions)}


def take(x, index):
    """(…, H): x of (B, S, H), or its entries of (B, S), at a flat index (…) into (B, S)."""
    found = x.flatten(0, 1).index_select(0, index.reshape(-1))
    return found.reshape(*index.shape, *x.shape[2:])


def taken(x, index):
    """`take`, or None of None."""
    return None if x is None else take(x, index)


def unpack(x, places):
    """(B, S, H) of rows (R, K, H): zeros where there is no place."""
    return torch.where((places >= 0)[..., None], take(x, places.clip(0)), 0)


def first_position(text_mask, text):
    """(B, 1): the first position that is no padding."""
    if text_mask is None:
        return torch.zeros_like(text[:, :1] if text.ndim == 2 else text[:, :1, 0], dtype=torch.long)
    return (text_mask != 0).long().argmax(1)[:, None]


def answer_position(text_mask, text):
    """(B, 1): the second-last position that is no padding, which may stand on either side."""
    if text_mask is None:
        check_answer_position(text.shape[1], None)
        return first_position(None, text) + text.shape[1] - 2
    if not torch.compiler.is_compiling():
        check_answer_position(text.shape[1], look(text_mask))
    counts = text_mask.cumsum(1)
    return (counts == counts[:, -1:] - 1).long().argmax(1)[:, None]


def first_token(hidden_states, text_mask):
    """(B, H): the first position that is no padding."""
    if text_mask is None:
        return hidden_states[:, 0]
    return gather(hidden_states, first_position(text_mask, hidden_states))[:, 0]


def gather(hidden_states, positions):
    """(B, E, H): the hidden states at (B, E) positions."""
    index = positions[..., None].expand(-1, -1, hidden_states.shape[-1])  # B E H
    return hidden_states.gather(1, index)  # `take_along_dim` would fix the sizes in `torch.export`


def cross_entropy(logits, labels):
    """Mean over the labels that are not negative; zero where there are none."""
    valid = labels >= 0
    log_probs = torch.log_softmax(at_least_float32(logits), dim=-1)
    picked = log_probs.gather(-1, torch.where(valid, labels, 0)[..., None])[..., 0]
    return -torch.where(valid, picked, 0.0).sum() / valid.sum().clip(1)


def divergence(logits, targets):
    """Kullback-Leibler divergence of softmax(logits) from targets, summed, over the batch size."""
    log_probs = torch.log_softmax(at_least_float32(logits), dim=-1)
    targets = targets.to(log_probs.dtype)
    entropy = torch.where(
        targets > 0, targets * torch.log(torch.where(targets > 0, targets, 1.0)), 0.0
    )
    return (entropy - targets * log_probs).sum() / targets.shape[0]


def at_least_float32(x):
    """`x`, in float32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def choose(asked: bool | None, default: bool) -> bool:
    """What the call asks for, or the config's default."""
    return default if asked is None else asked


def as_tensor(x, device, floating, dtype):
    """`x` as a tensor on `device`: features in the model's type, everything else as integers."""
    if isinstance(x, np.ndarray):
        x = torch.as_tensor(x)
    return x.to(device=device, dtype=dtype if floating else torch.long)


def look(x):
    """The values as numpy, or None where reading them would wait for a device or fail."""
    if isinstance(x, np.ndarray):
        return x
    if type(x) is not torch.Tensor or x.device.type != "cpu":
        return None
    try:
        return x.detach().numpy() if x.dtype != torch.bfloat16 else None
    except RuntimeError:  # inside a function transform
        return None


def values(x):
    """The values as numpy, waiting for a device if need be; None where they cannot be had."""
    if x is None or torch.compiler.is_compiling() or type(x) is not torch.Tensor:
        return None
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return look(x.cpu())


def as_index(x, device):
    """A whole-number array as a tensor of indices."""
    return torch.as_tensor(x).to(device=device, dtype=torch.long)


def as_packing(packing, device):
    """A packing's arrays as tensors of indices."""
    if packing is None:
        return None
    *arrays, text = packing
    arrays = [None if x is None else as_index(x, device) for x in arrays]
    return Packing(*arrays, as_packing(text, device))
