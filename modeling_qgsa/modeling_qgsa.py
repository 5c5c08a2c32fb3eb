"""QGSA-SmolVLM: SmolVLM that looks only where the question points. Only the delta to SmolVLM is here.

    glance  encode the global view
    point   the selector reads question and glance: relevance, complexity, budget (m, k)
    look    encode the m most relevant tiles
    keep    score glance and tiles, keep k visual tokens
    splice  take the kept positions together, each at its original position id
    answer  the stock text model, the stock generate()

`selection="after_encoder"` looks at every tile, `"blocks"` at single blocks of the chosen tiles; `"dense"` hands
everything to the stock model.
"""

from dataclasses import dataclass

import torch
from transformers import SmolVLMForConditionalGeneration, SmolVLMModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMBaseModelOutputWithPast, SmolVLMCausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_qgsa import Budget, QGSAConfig, pop_budget
from .conversion_qgsa import config_of_dense, copy_dense_weights, load_dense
from .generations_qgsa import AdvancingPositions, mend_patch_positions
from .prompt_qgsa import Prompt, read_question, refuse_decoding, refuse_placeholders
from .relaxation_qgsa import RelaxedPrefill
from .selection_qgsa import (
    Glance,
    QGSASelection,
    SelectedInputs,
    VisualLayout,
    complexity_at,
    describe_selection,
    keep_top_k,
    positions_to_keep,
    rank_tokens,
    read_layout,
    relevance_of_tokens,
    scores_of_tiles,
    splice,
    tile_relevance,
    to_images,
    to_tiles,
    token_cells,
)
from .selector_qgsa import ComplexityEstimator, QuestionGuidedSelector
from .vision_qgsa import PartialVision, Views, VisualCache, check_views


@dataclass
class QGSABaseModelOutputWithPast(SmolVLMBaseModelOutputWithPast):
    """SmolVLM's output, the `selection` and the `glance` it was made from (None where nothing was selected).

    `image_hidden_states` are the features of the encoded tiles, `(n, P, D)`; of "blocks", 0 where none was chosen.
    """

    selection: QGSASelection | None = None
    glance: Glance | None = None


@dataclass
class QGSACausalLMOutputWithPast(SmolVLMCausalLMOutputWithPast):
    """SmolVLM's output, and the `selection` it was made from; logits are those of `selection.keep_indices`.

    In training also the `glance`, whose relevance and complexity logits carry gradients, for losses on them.
    """

    selection: QGSASelection | None = None
    glance: Glance | None = None


