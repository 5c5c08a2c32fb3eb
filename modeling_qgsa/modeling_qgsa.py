"""QGSA-SmolVLM: SmolVLM that looks only where the question points. Only the delta to SmolVLM is here.

    glance  encode the global view
    point   the selector reads question and glance: relevance, complexity, budget (m, k)
    look    encode the m most relevant tiles
    keep    score glance and tiles, keep k visual tokens
    splice  take the kept positions together, each at its original position id
    answer  the stock text model, the stock generate()

`selection="after_encoder"` looks at every tile; `selection="dense"` hands everything to the stock model.
"""

from dataclasses import dataclass

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    SmolVLMForConditionalGeneration,
    SmolVLMModel,
)
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMBaseModelOutputWithPast, SmolVLMCausalLMOutputWithPast
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_qgsa import Budget, QGSAConfig, check_architecture, marker_ids, pop_budget
from .selection_qgsa import (
    Glance,
    Prompt,
    QGSASelection,
    SelectedInputs,
    Views,
    VisualLayout,
    check_views,
    complexity_at,
    describe_selection,
    find_question,
    gated_attention_mask,
    gates_of_positions,
    keep_top_k,
    positions_to_keep,
    rank_tokens,
    read_layout,
    relaxed_top_k,
    scores_of_tiles,
    splice,
    tile_relevance,
    to_images,
    to_tiles,
    token_cells,
)
from .selector_qgsa import ComplexityEstimator, QuestionGuidedSelector


