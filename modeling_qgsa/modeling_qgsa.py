"""QGSA-SmolVLM: SmolVLM that looks only where the question points. This file holds only the delta to SmolVLM.

    layout  read and check the inputs of one call, see `Request`
    glance  encode the global view
    point   read question and glance: relevance, complexity, budget (m, k)
    look    encode the m most relevant tiles
    keep    score the visual tokens of glance and tiles, keep k
    splice  gather the kept positions, keeping their original position ids (or `positions="compact"`)
    answer  the stock text model, the stock generate()

`selection="after_encoder"` looks at every tile, `"blocks"` at single blocks of the chosen tiles; `"dense"` hands
everything to the stock model.
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, SmolVLMForConditionalGeneration, SmolVLMModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMBaseModelOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, can_return_tuple

from .attention_qgsa import check_attention
from .cache_qgsa import Past, drop_seen, is_spliced
from .calibration_qgsa import calibrate_pointer
from .compat_qgsa import CACHE, advance_positions, continued_inputs, take_cache, use_v5_patch_positions
from .configuration_qgsa import QGSAConfig
from .conversion_qgsa import config_of_dense, copy_dense_weights, load_dense
from .count_qgsa import ExactCount as ExactCount  # older transformers copy what is imported here
from .crossing_qgsa import VisionBlock, blocks_zero
from .interaction_qgsa import Interaction, read_layers
from .layered_cache_qgsa import held_by
from .layout_qgsa import VisualLayout
from .outputs_qgsa import Prefill, QGSABaseModelOutputWithPast, QGSACausalLMOutputWithPast
from .pointer_qgsa import GivenScores, Glance, PointedScores, make_pointer, point_nowhere, pointer_zero
from .policy_qgsa import choose_schedules, fit_policy
from .pretrained_qgsa import QGSAPreTrainedModel
from .prompt_qgsa import check_decoding, check_no_placeholders
from .ranking_qgsa import rank_vision_layers
from .readout_qgsa import read_out
from .relaxation_qgsa import Relaxation, gated_attention_mask
from .request_qgsa import STOCK_NAMES, BaseModelKwargs, ForwardKwargs, Request, VisualInputs
from .schedule_qgsa import vision_share
from .selection_qgsa import (
    QGSASelection,
    choose_tiles,
    choose_tokens,
    compact_positions,
    describe_selection,
    positions_to_keep,
    splice,
    spread,
    top_k_per_image,
)
from .selector_qgsa import ComplexityEstimator, QuestionGuidedSelector
from .tuning_qgsa import tune_encoder
from .utility_qgsa import tile_utility as tile_utility  # for the same reason
from .vision_qgsa import embed_dense, encode_chosen_blocks, encode_in_steps, encode_tiles


class QGSASmolVLMModel(QGSAPreTrainedModel, SmolVLMModel):
    """SmolVLM without its language head, with the selector."""

    _auto_class = "AutoModel"  # type: ignore[assignment]

    def __init__(self, config: QGSAConfig):
        super().__init__(config)
        config.check_tiles()
        use_v5_patch_positions(self.vision_model)
        self.selector = QuestionGuidedSelector(config)
        self.complexity_estimator = ComplexityEstimator(config)
        self.vision_blocks = None
        if config.vision_cross == "block":  # one per layer: a schedule, which says where they run, is per call
            self.vision_blocks = nn.ModuleList(VisionBlock(config) for _ in self.text_model.layers)
        self.post_init()

    @property
    def is_tuned(self) -> bool:
        """Whether the encoder runs differently from SmolVLM's: in steps, or in a dtype of its own."""
        return self.config.tiles_per_step is not None or self.vision_model.dtype != self.text_model.dtype

    def glance_and_point(self, request: Request) -> Glance:
        """Steps 2 and 3: encode the global views, and let the pointer read question and glance."""
        prompt, layout, question_mask = request.prompt, request.layout, request.question_mask
        assert prompt is not None and layout is not None and question_mask is not None
        glance = encode_tiles(self, request.visual, layout, layout.is_global)
        pointer, pointing = None, point_nowhere(glance)
        if request.points or (self.training and request.trains_pointer):
            question = self.get_input_embeddings()(prompt.input_ids)[layout.image_sample]
            pointer = make_pointer(self, request.pointer, request)
            pointing = pointer.point(question, question_mask | ~question_mask.any(1, keepdim=True), glance)
        if request.complexity is not None:
            pointing = pointing._replace(complexity=request.complexity)
        if not self.training and not pointing.relevance.isfinite().all():  # in training the loss scaler skips the step
            raise ValueError("relevance holds NaN or infinite values: check the weights and the glance features")
        return Glance(pointer, layout, glance, question_mask, *pointing)

    def look(self, glance: Glance, visual: VisualInputs, looked: torch.Tensor) -> torch.Tensor:
        """Step 4: features of the tiles with tokens `looked` at, `(T, P)` bool: `(n, P, D)`, 0 at all other tokens.

        The global views among them are not encoded again. If only some tokens of a tile are looked at, it is
        encoded in blocks.
        """
        layout = glance.layout
        features = glance.features.new_zeros(*looked.shape, glance.features.shape[-1])
        features = features.index_put((layout.is_global,), glance.features)
        whole, tiles = looked.all(1) & ~layout.is_global, looked.any(1)
        if whole.any():
            features = features.index_put((whole,), encode_tiles(self, visual, layout, whole))
        part = tiles & ~looked.all(1)
        if part.any():
            where = (looked & part[:, None]).nonzero(as_tuple=True)
            features = features.index_put(where, encode_chosen_blocks(self, visual, layout, looked, part))
        return features[tiles]

    def look_at_all(
        self, glance: Glance, visual: VisualInputs, looked: torch.Tensor, in_blocks: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Step 4 in training: features of every tile, `(T, P, D)`, for the teachers, and those that `look` returns."""
        with torch.no_grad() if in_blocks else nullcontext():
            every = self.look(glance, visual, torch.ones_like(looked))
        return every, self.look(glance, visual, looked) if in_blocks else every[looked.any(1)]

    def embed(
        self, input_ids: torch.Tensor, layout: VisualLayout, features: torch.Tensor, tiles: torch.Tensor
    ) -> torch.Tensor:
        """Word embeddings with the features of the encoded `tiles` at their placeholders, `(B, L, D)`."""
        embeds = self.get_input_embeddings()(input_ids)
        where = (layout.tile_sample[tiles][:, None], layout.token_positions[tiles])
        return embeds.index_put(where, features.to(embeds.dtype))

    def prefill(self, request: Request, relaxation: Relaxation | None = None) -> Prefill:
        """Steps 2 to 6: the prompt of `request` with the k best visual tokens of each image.

        With `prune_layer`, the first layers of the text model see all tokens that were looked at, the others the best.

        With a `relaxation`, in training, budgets are random and all tokens that are looked at stay, each with a gate
        on its attention key; the reported selection is the hard one that the same scores give, and the features are
        those of every tile, for the teachers.
        """
        prompt, budget, layout = request.prompt, request.budget, request.layout
        assert prompt is not None and layout is not None
        check_attention(self, budget, layout, gated=relaxation is not None)
        # glance, point
        glance = self.glance_and_point(request)
        given = request.token_scores
        scores = PointedScores(glance) if given is None else GivenScores.of(given, layout)
        complexity = glance.complexity if relaxation is None else relaxation.complexity(glance.complexity)
        count = request.count if relaxation is None else None
        m, k = budget.resolve(complexity, scores.asked if count is None else None)
        # look
        chosen = choose_tiles(budget.selection, scores, layout, m if count is None else count.tiles(m))
        k = k if count is None else count.tokens(chosen, layout)
        looked = choose_tokens(budget.selection, scores, layout, chosen, k)
        tiles = looked.any(1)
        if relaxation is None:
            features = seen = self.look(glance, request.visual, looked)
        else:
            features, seen = self.look_at_all(glance, request.visual, looked, budget.selection == "blocks")
        # keep
        token_scores = spread(scores.of_tokens(seen, tiles), tiles)
        kept = stays = top_k_per_image(token_scores, looked, layout, k)
        # splice
        embeds = self.embed(prompt.input_ids, layout, seen, tiles)
        spliced = [(embeds, 0.0), (prompt.attention_mask, 0), (prompt.position_ids, 0)]
        if relaxation is not None:
            stays, gates = looked, relaxation.log_gates(token_scores, looked, layout, k)
            spliced.append((gates.to(embeds.dtype), 0.0))
        marked = self.config.keep_tile_markers if count is None else self.config.keep_tile_markers | chosen
        keep_of = partial(positions_to_keep, prompt.attention_mask, layout, markers_stay=marked)
        stay = keep_of(stays)
        first = keep_of(looked) if request.prune_layer else stay
        (embeds, mask, positions, *log_gates), held = splice(first, *spliced)
        positions = positions if request.positions == "original" else compact_positions(mask, prompt)
        schedules = choose_schedules(self, request, glance)
        visual = prompt.input_ids == self.config.image_token_id
        interaction = Interaction.of(schedules, request.prune_layer, first, stay, visual, *log_gates)
        mask = gated_attention_mask(mask, *log_gates) if log_gates and interaction is None else mask
        mask = mask if request.shown is None else torch.cat([request.shown, mask], 1)
        text_inputs = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions}
        shares = embeds.new_tensor([vision_share(kinds, self.config) for kinds in schedules])
        selection = describe_selection(glance, kept, tiles, splice(stay)[1], shares)
        return Prefill(text_inputs, selection, glance, features, stay.shape[1], held, interaction)

    def get_image_features(self, pixel_values, pixel_attention_mask=None, **kwargs):
        """As SmolVLM's, but `config.tiles_per_step` tiles at a time and in the dtype of the text model."""
        encode = super().get_image_features
        if not self.is_tuned or not pixel_values.any():
            return encode(pixel_values, pixel_attention_mask, **kwargs)
        step, dtype = self.config.tiles_per_step, self.text_model.dtype
        return encode_in_steps(encode, pixel_values, pixel_attention_mask, step, dtype)

    def read(self, inputs: dict[str, Any], cache, interaction: Interaction | None, options: dict[str, Any]):
        """Step 7 without the language head: the stock model, unless layers of the text model differ in what they see.

        Args:
            inputs: of the stock model; with an `interaction`, those of a [`Prefill`].
        """
        if interaction is None and held_by(cache) is None:
            return super().forward(**inputs, **{CACHE: cache}, **options)
        if inputs["inputs_embeds"] is None:
            inputs = {**inputs, "inputs_embeds": self.get_input_embeddings()(inputs["input_ids"])}
        hidden, cache = read_layers(self.text_model, inputs, cache, interaction, options, self.vision_blocks)
        return SmolVLMBaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache})

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_attention_mask=None,
        interaction: Interaction | None = None,
        cache=None,
        **kwargs: Unpack[BaseModelKwargs],
    ) -> QGSABaseModelOutputWithPast:
        """As [`QGSASmolVLMForConditionalGeneration.forward`]; `labels` only hide positions from the selector."""
        text = (input_ids, attention_mask, position_ids, inputs_embeds)
        cache = take_cache({"past_key_values": past_key_values, "cache": cache})
        rest: dict[str, Any] = {**kwargs, **dict(zip(STOCK_NAMES, (*text, pixel_values, pixel_attention_mask)))}
        request = Request.take(self.config, rest, cache)
        if request.selects:
            relaxes = self.training and request.trains_pointer
            prefill = self.prefill(request, Relaxation.of(request, self.config.keep_tile_markers) if relaxes else None)
            outputs = self.read(prefill.text_inputs, cache, prefill.interaction, rest)
            request.past.note(outputs.get(CACHE), prefill)
            outputs = QGSABaseModelOutputWithPast.of(outputs, prefill)
        else:
            stock = embed_dense(self, request.stock) if self.is_tuned and request.shows_images else request.stock
            if is_spliced(cache):
                stock = Past.of(cache, inputs_embeds if input_ids is None else input_ids).continue_text(stock)
            outputs = QGSABaseModelOutputWithPast(**self.read(stock, cache, interaction, rest))
        if self.training and torch.is_grad_enabled():  # DDP waits for a gradient of every trained weight
            hidden = outputs["last_hidden_state"]
            zero = pointer_zero(make_pointer(self), hidden, self.config) + blocks_zero(self.vision_blocks, hidden)
            outputs["last_hidden_state"] = hidden + zero
        return outputs


