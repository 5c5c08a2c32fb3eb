/**
 * From attention to relevance, and from relevance to what is encoded and kept, for one image: pure functions, with the
 * results of those in `qgsa_onnx/selection.py`. For sizes see `inputs.js`.
 */

const TINY = 2 ** -126; // of float32
const GLANCE_FIRST = 1e3; // more than any two log-probabilities differ by

const sum = (values) => values.reduce((total, value) => total + value, 0);

/** To the nearest integer, halves to the even one. */
export function rint(value) {
  const rounded = Math.round(value);
  return Math.abs(value % 1) === 0.5 && rounded % 2 ? rounded - 1 : rounded;
}

/** How many tiles are encoded and how many visual tokens are kept, for a complexity of 0 to 1. */
export function resolveBudget(config, complexity) {
  const between = (low, high) => rint(Math.fround(low + Math.fround(complexity * (high - low))));
  return {
    tiles: between(config.min_tiles, config.max_tiles),
    tokens: between(config.min_visual_tokens, config.max_visual_tokens),
  };
}

export function logSoftmax(scores) {
  const highest = scores.reduce((most, score) => Math.max(most, score), -Infinity);
  const shifted = Array.from(scores, (score) => score - highest);
  const logsumexp = Math.log(sum(shifted.map(Math.exp)));
  return Float32Array.from(shifted, (score) => score - logsumexp);
}

/** The lowest complexity that suffices with probability `quantile`, from the logits of each. */
export function complexityAt(logits, quantile) {
  let covered = 0;
  const level = Array.from(logSoftmax(logits), Math.exp).filter((share) => (covered += share) < quantile).length;
  return Math.min(level, logits.length - 1) / (logits.length - 1);
}

/**
 * Maps over the cells of the global view, each with sum 1: per layer one of the question's words, and one of the
 * position that predicts the answer.
 *
 * @param {Float32Array} attention (layers, words + 1, K)
 * @param {number[]} dims its sizes
 * @param {number[]} cells (C), where the tokens of the global view stand among the K positions
 * @returns {number[][][]} (layers, 2, C)
 */
export function attentionMaps(attention, [layers, rows, length], cells) {
  const at = (layer, row, cell) => attention[(layer * rows + row) * length + cell];
  const words = [...Array(rows - 1).keys()];
  return Array.from({ length: layers }, (_, layer) => {
    const asked = cells.map((cell) => Math.max(...words.map((row) => at(layer, row, cell))));
    const answered = cells.map((cell) => at(layer, rows - 1, cell));
    return [asked, answered].map((map) => map.map((value) => value / Math.max(sum(map), TINY)));
  });
}

/** Scores of the cells, (C); for the weights (layers, 2) see QGSAConfig.attention_weights. */
export function attentionScores(maps, weights) {
  const cells = [...maps[0][0].keys()];
  if (weights) {
    const weighted = (cell) => weights.flatMap((pair, layer) => pair.map((w, row) => w * maps[layer][row][cell]));
    return cells.map((cell) => sum(weighted(cell)));
  }
  const standard = maps.map((pair) => pair.map(standardize));
  const mean = (row, cell) => sum(standard.map((pair) => pair[row][cell])) / maps.length;
  return cells.map((cell) => Math.max(mean(0, cell), mean(1, cell)));
}

function standardize(map) {
  const mean = sum(map) / map.length;
  const spread = Math.sqrt(sum(map.map((value) => (value - mean) ** 2)) / (map.length - 1));
  return map.map((value) => (value - mean) / Math.max(spread, TINY));
}

/** Where to look (log-probabilities of the cells), and how much (complexity), from attention maps. */
export function readAttention(maps, grid, config) {
  const { attention_temperature: temperature, attention_nowhere: nowhere } = config;
  const scores = attentionScores(maps, config.attention_weights).map((score) => score / temperature);
  const relevance = logSoftmax(scores);
  let share = 0;
  if (nowhere !== null) {
    const logsumexp = scores[0] - relevance[0];
    share = 1 / (1 + Math.exp(logsumexp - nowhere / temperature));
  }
  const mass = tileRelevance(relevance, grid).slice(0, -1);
  const tiles = tilesToCover(mass, config.attention_coverage, share);
  const complexity = (tiles - config.min_tiles) / Math.max(config.max_tiles - config.min_tiles, 1);
  return { relevance, complexity: Math.fround(Math.min(Math.max(complexity, 0), 1)) };
}