@dataclass
class QGSABaseModelOutputWithPast(SmolVLMBaseModelOutputWithPast):
    """SmolVLM's output, the `selection` and the `glance` it was made from (None where nothing was selected).

    `image_hidden_states` are the features of the encoded tiles, `(n, P, D)`.
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


class QGSASmolVLMModel(SmolVLMModel):
    """SmolVLM without its language head, with the selector."""

    config_class = QGSAConfig
    _auto_class = "AutoModel"

    def __init__(self, config: QGSAConfig):
        super().__init__(config)
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

    def encode_tiles(self, views: Views, layout: VisualLayout, tiles: torch.BoolTensor) -> torch.Tensor:
        """Encode the tiles chosen by `tiles` (`(T,)` bool) and no other: `(n, P, D)`."""
        if views.features is not None:
            return views.features[tiles]
        where = (layout.tile_sample[tiles], layout.tile_ordinal[tiles])
        pixel_mask = None if views.pixel_attention_mask is None else views.pixel_attention_mask[where][None]
        features = self.get_image_features(views.pixel_values[where][None], pixel_mask, return_dict=True).pooler_output
        return torch.cat(list(features)).view(-1, layout.tokens_per_tile, self.config.text_config.hidden_size)

    def glance_and_point(self, prompt: Prompt, views: Views, question_mask=None) -> Glance:
        """Steps 1 to 3: read the layout, encode the global views, ask the selector."""
        config = self.config
        layout = read_layout(
            prompt.input_ids,
            config.tokens_per_tile,
            config.image_token_id,
            config.global_image_token_id,
            config.tile_token_ids,
        )
        check_views(views, layout)
        readable = prompt.attention_mask.bool() & (layout.tile_of_position < 0) & (prompt.labels == -100)
        if question_mask is None:
            question_mask = find_question(prompt.input_ids, readable, config.end_of_utterance_token_id)
        question_mask = (question_mask.bool() & readable)[layout.image_sample]
        for image in (~question_mask.any(1)).nonzero()[:1, 0].tolist():
            sample = layout.image_sample[image]
            raise ValueError(
                f"sample {sample} has no question to select by: of its {prompt.input_ids.shape[1]} positions "
                f"{int((prompt.labels[sample] != -100).sum())} are labelled, and 0 are text of the question"
            )
        glance = self.encode_tiles(views, layout, layout.is_global)
        question = self.get_input_embeddings()(prompt.input_ids)[layout.image_sample]
        relevance, question_state = self.selector(question, question_mask, glance)
        levels = self.complexity_estimator(question, question_mask, glance)
        complexity = complexity_at(levels.detach(), config.complexity_quantile)
        return Glance(layout, glance, relevance, question_state, question_mask, levels, complexity)

    def choose_tiles(self, glance: Glance, m: torch.Tensor, scores: torch.Tensor | None) -> torch.BoolTensor:
        """The m best high-resolution tiles of every image, and its global view: `(T,)` bool."""
        layout = glance.layout
        scores = tile_relevance(glance.relevance.exp(), layout) if scores is None else scores.amax(1)
        keep = keep_top_k(to_images(scores, layout, 0), to_images(~layout.is_global, layout, False), m)
        return keep[layout.tile_image, layout.tile_slot] | layout.is_global

    def look(self, glance: Glance, views: Views, tiles: torch.BoolTensor) -> torch.Tensor:
        """Step 4: features of the chosen `tiles`, `(n, P, D)`; the global views among them are not encoded again."""
        layout = glance.layout
        features = glance.features.new_zeros(len(tiles), *glance.features.shape[1:])
        features = features.index_put((layout.is_global,), glance.features)
        new = tiles & ~layout.is_global
        if new.any():
            features = features.index_put((new,), self.encode_tiles(views, layout, new))
        return features[tiles]

    def score_tokens(self, glance: Glance, features: torch.Tensor, tiles: torch.BoolTensor) -> torch.Tensor:
        """The selector's scores of the visual tokens of the chosen `tiles`, `(n, P)`."""
        layout, image = glance.layout, glance.layout.tile_image[tiles]
        places = glance.relevance[image].gather(1, token_cells(layout)[tiles])
        return places + self.selector.match_tokens(glance.question_state[image], features, layout.is_global[tiles])

    def keep(self, glance: Glance, scores: torch.Tensor, tiles: torch.BoolTensor, k: torch.Tensor) -> torch.BoolTensor:
        """Step 5: the k best visual tokens of every image among those of the chosen `tiles`: `(T, P)` bool."""
        keep = keep_top_k(*rank_tokens(scores, tiles, glance.layout), k)
        return to_tiles(keep, glance.layout)

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

        tiles = torch.ones_like(layout.is_global)
        if budget.selection == "before_encoder":
            tiles = self.choose_tiles(glance, m, given)
        features = self.look(glance, views, tiles)
        kept = self.keep(
            glance, self.score_tokens(glance, features, tiles) if given is None else given[tiles], tiles, k
        )

        embeds = self.embed(prompt.input_ids, layout, features, tiles)
        (embeds, mask, positions), keep_indices = splice(
            positions_to_keep(prompt.attention_mask, layout, kept),
            (embeds, 0.0),
            (prompt.attention_mask, 0),
            (prompt.position_ids, 0),
        )
        selection = describe_selection(layout, kept, tiles, glance.relevance, glance.complexity, keep_indices)
        return SelectedInputs(embeds, mask, positions, selection, glance, features)

    def relax_inputs(
        self, budget: Budget, prompt: Prompt, views: Views, question_mask=None, temperature=1.0
    ) -> SelectedInputs:
        """The prefill in training: random budgets, and a gate on the attention keys in the place of top-k.

        Each image gets a budget between its minimum and maximum, so that the text model learns to read all of them.
        The tokens of its m most relevant tiles are spliced, and each is gated by the relaxed selection of k:
        gradients of the answer reach the selector through the gates. All tiles are encoded, for the teachers. The
        selection that is reported is the hard one that the same scores make.
        """
        glance = self.glance_and_point(prompt, views, question_mask)
        layout, (m, k) = glance.layout, budget.resolve(torch.rand_like(glance.complexity))
        every = torch.ones_like(layout.is_global)
        features = self.look(glance, views, every)
        tiles = self.choose_tiles(glance, m, None) if budget.selection == "before_encoder" else every
        scores = self.score_tokens(glance, features[tiles], tiles)
        kept = self.keep(glance, scores, tiles, k)
        gates = to_tiles(relaxed_top_k(*rank_tokens(scores, tiles, layout), k, temperature), layout)

        embeds = self.embed(prompt.input_ids, layout, features, every)
        (embeds, mask, positions, log_gates), keep_indices = splice(
            positions_to_keep(prompt.attention_mask, layout, tiles[:, None].expand_as(gates)),
            (embeds, 0.0),
            (prompt.attention_mask, 0),
            (prompt.position_ids, 0),
            (gates_of_positions(gates, layout).to(embeds.dtype), 0.0),
        )
        mask = gated_attention_mask(mask, log_gates)
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
        gumbel_temperature: float | None = None,
        selection: str | None = None,
        **kwargs,
    ) -> QGSABaseModelOutputWithPast:
        """As [`QGSASmolVLMForConditionalGeneration.forward`]; `labels` are only hidden from the selector here."""
        budget = Budget.of(self.config, selection=selection, **pop_budget(kwargs))
        views = Views(pixel_values, pixel_attention_mask, image_hidden_states)
        if budget.selection == "dense" and image_hidden_states is not None:
            raise ValueError('selection is "dense": it takes pixel_values, image_hidden_states are for the selector')
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