class QGSASmolVLMForConditionalGeneration(QGSAPreTrainedModel, SmolVLMForConditionalGeneration, GenerationMixin):
    """SmolVLM that looks only where the question points.

    ```python
    model = QGSASmolVLMForConditionalGeneration.from_dense("HuggingFaceTB/SmolVLM-256M-Instruct")
    ids = model.generate(**inputs, max_new_tokens=20)
    ```
    """

    _auto_class = "AutoModelForImageTextToText"  # type: ignore[assignment]

    def __init__(self, config: QGSAConfig):
        # Without the __init__ of SmolVLM's class, which would build a second model; all of its attributes follow.
        super(SmolVLMForConditionalGeneration, self).__init__(config)
        self.model = QGSASmolVLMModel(config)
        self.image_token_id = config.image_token_id
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.vocab_size = config.text_config.vocab_size
        self.model.text_model.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    @classmethod
    def from_dense(cls, base, tokenizer=None, **fields) -> "QGSASmolVLMForConditionalGeneration":
        """Make a QGSA model from a dense one, with all of its weights. It points with its attention, untrained.

        Args:
            base: Hub id, local folder or model of an idefics3 or smolvlm checkpoint.
            tokenizer: tokenizer or processor, source of the marker token ids; that of `base` if it is an id or a
                folder. For a model without one the ids are the published ones, or those given in `fields`.
            fields: fields of [`QGSAConfig`], such as `max_tiles=2`.

        Raises ValueError for a checkpoint of another architecture, naming it, or if weights do not match.
        """
        dense, tokenizer = load_dense(base, tokenizer)
        config = config_of_dense(dense.config, tokenizer, **fields)
        model = cls._from_config(config, attn_implementation=dense.config._attn_implementation, dtype=dense.dtype)
        copy_dense_weights(dense, model)
        model.generation_config = dense.generation_config
        return model.to(dense.device).train(dense.training)

    @can_return_tuple
    def forward(  # type: ignore[misc]  # TransformersKwargs names position_ids too
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        question_mask: torch.Tensor | None = None,
        visual_token_scores: torch.Tensor | None = None,
        complexity: torch.Tensor | None = None,
        image_hidden_states: torch.Tensor | None = None,
        mm_encoder_outputs=None,
        lazy_tiles=None,
        visual_cache=None,
        gumbel_temperature: float | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        selection: str | None = None,
        pointer: str | None = None,
        prune_layer: int | None = None,
        vision_budget: float | str | list[str] | None = None,
        interaction: Interaction | None = None,
        cache=None,
        **kwargs: Unpack[ForwardKwargs],
    ) -> QGSACausalLMOutputWithPast:
        """SmolVLM's forward pass over the visual tokens that the question selects.

        In training mode the selection is relaxed (every tile is encoded, budgets are random, and a gate acts on the
        attention keys, see [`Relaxation`]); otherwise it is hard. Logits stand at the positions of the prompt,
        `(B, L, V)`, or at `logits_to_keep` of them. Of the labels, those of the kept positions count.

        Args (in addition to SmolVLM's):
            question_mask: `(B, L)` bool or int, the tokens of the question; by default the last closed turn that is
                not the assistant's.
            visual_token_scores: `(B, N)` float, scores of all visual tokens in prompt order that replace the
                pointer's. The score of a tile is the highest of its tokens.
            complexity: `(I,)` float, 0 to 1, the share of the budget that each image needs, in place of the pointer's
                estimate.
            image_hidden_states: `(T, P, D)`, the features of all tiles of the batch in prompt order, instead of
                `pixel_values`; not for "dense".
            mm_encoder_outputs: the same as an output of `get_image_features`, `{"image": output}`, for every variant.
            past_key_values, cache (since transformers 5.24): may hold the conversation so far, with or without a
                selection. `input_ids` are then its new positions, and `attention_mask`, if given, covers all of it.
            lazy_tiles: returned by the processor with `lazy_tiles=True` next to the pixels of the global views; the
                other tiles are cut when they are looked at.
            visual_cache: a [`VisualCache`] in which tiles are looked up and new ones are stored; inference only.
            gumbel_temperature: temperature of the relaxed selection; `config.gumbel_temperature` by default.
            prune_layer: number of layers of the text model that see every visual token that was encoded; the others
                see the kept ones (FastV, SGL). By default no layer does.
            vision_budget: how vision takes part in each layer of the text model, `config.vision_layers` by default, or
                the share of the layers' work on visual tokens to do, see `schedule_of`.
            interaction: what `generate` hands on of both to its first step.
            selection, pointer, positions, positions_per_image, min_visual_tokens, max_visual_tokens, min_tiles,
                max_tiles: override the config.
            max_image_tokens: most visual tokens per image, tiles in proportion; in place of the four limits.

        Raises ValueError if prompt, pixels, scores or budgets do not fit together, naming both numbers.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            take_cache({"past_key_values": past_key_values, "cache": cache}),
            inputs_embeds,
            pixel_values,
            pixel_attention_mask,
            labels=labels,
            question_mask=question_mask,
            visual_token_scores=visual_token_scores,
            complexity=complexity,
            image_hidden_states=image_hidden_states,
            mm_encoder_outputs=mm_encoder_outputs,
            lazy_tiles=lazy_tiles,
            visual_cache=visual_cache,
            gumbel_temperature=gumbel_temperature,
            selection=selection,
            pointer=pointer,
            prune_layer=prune_layer,
            vision_budget=vision_budget,
            interaction=interaction,
            **kwargs,
        )
        shift_labels = kwargs.pop("shift_labels", None)
        loss_function = partial(self.loss_function, vocab_size=self.config.text_config.vocab_size, **kwargs)
        logits, loss = read_out(self.lm_head, loss_function, outputs, logits_to_keep, labels, shift_labels)
        glance = outputs.glance if self.training else None
        return QGSACausalLMOutputWithPast.of(outputs, loss=loss, logits=logits, glance=glance)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the text model, even if the encoder has another one: the dtype in which a checkpoint is loaded."""
        return self.model.text_model.dtype

    def tune(
        self,
        vision_dtype: torch.dtype | None = None,
        tiles_per_step: int | None = None,
        threads: int | None = None,
        saved: str | Path | None = None,
    ):
        """Set hardware-dependent options: precision of the encoder, tiles that it encodes at once, torch's threads.

        Without arguments it measures for two to three seconds which are fastest here, sets them and prints what it
        found: on some CPUs bfloat16 halves the time of the encoder, on others it takes up to four times as long.
        "dense" then equals stock up to rounding. A checkpoint loads in the dtype of the text model throughout, so tune
        after that.

        Args:
            vision_dtype: dtype of encoder and connector, converted in place; None leaves it unchanged.
            tiles_per_step: tiles encoded at once, `config.tiles_per_step`; None leaves it unchanged.
            threads: number of threads of torch, `torch.set_num_threads`; None leaves it unchanged. It holds for the
                whole process, except for Python threads that have used torch before. It is measured on a CPU only, up
                to the cores that the process may use, or `OMP_NUM_THREADS`.
            saved: file for what is fastest, in place of the other arguments: read if it exists, else measured and
                written.

        Returns the model. Raises ValueError for a dtype that is not floating-point and for less than 1 tile or thread;
        without these, also if weights of the encoder are quantized or offloaded, and if `saved` was measured on
        another processor, number of cores, device, version of torch or architecture.
        """
        tune_encoder(self.model, vision_dtype, tiles_per_step, threads, saved)
        return self

    calibrate = calibrate_pointer
    rank_vision_layers = rank_vision_layers
    fit_policy = fit_policy

    @torch.no_grad()
    def select(self, input_ids=None, pixel_values=None, **kwargs) -> QGSASelection:
        """Select without answering; arguments as in `forward`.

        Raises ValueError as `forward` does, and if there is nothing to select ("dense" keeps everything, or there are
        no images); TypeError for an unknown argument.
        """
        kwargs |= {"input_ids": input_ids, "pixel_values": pixel_values}
        request = Request.take(self.config, kwargs)
        if kwargs:
            raise TypeError(f"select() got unexpected arguments: {', '.join(kwargs)}")
        request.check_selects()
        return self.model.prefill(request).selection

    @torch.no_grad()
    def generate(self, inputs=None, input_ids=None, **kwargs):  # type: ignore[override]
        """Stock `generate` over the visual tokens that the question selects; returns prompt ids and new ids, as stock.

        The selection is made once; with `return_dict_in_generate=True` it is the output's `selection`. Arguments as in
        `forward` and in `GenerationMixin.generate`. Raises ValueError as `forward` does, for placeholders without an
        image, and, except for "dense", for decoding methods that read the whole prompt again (assisted, prompt lookup,
        prefill in chunks).
        """
        ids = inputs if input_ids is None else input_ids
        kwargs |= {"input_ids": ids, "labels": None}  # as stock: no labels
        kwargs[CACHE] = cache = take_cache(kwargs)
        past = Past.of(cache, kwargs.get("inputs_embeds") if ids is None else ids)
        options = drop_seen(kwargs, past, self.config) if past.slots else dict(kwargs)
        request = Request.take(self.config, options, cache)
        if not request.selects and not past.length:
            return self._generate_dense(kwargs)
        check_decoding(kwargs, kwargs.get("generation_config") or self.generation_config)
        if request.selects:
            return self.generate_from(self.model.prefill(request), ids, past, **options)
        options |= continued_inputs(past.continue_text(embed_dense(self.model, request.stock)), cache)
        output = super().generate(ids, **options)  # type: ignore[misc]
        if isinstance(output, ModelOutput):
            output["selection"] = None
        return output

    @torch.no_grad()
    def generate_from(self, prefill: Prefill, input_ids: torch.Tensor, past: Past, **options):
        """Step 7 of `generate` alone: what steps 2 to 6 made may serve other purposes, too.

        Args:
            prefill: a selection from a prompt.
            input_ids: `(B, length)` int64, the whole conversation, with that prompt at its end.
            past: the conversation behind the cache.
            options: of `generate`, without inputs.
        """
        cache = options.get(CACHE)
        options |= continued_inputs(prefill.text_inputs, cache)
        if prefill.interaction is not None:
            options["interaction"] = prefill.interaction
        output = super().generate(input_ids, **options)  # type: ignore[misc]
        if isinstance(output, ModelOutput):
            cache, output["selection"] = output.get(CACHE), prefill.selection
        past.note(cache, prefill)
        return output

    def _generate_dense(self, options: dict[str, Any]):
        """Stock `generate` over stock inputs."""
        request = Request.take(self.config, options)
        stock = {name: value for name, value in request.stock.items() if value is not None}
        input_ids = stock.pop("input_ids", None)
        continues = options.get(CACHE) is not None or "inputs_embeds" in stock
        if request.visual.missing and request.budget.selection != "dense" and not continues:
            check_no_placeholders(input_ids, self.config.image_token_id)
        return super().generate(input_ids, selection="dense", **stock, **options)  # type: ignore[misc]

    def _prepare_generated_length(self, *, model_input_name, input_ids_length, **kwargs):  # type: ignore[override]
        # Lengths count the whole prompt, whose ids are returned first, not only the kept positions.
        name = "input_ids" if input_ids_length else model_input_name
        lengths = {"model_input_name": name, "input_ids_length": input_ids_length, **kwargs}
        return super()._prepare_generated_length(**lengths)  # type: ignore[misc]

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        given = model_kwargs.get("position_ids")
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        updated.pop("interaction", None)
        return advance_positions(updated, given)


__all__ = ["QGSASmolVLMForConditionalGeneration", "QGSASmolVLMModel"]
