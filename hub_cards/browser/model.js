/** The flow of QGSA in a browser: glance, point, look, keep, splice, answer. For sizes see `inputs.js`. */

import { env, PreTrainedTokenizer } from "@huggingface/transformers";
import * as ort from "onnxruntime-web/webgpu";

import { chatPrompt, coveredBy, FAKE, findQuestion, IMAGE, readLayout, TiledImage } from "./inputs.js";
import {
  attentionMaps,
  complexityAt,
  keepPositions,
  readAttention,
  resolveBudget,
  splice,
  tileRelevance,
  tokenScores,
  topK,
} from "./selection.js";

const SUFFIXES = { fp32: "", fp16: "_fp16", int8: "_int8", q4: "_q4" };
const GRAPHS = ["vision_encoder", "embed_tokens", "decoder_model_merged"];
const POINTER_GRAPHS = { attention: ["attention_pointer"], selector: ["selector", "selector_match"] };
const END = "<end_of_utterance>";
// What the graphs can do; a field that an older export lacks has the first value.
const SUPPORTED = {
  selection: ["before_encoder", "dense"],
  positions: ["original"],
  positions_per_image: [null],
  glance_downscale: [1],
  vision_layers: [null],
  vision_policy: [false],
};

// transformers.js chooses the build for this browser; the import map says where it lies.
const runtime = new URL(".", import.meta.resolve("onnxruntime-web/webgpu")).href;
const { wasm } = env.backends.onnx;
for (const kind of ["mjs", "wasm"]) wasm.wasmPaths[kind] = runtime + wasm.wasmPaths[kind].split("/").pop();
ort.env.logLevel = "error";

const floats = (data, dims) => new ort.Tensor("float32", data, dims);
const integers = (data, dims) => new ort.Tensor("int64", BigInt64Array.from(data, BigInt), dims);
const booleans = (data, dims) => new ort.Tensor("bool", Uint8Array.from(data), dims);

/** Lets the page draw: a graph runs on its thread. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** Files of an export: a folder, as a path relative to the page or a URL, or a Hub id such as "me/my-qgsa". */
export class Files {
  constructor(source) {
    this.onHub = /^[\w-][\w.-]*\/[\w.-]+$/.test(source);
    const base = this.onHub ? `https://huggingface.co/${source}/resolve/main` : source.replace(/\/$/, "");
    this.base = new URL(`${base}/`, location.href).href;
  }

  /** @throws if the file is missing */
  async fetch(name) {
    const url = this.base + name;
    // The cache of transformers.js, which keeps files of the Hub in the same way.
    const cache = this.onHub && globalThis.caches ? await caches.open("transformers-cache") : null;
    const known = await cache?.match(url);
    if (known) return known;
    const response = await fetch(url).catch(() => ({ status: "not reached" }));
    if (!response.ok) {
      throw new Error(
        `${this.base} has no ${name} (${response.status}): export it with --format onnx, or choose another model or ` +
          "variant",
      );
    }
    await cache?.put(url, response.clone()).catch(() => {}); // the quota is exceeded
    return response;
  }

  json = async (name) => (await this.fetch(name)).json();

  bytes = async (name) => new Uint8Array(await (await this.fetch(name)).arrayBuffer());
}

/** Raise an Error for a checkpoint that is not one of ours, or needs what the graphs cannot do. */
function checkConfig(config) {
  if (config.model_type !== "qgsa_smolvlm") {
    throw new Error(`model_type (${config.model_type}) must be qgsa_smolvlm: export a checkpoint with --format onnx`);
  }
  if (!POINTER_GRAPHS[config.pointer]) {
    throw new Error(`pointer (${config.pointer}) must be attention or selector: export the checkpoint again`);
  }
  for (const [name, values] of Object.entries(SUPPORTED)) check(name, config[name] ?? values[0]);
}

/** Raise an Error for a value of a field that the graphs cannot do. */
function check(name, value) {
  const values = SUPPORTED[name];
  if (values.includes(value)) return;
  const known = values.map(String).join(" or "); // String, or null would not show
  throw new Error(`${name} (${value}) must be ${known}: change it, or choose another checkpoint`);
}