/**
 * How many tiles, the most relevant ones first, cover a share of the relevance.
 *
 * @param {number[]} mass the relevance of each tile
 * @param {number} coverage the share, 0 to 1; 1 takes all tiles
 * @param {number} nowhere the relevance of looking nowhere, which counts as covered
 */
export function tilesToCover(mass, coverage, nowhere) {
  if (coverage === 1 || !mass.length) return mass.length;
  const wanted = ((coverage - nowhere) / Math.max(1 - nowhere, 1e-7)) * sum(mass);
  if (wanted <= 0) return 0;
  let covered = 0;
  const short = [...mass].sort((a, b) => b - a).filter((share) => (covered += share) < wanted).length;
  return Math.min(short + 1, mass.length);
}

/** The mass of log-probabilities (C) on every tile, (T); 0 for the global view. */
export function tileRelevance(relevance, [rows, columns]) {
  const side = Math.round(Math.sqrt(relevance.length));
  const overlap = (index, parts, cell) =>
    Math.max(Math.min((index + 1) / parts, (cell + 1) / side) - Math.max(index / parts, cell / side), 0) * side;
  const mass = Array.from({ length: rows * columns }, (_, tile) => {
    const [row, column] = [Math.floor(tile / columns), tile % columns];
    const share = (cell) => overlap(row, rows, Math.floor(cell / side)) * overlap(column, columns, cell % side);
    return Math.fround(sum(Array.from(relevance, (value, cell) => Math.exp(value) * share(cell))));
  });
  return [...mass, 0];
}

/** The cell of the global view at the centre of every visual token, (T, P); a token of the global view has its own. */
export function tokenCells([rows, columns], tokens) {
  const side = Math.round(Math.sqrt(tokens));
  const cell = (tile, place, parts) => Math.min(Math.trunc((tile * side + place + 0.5) / parts), side - 1);
  return Array.from({ length: (rows * columns + 1) * tokens }, (_, index) => {
    const [tile, token] = [Math.floor(index / tokens), index % tokens];
    const [y, x] = [Math.floor(token / side), token % side];
    if (tile === rows * columns) return token;
    return cell(Math.floor(tile / columns), y, rows) * side + cell(tile % columns, x, columns);
  });
}

/** Scores of every visual token, (T, P); `matches` are those of a selector, undefined for attention. */
export function tokenScores(relevance, layout, config, matches) {
  const glanceFirst = config.max_visual_tokens > layout.tokens ? GLANCE_FIRST : 0; // it stays in view if there is room
  const first = (layout.tiles - 1) * layout.tokens;
  return tokenCells(layout.grid, layout.tokens).map((cell, token) =>
    Math.fround(relevance[cell] + (matches ? matches[token] : token >= first ? glanceFirst : 0)),
  );
}

/** Which candidates are among the best `count`, as booleans; ties go to the first. */
export function topK(scores, candidates, count) {
  const order = [...scores.keys()].filter((index) => candidates[index]).sort((a, b) => scores[b] - scores[a]);
  const best = new Set(order.slice(0, count));
  return Array.from(scores, (_, index) => best.has(index));
}

/**
 * Positions to keep, given the visual tokens `kept` (T, P). All text stays. The markers of a tile are dropped with its
 * last token unless they stay; those of the global view close the image.
 */
export function keepPositions(layout, kept, markersStay) {
  const { tiles, tokens, tileOfPosition, tokenPositions } = layout;
  const marked = Array.from({ length: tiles }, (_, tile) => {
    return markersStay || tile === tiles - 1 || kept.slice(tile * tokens, (tile + 1) * tokens).includes(true);
  });
  const stays = tileOfPosition.map((tile) => tile < 0 || marked[tile]);
  tokenPositions.forEach((position, token) => (stays[position] = kept[token]));
  return [...stays.keys()].filter((position) => stays[position]);
}

/**
 * Embeddings of the positions to keep, (K, D): those of words, and the features of visual tokens.
 *
 * @param {Float32Array} embeds (L, D)
 * @param {Float32Array} features (T, P, D)
 * @param {number[]} positions (K)
 */
export function splice(embeds, features, layout, positions) {
  const width = embeds.length / layout.length;
  const tokenAt = new Map(layout.tokenPositions.map((position, token) => [position, token]));
  const spliced = new Float32Array(positions.length * width);
  positions.forEach((position, row) => {
    const [source, at] = tokenAt.has(position) ? [features, tokenAt.get(position)] : [embeds, position];
    spliced.set(source.subarray(at * width, (at + 1) * width), row * width);
  });
  return spliced;
}
