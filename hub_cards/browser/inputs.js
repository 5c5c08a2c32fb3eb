/**
 * A question about an image as arrays: tiles, as the stock image processor cuts them, and their layout in the prompt.
 *
 * Sizes in the comments of this folder: a prompt of L positions, with T tiles (row by row, the global view last), P
 * visual tokens per tile, C = P cells of the global view, D the width of the text model. All arrays are flat.
 */

import { resize } from "./resize.js";

export const IMAGE = "<image>";
export const FAKE = "<fake_token_around_image>";
const MAX_SIDE = 4096; // px; the largest side that the stock image processor scales to
const MIN_SIDE = 4; // px; with less, or a longer side than this times the shorter one, nothing is left of an image
const MAX_ASPECT = 200;

/** The prompt of a question in SmolVLM's chat format. */
export const chatPrompt = (question) => `<|im_start|>User:${IMAGE}${question}<end_of_utterance>\nAssistant:`;

/** The pixels of a Blob or <img>, three bytes each; transparent ones become white. */
export async function readPixels(source) {
  const bitmap = await createImageBitmap(source, { colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  const data = new Uint8Array(width * height * 3);
  for (let pixel = 0; pixel < width * height; pixel++) data.set(rgba.subarray(4 * pixel, 4 * pixel + 3), 3 * pixel);
  return { data, width, height };
}

/** [width, height] of an image scaled to `longest`, the shorter side even, as in the stock processor. */
export function scaledSize(width, height, longest) {
  const aspect = width / height;
  const even = (side) => Math.trunc(side) + (Math.trunc(side) % 2);
  [width, height] = width >= height ? [longest, even(longest / aspect)] : [even(longest * aspect), longest];
  [width, height] = [Math.max(width, 1), Math.max(height, 1)];
  if (Math.max(width, height) > MAX_SIDE) {
    const shrunk = width / height;
    [width, height] =
      width >= height ? [MAX_SIDE, Math.trunc(MAX_SIDE / shrunk)] : [Math.trunc(MAX_SIDE * shrunk), MAX_SIDE];
  }
  return [Math.max(width, 1), Math.max(height, 1)];
}

/** [width, height] rounded up to whole tiles, the longer side first, as in the stock processor. */
export function sizeInTiles(width, height, tile) {
  const aspect = width / height;
  const whole = (side) => Math.ceil(side / tile) * tile;
  if (width >= height) return [whole(width), whole(Math.trunc(whole(width) / aspect))];
  return [whole(Math.trunc(whole(height) * aspect)), whole(height)];
}

/** An image scaled as by the stock image processor, and cut one tile at a time. */
export class TiledImage {
  /**
   * @param {{data: Uint8Array, width: number, height: number}} image three bytes per pixel
   * @param {object} settings preprocessor_config.json
   */
  constructor(image, settings) {
    const { width, height } = image;
    if (Math.min(width, height) < MIN_SIDE || Math.max(width, height) > MAX_ASPECT * Math.min(width, height)) {
      throw new Error(
        `image (${width} x ${height} px): each side must have at least ${MIN_SIDE} px, and the longer one at most ` +
          `${MAX_ASPECT} times the shorter`,
      );
    }
    this.settings = settings;
    this.side = settings.max_image_size.longest_edge;
    this.image = resize(image, ...scaledSize(width, height, settings.size.longest_edge), settings.resample);
    this.grid = [0, 0]; // rows and columns; 0 for a single tile, which is its own global view
    if (settings.do_image_splitting) {
      const size = sizeInTiles(this.image.width, this.image.height, this.side);
      this.image = resize(this.image, ...size, settings.resample);
      const [columns, rows] = size.map((edge) => edge / this.side);
      if (Math.max(rows, columns) > 1) this.grid = [rows, columns];
    }
  }

  /** Pixels of a tile, (3, side, side) in float32. */
  cut(number) {
    const { side, settings, grid } = this;
    const [rows, columns] = grid;
    const isGlobal = number === rows * columns;
    const view = isGlobal ? resize(this.image, side, side, settings.resample) : this.image;
    const left = isGlobal ? 0 : side * (number % columns);
    const top = isGlobal ? 0 : side * Math.floor(number / columns);
    const pixels = new Float32Array(3 * side * side);
    for (let channel = 0; channel < 3; channel++) {
      const mean = Math.fround(settings.image_mean[channel]);
      const std = Math.fround(settings.image_std[channel]);
      for (let row = 0; row < side; row++) {
        for (let column = 0; column < side; column++) {
          const byte = view.data[3 * ((top + row) * view.width + left + column) + channel];
          const scaled = Math.fround(byte * settings.rescale_factor);
          pixels[(channel * side + row) * side + column] = Math.fround(scaled - mean) / std;
        }
      }
    }
    return pixels;
  }

  /** The image in a prompt, with `tokens` placeholders per tile. */
  placeholders(tokens) {
    const [rows, columns] = this.grid;
    let text = "";
    for (let row = 1; row <= rows; row++) {
      for (let column = 1; column <= columns; column++) {
        text += `${FAKE}<row_${row}_col_${column}>${IMAGE.repeat(tokens)}`;
      }
      text += "\n";
    }
    return `${text}${rows ? "\n" : ""}${FAKE}<global-img>${IMAGE.repeat(tokens)}${FAKE}`;
  }
}

/**
 * Where the tiles stand in a prompt.
 *
 * @param {number[]} ids the prompt, (L)
 * @param {{image: number, fake: number}} markers ids of a visual token's placeholder, and of what opens a tile
 * @param {number[]} grid rows and columns
 * @param {number} tokens P
 * @returns `tokenPositions` (T, P), and `tileOfPosition` (L): the tile whose markers or tokens stand there, -1 for
 *   text
 */
export function readLayout(ids, markers, grid, tokens) {
  const tiles = grid[0] * grid[1] + 1;
  const tokenPositions = positionsOf(ids, markers.image);
  const fakes = positionsOf(ids, markers.fake);
  const begins = Array.from({ length: tiles }, (_, tile) =>
    fakes.findLast((position) => position < tokenPositions[tile * tokens]),
  );
  const tileOfPosition = new Array(ids.length).fill(-1);
  // A tile spans its markers and everything up to the next tile's; a global view ends with a marker of its own.
  begins.push(tokenPositions.at(-1) + 2);
  for (let tile = 0; tile < tiles; tile++) tileOfPosition.fill(tile, begins[tile], begins[tile + 1]);
  return { length: ids.length, grid, tiles, tokens, tokenPositions, tileOfPosition };
}

const positionsOf = (ids, wanted) => ids.flatMap((id, position) => (id === wanted ? [position] : []));

/** The positions that belong to a sequence of ids, as a Set. */
export function coveredBy(ids, sequence) {
  const covered = new Set();
  for (let start = 0; sequence.length && start + sequence.length <= ids.length; start++) {
    if (sequence.every((id, index) => ids[start + index] === id)) {
      sequence.forEach((_, index) => covered.add(start + index));
    }
  }
  return covered;
}

/**
 * The question in a prompt of one turn and the opening of its answer: its positions with and without what opens the
 * turn. Both are empty if it has no words.
 */
export function findQuestion(ids, layout, config) {
  const text = [...ids.keys()].filter((position) => layout.tileOfPosition[position] < 0);
  const end = text.find((position) => ids[position] === config.end_of_utterance_token_id);
  const question = text.filter((position) => position < end);
  const opening = coveredBy(ids, config.user_token_ids);
  const template = [...config.assistant_token_ids, config.text_config.bos_token_id];
  const words = question.filter((position) => !opening.has(position));
  if (words.every((position) => template.includes(ids[position]))) return { question: [], words: [] };
  return { question, words };
}