/** An exported checkpoint. */
export class QGSAModel {
  /**
   * @param {string} source folder or Hub id, see Files
   * @param {{variant?: string, device?: string, onProgress?: (text: string) => void}} options `variant` is fp32, fp16,
   *   int8 or q4, the graphs to load; `device` is wasm or webgpu
   */
  static async load(source, { variant = "fp32", device = "wasm", onProgress = () => {} } = {}) {
    if (!(variant in SUFFIXES)) throw new Error(`variant (${variant}) must be ${Object.keys(SUFFIXES).join(", ")}`);
    const model = new QGSAModel();
    const files = new Files(source);
    model.config = await files.json("config.json");
    checkConfig(model.config);
    const { image_size: size, patch_size: patch } = model.config.vision_config;
    model.tokens = Math.floor(size / patch / model.config.scale_factor) ** 2; // P
    model.settings = await files.json("preprocessor_config.json");
    model.stops = [(await files.json("generation_config.json")).eos_token_id].flat();
    const tokenizer = await files.json("tokenizer.json");
    model.tokenizer = new PreTrainedTokenizer(tokenizer, await files.json("tokenizer_config.json"));
    const special = tokenizer.added_tokens.filter((token) => token.special);
    model.special = new Map(special.map((token) => [token.content, token.id]));
    for (const token of [IMAGE, FAKE, END]) {
      if (!model.special.has(token)) throw new Error(`tokenizer.json has no ${token}: give one of SmolVLM`);
    }
    model.sessions = {};
    for (const name of [...GRAPHS, ...POINTER_GRAPHS[model.config.pointer]]) {
      onProgress(`Loading ${name} …`);
      const bytes = await files.bytes(`onnx/${name}${SUFFIXES[variant]}.onnx`);
      model.sessions[name] = await ort.InferenceSession.create(bytes, { executionProviders: [device] });
    }
    return model;
  }

  /**
   * Answer a question about an image greedily.
   *
   * @param {{data: Uint8Array, width: number, height: number}} image three bytes per pixel
   * @param {string} question
   * @param {{selection?: string, maxNewTokens?: number, onProgress?: (text: string) => void}} options `selection` is
   *   before_encoder or dense, by default that of the checkpoint
   * @returns the answer as `text` and `ids`; `tiles` (T) and `kept` (T, P), booleans: what was encoded, the global
   *   view last, and which visual tokens stayed; `grid`, the rows and columns of the tiles
   */
  async generate(image, question, { selection, maxNewTokens = 64, onProgress = () => {} } = {}) {
    for (const token of this.special.keys()) {
      if (question.includes(token)) throw new Error(`question must not contain ${token}`);
    }
    const variant = selection ?? this.config.selection ?? SUPPORTED.selection[0];
    check("selection", variant);
    const cut = new TiledImage(image, this.settings);
    const prompt = chatPrompt(question).replace(IMAGE, () => cut.placeholders(this.tokens));
    const ids = this.tokenizer.encode(prompt);
    const markers = { image: this.special.get(IMAGE), fake: this.special.get(FAKE) };
    const layout = readLayout(ids, markers, cut.grid, this.tokens);
    const embeds = await this.embed(ids);
    const dense = variant === "dense";
    const chosen = await this.select({ cut, ids, layout, embeds, dense, onProgress });
    const positions = keepPositions(layout, chosen.kept, this.config.keep_tile_markers ?? true);
    const spliced = splice(embeds, chosen.features, layout, positions);
    const answer = [];
    for await (const token of this.decode(spliced, positions, maxNewTokens)) {
      answer.push(token);
      onProgress(this.text(answer));
    }
    return { text: this.text(answer), ids: answer, tiles: chosen.tiles, kept: chosen.kept, grid: cut.grid };
  }