class QGSASmolVLMModel(RelaxedPrefill, PartialVision, SmolVLMModel):
    """SmolVLM without its language head, with the selector."""

    config_class = QGSAConfig
    _auto_class = "AutoModel"

    def __init__(self, config: QGSAConfig):
        super().__init__(config)
        config.check_tiles()
        mend_patch_positions(self.vision_model)
        width = config.text_config.hidden_size
        self.selector = QuestionGuidedSelector(
            width,
            config.tokens_per_tile,
            config.selector_hidden_size,
            config.selector_layers,
            config.selector_heads,
            config.max_question_tokens,
        )
        self.complexity_estimator = ComplexityEstimator(width, config.selector_hidden_size, config.complexity_levels)
        self.post_init()

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QuestionGuidedSelector):
            module.init_weights()

    def glance_and_point(self, prompt: Prompt, views: Views, question_mask=None) -> Glance:
        """Steps 1 to 3: read the layout, encode the global views, ask the selector."""
        config = self.config
        prompt.check(config.text_config.vocab_size)
        layout = read_layout(
            prompt.input_ids,
            config.tokens_per_tile,
            config.image_token_id,
            config.global_image_token_id,
            config.tile_token_ids,
        )
        check_views(views, layout, config.vision_config.image_size)
        question_mask = read_question(prompt, layout, config.end_of_utterance_token_id, question_mask)
        glance = self.encode_tiles(views, layout, layout.is_global)
        question = self.get_input_embeddings()(prompt.input_ids)[layout.image_sample]
        relevance, question_state = self.selector(question, question_mask, glance)
        levels = self.complexity_estimator(question, question_mask, glance)
        if not self.training and not relevance.isfinite().all():  # in training the loss scaler skips such a step
            raise ValueError("relevance holds NaN or infinite values: so do weights, or features of the glance")
        complexity = complexity_at(levels.detach(), config.complexity_quantile)
        return Glance(layout, glance, relevance, question_state, question_mask, levels, complexity)

    def choose_tiles(self, glance: Glance, m: torch.Tensor, scores: torch.Tensor | None) -> torch.BoolTensor:
        """The m best high-resolution tiles of every image, and its global view: `(T,)` bool."""
        layout = glance.layout
        scores = tile_relevance(glance.relevance.exp(), layout) if scores is None else scores.amax(1)
        keep = keep_top_k(to_images(scores, layout, 0), to_images(~layout.is_global, layout, False), m)
        return keep[layout.tile_image, layout.tile_slot] | layout.is_global

    def choose(self, selection: str, glance: Glance, m, k, scores: torch.Tensor | None = None) -> torch.BoolTensor:
        """The visual tokens to look at, `(T, P)` bool: all those of the global views and of the chosen tiles, of which
        "blocks" takes the k of each image that have the highest relevance (or `scores`, `(T, P)`).
        """
        layout = glance.layout
        tiles = torch.ones_like(layout.is_global)
        if selection != "after_encoder":
            tiles = self.choose_tiles(glance, m, scores)
        looked = tiles[:, None].expand(-1, layout.tokens_per_tile)
        if selection != "blocks":
            return looked
        scores = relevance_of_tokens(glance.relevance, layout) if scores is None else scores
        is_global = layout.is_global[:, None]
        return to_tiles(keep_top_k(*rank_tokens(scores, looked & ~is_global, layout), k), layout) | is_global

    def look(self, glance: Glance, views: Views, looked: torch.BoolTensor) -> torch.Tensor:
        """Step 4: features of the tiles with tokens that are `looked` at, `(n, P, D)`; 0 at tokens that are not.

        The global views among them are not encoded again. Tiles of which only some tokens are looked at are encoded
        in blocks.
        """
        layout = glance.layout
        features = glance.features.new_zeros(*looked.shape, glance.features.shape[-1])
        features = features.index_put((layout.is_global,), glance.features)
        whole, tiles = looked.all(1) & ~layout.is_global, looked.any(1)
        if whole.any():
            features = features.index_put((whole,), self.encode_tiles(views, layout, whole))
        part = tiles & ~looked.all(1)
        if part.any():
            where = (looked & part[:, None]).nonzero(as_tuple=True)
            features = features.index_put(where, self.encode_blocks(views, layout, looked, part))
        return features[tiles]

    def score_tokens(self, glance: Glance, features: torch.Tensor, tiles: torch.BoolTensor) -> torch.Tensor:
        """The selector's scores of the visual tokens of the chosen `tiles`, `(n, P)`."""
        layout, image = glance.layout, glance.layout.tile_image[tiles]
        places = glance.relevance[image].gather(1, token_cells(layout)[tiles])
        return places + self.selector.match_tokens(glance.question_state[image], features, layout.is_global[tiles])

    def keep(self, glance: Glance, scores: torch.Tensor, looked: torch.BoolTensor, k) -> torch.BoolTensor:
        """Step 5: the k best visual tokens of every image among those `looked` at, `(T, P)` bool.

        `scores` `(n, P)` are those of the tiles with tokens that were looked at.
        """
        scores = scores.new_zeros(looked.shape).index_put((looked.any(1),), scores)
        return to_tiles(keep_top_k(*rank_tokens(scores, looked, glance.layout), k), glance.layout)

    def embed(self, input_ids, layout: VisualLayout, features: torch.Tensor, tiles: torch.BoolTensor) -> torch.Tensor:
        """Word embeddings with the features of the encoded `tiles` at their placeholders, `(B, L, D)`."""
        embeds = self.get_input_embeddings()(input_ids)
        where = (layout.tile_sample[tiles][:, None], layout.token_positions[tiles])
        return embeds.index_put(where, features.to(embeds.dtype))

    def select_inputs(
        self, budget: Budget, prompt: Prompt, views: Views, question_mask=None, scores=None
    ) -> SelectedInputs:
        """The whole prefill, steps 1 to 6. `scores` `(B, N)` replace those of the selector."""
        glance = self.glance_and_point(prompt, views, question_mask)
        layout, (m, k) = glance.layout, budget.resolve(glance.complexity)
        given = None if scores is None else scores_of_tiles(scores, layout)

        looked = self.choose(budget.selection, glance, m, k, given)
        features, tiles = self.look(glance, views, looked), looked.any(1)
        token_scores = self.score_tokens(glance, features, tiles) if given is None else given[tiles]
        kept = self.keep(glance, token_scores, looked, k)

        embeds = self.embed(prompt.input_ids, layout, features, tiles)
        (embeds, mask, positions), keep_indices = splice(
            positions_to_keep(prompt.attention_mask, layout, kept),
            (embeds, 0.0),
            (prompt.attention_mask, 0),
            (prompt.position_ids, 0),
        )
        selection = describe_selection(layout, kept, tiles, glance.relevance, glance.complexity, keep_indices)
        return SelectedInputs(embeds, mask, positions, selection, glance, features)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        visual_token_scores: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        lazy_tiles=None,
        visual_cache: VisualCache | None = None,
        gumbel_temperature: float | None = None,
        selection: str | None = None,
        **kwargs,
    ) -> QGSABaseModelOutputWithPast:
        """As [`QGSASmolVLMForConditionalGeneration.forward`]; `labels` are only hidden from the selector here."""
        budget = Budget.of(self.config, selection=selection, **pop_budget(kwargs))
        views = Views(pixel_values, pixel_attention_mask, image_hidden_states, lazy_tiles, visual_cache)
        if budget.selection == "dense":
            views.refuse_dense()
            if pixel_values is not None and self.is_tuned:
                inputs_embeds = self.embed_dense(input_ids, pixel_values, pixel_attention_mask)
                input_ids = pixel_values = pixel_attention_mask = None
        if views.are_none or inputs_embeds is not None or budget.selection == "dense":
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_attention_mask=pixel_attention_mask,
                **kwargs,
            )
            return QGSABaseModelOutputWithPast(**outputs)

        prompt = Prompt.of(input_ids, attention_mask, position_ids, labels)
        if self.training and visual_token_scores is None:
            temperature = self.config.gumbel_temperature if gumbel_temperature is None else gumbel_temperature
            inputs = self.relax_inputs(budget, prompt, views, question_mask, temperature)
        else:
            inputs = self.select_inputs(budget, prompt, views, question_mask, visual_token_scores)
        outputs = super().forward(
            inputs_embeds=inputs.inputs_embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return QGSABaseModelOutputWithPast(
            **{
                **outputs,
                "image_hidden_states": inputs.features,
                "selection": inputs.selection,
                "glance": inputs.glance,
            }
        )


class QGSASmolVLMForConditionalGeneration(AdvancingPositions, SmolVLMForConditionalGeneration):
    """SmolVLM that looks only where the question points.

    ```python
    model = QGSASmolVLMForConditionalGeneration.from_dense("HuggingFaceTB/SmolVLM-256M-Instruct")
    ids = model.generate(**inputs, max_new_tokens=20)
    ```
    """

    config_class = QGSAConfig
    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: QGSAConfig):
        super().__init__(config)
        self.model = QGSASmolVLMModel(config)
        self.post_init()

    @classmethod
    def from_dense(cls, base, tokenizer=None, **fields) -> "QGSASmolVLMForConditionalGeneration":
        """Make a QGSA model of a dense one, with every weight of it and a fresh selector.

        Args:
            base: Hub id, local folder or model of an idefics3 or smolvlm checkpoint.
            tokenizer: where the ids of the marker tokens are read; that of `base` where it is an id or a folder. With
                a model and no tokenizer the ids are the published ones, or those given in `fields`.
            fields: fields of [`QGSAConfig`], such as `max_tiles=2`.

        Raises ValueError for a checkpoint of another architecture, naming it, or where a weight is without its place.
        """
        dense, tokenizer = load_dense(base, tokenizer)
        config = config_of_dense(dense.config, tokenizer, **fields)
        model = cls._from_config(config, attn_implementation=dense.config._attn_implementation, dtype=dense.dtype)
        copy_dense_weights(dense, model)
        model.generation_config = dense.generation_config
        return model.to(dense.device).train(dense.training)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        question_mask: torch.Tensor | None = None,
        visual_token_scores: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        lazy_tiles=None,
        visual_cache: VisualCache | None = None,
        gumbel_temperature: float | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        selection: str | None = None,
        **kwargs,
    ) -> QGSACausalLMOutputWithPast:
        """SmolVLM's forward over what the question selects.

        In training mode the selection is relaxed (every tile is encoded, random budgets, a gate on the attention
        keys, see [`QGSASmolVLMModel.relax_inputs`]); otherwise it is hard. Logits are those of the positions that are
        left (`selection.keep_indices`, padded on the left), and labels follow them.

        Args (those that SmolVLM has not):
            question_mask: `(B, L)` bool or int, the tokens of the question; by default the last turn of the user.
            visual_token_scores: `(B, N)` float, scores of all visual tokens in prompt order that replace the
                selector's. A tile's score is the highest of its tokens.
            image_hidden_states: `(T, P, D)`, the features of all tiles of the batch in prompt order, in the place of
                `pixel_values` where they are known; not for "dense".
            lazy_tiles: what the processor gives with `lazy_tiles=True` beside the pixels of the global views: the
                other tiles are cut when they are looked at.
            visual_cache: a [`VisualCache`] in which tiles are looked up, and what is new is kept; inference only.
            gumbel_temperature: of the relaxed selection; `config.gumbel_temperature` by default.
            selection, min_visual_tokens, max_visual_tokens, min_tiles, max_tiles: override the config for this call.

        Raises ValueError where prompt, pixels, scores or budgets do not fit together, naming both numbers.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            labels=labels,
            question_mask=question_mask,
            visual_token_scores=visual_token_scores,
            image_hidden_states=image_hidden_states,
            lazy_tiles=lazy_tiles,
            visual_cache=visual_cache,
            gumbel_temperature=gumbel_temperature,
            selection=selection,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])

        loss = None
        if labels is not None:
            if outputs.selection is not None:
                indices = outputs.selection.keep_indices
                labels = labels.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -100)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return QGSACausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            selection=outputs.selection,
            glance=outputs.glance if self.training else None,
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of the text model, also where the encoder has one of its own: what a checkpoint is loaded in again."""
        return self.model.text_model.dtype

    def tune(self, vision_dtype: torch.dtype | None = None, tiles_per_step: int | None = None):
        """Set what is a matter of the machine: the precision of the encoder, and how many tiles it takes at once.

        On CPUs with bfloat16 instructions `model.tune(torch.bfloat16)` halves the time of the encoder; the text model
        is left as it is. `training/benchmark.py` measures both. "dense" is then stock but for rounding. A saved
        checkpoint is loaded again in the text model's dtype throughout, so tune after loading.

        Args:
            vision_dtype: of encoder and connector, converted in place; None leaves it.
            tiles_per_step: tiles encoded at once, `config.tiles_per_step`; None leaves it.

        Returns the model. Raises ValueError where `tiles_per_step` is below 1.
        """
        if tiles_per_step is not None and not (isinstance(tiles_per_step, int) and tiles_per_step >= 1):
            raise ValueError(f"tiles_per_step is {tiles_per_step}: it has to be at least 1")
        if vision_dtype is not None:
            self.model.vision_model.to(vision_dtype)
            self.model.connector.to(vision_dtype)
        if tiles_per_step is not None:
            self.config.tiles_per_step = tiles_per_step
        return self

    @torch.no_grad()
    def select(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        question_mask: torch.Tensor | None = None,
        visual_token_scores: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        lazy_tiles=None,
        visual_cache: VisualCache | None = None,
        **overrides,
    ) -> QGSASelection:
        """Select without answering; arguments as in `forward`. Raises ValueError for "dense", which keeps all."""
        budget = Budget.of(self.config, **overrides)
        if budget.selection == "dense":
            raise ValueError('selection is "dense": there is nothing to select, choose one of the other variants')
        prompt = Prompt.of(input_ids, attention_mask, position_ids, labels)
        views = Views(pixel_values, pixel_attention_mask, None, lazy_tiles, visual_cache)
        return self.model.select_inputs(budget, prompt, views, question_mask, visual_token_scores).selection

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        question_mask: torch.Tensor | None = None,
        visual_token_scores: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        lazy_tiles=None,
        visual_cache: VisualCache | None = None,
        selection: str | None = None,
        **kwargs,
    ):
        """Stock `generate` over what the question selects: returns prompt ids and new ids, as the stock model does.

        The selection is made once, before the prefill; with `return_dict_in_generate=True` the output carries it as
        `selection`. Arguments as in `forward` and in `GenerationMixin.generate`.

        Raises ValueError as `forward` does, for image placeholders without an image, and for ways to decode that read
        the whole prompt (assisted, prompt lookup, prefill in chunks), except for "dense".
        """
        input_ids = inputs if input_ids is None else input_ids
        budget = Budget.of(self.config, selection=selection, **pop_budget(kwargs))
        views = Views(pixel_values, pixel_attention_mask, image_hidden_states, lazy_tiles, visual_cache)
        if budget.selection == "dense":
            views.refuse_dense()
        elif views.are_none and kwargs.get("past_key_values") is None and kwargs.get("inputs_embeds") is None:
            refuse_placeholders(input_ids, self.config.image_token_id)
        if views.are_none or kwargs.get("inputs_embeds") is not None or budget.selection == "dense":
            given = {
                "pixel_values": pixel_values,
                "pixel_attention_mask": pixel_attention_mask,
                "position_ids": position_ids,
            }
            given = {name: value for name, value in given.items() if value is not None}
            return super().generate(input_ids, attention_mask=attention_mask, selection="dense", **given, **kwargs)
        refuse_decoding(kwargs, kwargs.get("generation_config") or self.generation_config)
        selected = self.model.select_inputs(
            budget,
            Prompt.of(input_ids, attention_mask, position_ids),
            views,
            question_mask,
            visual_token_scores,
        )
        output = super().generate(
            input_ids,
            inputs_embeds=selected.inputs_embeds,
            attention_mask=selected.attention_mask,
            position_ids=selected.position_ids,
            **kwargs,
        )
        if isinstance(output, ModelOutput):
            output["selection"] = selected.selection
        return output

    def _prepare_generated_length(self, *, model_input_name, input_ids_length, **kwargs):
        # Lengths count the ids of the whole prompt, which are returned in front, and not what was kept of them.
        name = "input_ids" if input_ids_length else model_input_name
        return super()._prepare_generated_length(model_input_name=name, input_ids_length=input_ids_length, **kwargs)


__all__ = ["QGSASmolVLMForConditionalGeneration", "QGSASmolVLMModel"]