class QGSASmolVLMForConditionalGeneration(SmolVLMForConditionalGeneration):
    """SmolVLM that looks only where the question points.

    Example:

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
        if isinstance(base, PreTrainedModel):
            dense = base
        else:
            check_architecture(AutoConfig.from_pretrained(base))
            dense = AutoModelForImageTextToText.from_pretrained(base)
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(base)
        check_architecture(dense.config)
        if tokenizer is not None:
            fields = marker_ids(tokenizer) | fields

        vision = dense.config.vision_config.to_dict()
        del vision["model_type"]
        config = QGSAConfig(
            text_config=dense.config.text_config.to_dict(),
            vision_config=vision,
            scale_factor=dense.config.scale_factor,
            tie_word_embeddings=dense.config.tie_word_embeddings,
            **({"image_token_id": dense.config.image_token_id} | fields),
        )
        model = cls._from_config(config, attn_implementation=dense.config._attn_implementation, dtype=dense.dtype)
        missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
        missing = [name for name in missing if not name.startswith(("model.selector.", "model.complexity_estimator."))]
        if missing or unexpected:
            raise ValueError(
                f"of the {len(dense.state_dict())} weights of {type(dense).__name__} {len(unexpected)} have no place "
                f"here ({unexpected[:3]}), and {len(missing)} of ours were not given ({missing[:3]})"
            )
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
        **overrides,
    ) -> QGSASelection:
        """Select without answering; arguments as in `forward`. Raises ValueError for "dense", which keeps all."""
        budget = Budget.of(self.config, **overrides)
        if budget.selection == "dense":
            raise ValueError('selection is "dense": there is nothing to select, choose one of the other variants')
        prompt = Prompt.of(input_ids, attention_mask, position_ids, labels)
        views = Views(pixel_values, pixel_attention_mask)
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
        selection: str | None = None,
        **kwargs,
    ):
        """Stock `generate` over what the question selects: returns prompt ids and new ids, as the stock model does.

        The selection is made once, before the prefill; with `return_dict_in_generate=True` the output carries it as
        `selection`. Arguments as in `forward` and in `GenerationMixin.generate`.
        """
        input_ids = inputs if input_ids is None else input_ids
        budget = Budget.of(self.config, selection=selection, **pop_budget(kwargs))
        if pixel_values is None or kwargs.get("inputs_embeds") is not None or budget.selection == "dense":
            given = {
                "pixel_values": pixel_values,
                "pixel_attention_mask": pixel_attention_mask,
                "position_ids": position_ids,
            }
            given = {name: value for name, value in given.items() if value is not None}
            return super().generate(input_ids, attention_mask=attention_mask, selection="dense", **given, **kwargs)
        selected = self.model.select_inputs(
            budget,
            Prompt.of(input_ids, attention_mask, position_ids),
            Views(pixel_values, pixel_attention_mask),
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