  text(ids) {
    return this.tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false }).trim();
  }

  /** Glance, point, look and keep. */
  async select({ cut, ids, layout, embeds, dense, onProgress }) {
    const { tiles, tokens, grid, length } = layout;
    const width = embeds.length / length;
    const features = new Float32Array(tiles * tokens * width);
    const look = async (encoded) => {
      for (let tile = 0; tile < tiles; tile++) {
        if (!encoded[tile]) continue;
        onProgress(`Encoding ${tile === tiles - 1 ? "the thumbnail" : `tile ${tile + 1} of ${tiles - 1}`} …`);
        features.set(await this.encode(cut, tile), tile * tokens * width);
      }
    };
    const { question, words } = findQuestion(ids, layout, this.config);
    const all = Array(tiles).fill(true);
    if (dense || !question.length) {
      await look(all);
      return { tiles: all, kept: Array(tiles * tokens).fill(true), features };
    }
    // glance, point
    const isGlobal = all.map((_, tile) => tile === tiles - 1);
    await look(isGlobal);
    const glance = features.subarray((tiles - 1) * tokens * width);
    const pointing =
      this.config.pointer === "attention"
        ? await this.pointByAttention(layout, embeds, words, glance)
        : await this.pointBySelector(layout, embeds, question, glance);
    if (!pointing.relevance.every(Number.isFinite)) {
      throw new Error("relevance holds NaN or infinite values: choose another variant, or check the weights");
    }
    const budget = resolveBudget(this.config, pointing.complexity);
    // look
    const looked = topK(tileRelevance(pointing.relevance, grid), isGlobal.map((each) => !each), budget.tiles);
    await look(looked);
    const encoded = looked.map((each, tile) => each || isGlobal[tile]);
    // keep
    const matches = pointing.state && (await this.match(layout, pointing.state, features));
    const scores = tokenScores(pointing.relevance, layout, this.config, matches);
    const candidates = scores.map((_, token) => encoded[Math.floor(token / tokens)]);
    return { tiles: encoded, kept: topK(scores, candidates, budget.tokens), features };
  }

  /** Read the attention of the words, and of the position that predicts the answer, to the global view. */
  async pointByAttention(layout, embeds, words, glance) {
    const { tiles, tokens, length, tokenPositions, grid } = layout;
    const width = embeds.length / length;
    const kept = tokenPositions.map((_, token) => token >= (tiles - 1) * tokens);
    const positions = keepPositions(layout, kept, false);
    const features = new Float32Array(tokenPositions.length * width);
    features.set(glance, features.length - glance.length);
    const places = new Map(positions.map((position, index) => [position, index]));
    const rows = [...words, length - 1].map((position) => places.get(position));
    const cells = tokenPositions.slice(-tokens).map((position) => places.get(position));
    const { attention } = await this.run("attention_pointer", {
      inputs_embeds: floats(splice(embeds, features, layout, positions), [1, positions.length, width]),
      position_ids: integers(positions, [1, positions.length]),
      rows: integers(rows, [1, rows.length]),
    });
    return readAttention(attentionMaps(attention.data, attention.dims.slice(1), cells), grid, this.config);
  }

  /** Read the question and the global view by the trained selector. */
  async pointBySelector(layout, embeds, question, glance) {
    const width = embeds.length / layout.length;
    const words = new Float32Array(question.length * width);
    question.forEach((position, row) => {
      words.set(embeds.subarray(position * width, (position + 1) * width), row * width);
    });
    const output = await this.run("selector", {
      question_embeds: floats(words, [1, question.length, width]),
      glance: floats(glance.slice(), [1, layout.tokens, width]),
    });
    const complexity = complexityAt(output.complexity_logits.data, this.config.complexity_quantile);
    return { relevance: output.relevance.data, complexity, state: output.question_state.data };
  }

  /** How well each visual token matches the question, (T, P). */
  async match({ tiles, tokens }, state, features) {
    const states = new Float32Array(tiles * state.length);
    for (let tile = 0; tile < tiles; tile++) states.set(state, tile * state.length);
    const { scores } = await this.run("selector_match", {
      question_state: floats(states, [tiles, state.length]),
      image_features: floats(features, [tiles, tokens, features.length / tiles / tokens]),
      is_global: booleans([...Array(tiles - 1).fill(0), 1], [tiles]),
    });
    return scores.data;
  }

  /** Word embeddings, (L, D). */
  async embed(ids) {
    return (await this.run("embed_tokens", { input_ids: integers(ids, [1, ids.length]) })).inputs_embeds.data;
  }

  /** Features of a tile, (P, D). */
  async encode(cut, tile) {
    const { side } = cut;
    const output = await this.run("vision_encoder", {
      pixel_values: floats(cut.cut(tile), [1, 1, 3, side, side]),
      pixel_attention_mask: booleans(new Uint8Array(side * side).fill(1), [1, 1, side, side]),
    });
    return output.image_features.data;
  }

  /** Ids of the answer, up to and including a stop token, given what was kept (K, D) and its positions. */
  async *decode(embeds, positions, maxNewTokens) {
    const { num_hidden_layers: layers, num_key_value_heads: heads, ...text } = this.config.text_config;
    const size = text.head_dim ?? text.hidden_size / text.num_attention_heads;
    let past = {};
    for (let layer = 0; layer < layers; layer++) {
      for (const part of ["key", "value"]) {
        past[`past_key_values.${layer}.${part}`] = floats(new Float32Array(0), [1, heads, 0, size]);
      }
    }
    let shown = positions.length;
    for (let count = 0; count < maxNewTokens; count++, shown++) {
      const { logits, ...present } = await this.run("decoder_model_merged", {
        inputs_embeds: floats(embeds, [1, positions.length, embeds.length / positions.length]),
        attention_mask: integers(Array(shown).fill(1), [1, shown]),
        position_ids: integers(positions, [1, positions.length]),
        ...past,
      });
      const last = logits.data.subarray(-logits.dims.at(-1));
      const token = last.reduce((best, value, id) => (value > last[best] ? id : best), 0);
      yield token;
      if (this.stops.includes(token)) return;
      past = Object.fromEntries(
        Object.entries(present).map(([name, cache]) => [name.replace("present", "past_key_values"), cache]),
      );
      embeds = await this.embed([token]);
      positions = [positions.at(-1) + 1];
    }
  }

  /** Outputs of a graph by name. */
  async run(name, feeds) {
    await pause();
    const session = this.sessions[name];
    return session.run(Object.fromEntries(session.inputNames.map((input) => [input, feeds[input]])));
  }
}
