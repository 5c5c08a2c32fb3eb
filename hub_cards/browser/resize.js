/** Pillow's `Image.resize` for RGB images, bit for bit. A canvas smooths differently. */

const PRECISION = 22; // bits of a weight behind the point

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

function cubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

/** Filters by the number that preprocessor_config.json has for `resample`, each with its support. */
const FILTERS = {
  1: { support: 3, weight: (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0) }, // Lanczos
  2: { support: 1, weight: (x) => Math.max(1 - Math.abs(x), 0) }, // bilinear
  3: { support: 2, weight: cubic },
};

/** For every output position along one axis: the first input position that counts, and the weights from there on. */
function weightsOf(from, to, filter) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  const support = filter.support * stretch;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const end = Math.min(Math.trunc(centre + support + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, x) => filter.weight((x + first - centre + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => fixedPoint(weight / sum)) };
  });
}

const fixedPoint = (weight) => Math.trunc(weight * 2 ** PRECISION + (weight < 0 ? -0.5 : 0.5));

/** Resize along one axis: `count` lines of pixels, whose neighbours are `step` bytes apart in source and target. */
function resizeLines(source, target, taps, lines, startOf, step) {
  for (let line = 0; line < lines; line++) {
    const [from, to] = startOf(line);
    for (let place = 0; place < taps.length; place++) {
      const { first, weights } = taps[place];
      for (let channel = 0; channel < 3; channel++) {
        let sum = 1 << (PRECISION - 1);
        let at = from + first * step + channel;
        for (const weight of weights) {
          sum += source[at] * weight;
          at += step;
        }
        target[to + place * step + channel] = Math.min(Math.max(sum >> PRECISION, 0), 255);
      }
    }
  }
}

/**
 * @param {{data: Uint8Array, width: number, height: number}} image three bytes per pixel
 * @param {number} resample 1 (Lanczos), 2 (bilinear) or 3 (bicubic), as in Pillow
 */
export function resize(image, width, height, resample) {
  const filter = FILTERS[resample];
  if (!filter) throw new Error(`resample (${resample}) must be 1, 2 or 3: choose another checkpoint`);
  let { data } = image;
  if (width !== image.width) {
    const wide = new Uint8Array(width * image.height * 3);
    const startOf = (row) => [row * image.width * 3, row * width * 3];
    resizeLines(data, wide, weightsOf(image.width, width, filter), image.height, startOf, 3);
    data = wide;
  }
  if (height !== image.height) {
    const high = new Uint8Array(width * height * 3);
    const startOf = (column) => [column * 3, column * 3];
    resizeLines(data, high, weightsOf(image.height, height, filter), width, startOf, width * 3);
    data = high;
  }
  return { data, width, height };
}
