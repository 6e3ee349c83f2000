/**
 * Photographs to model inputs, as the bundle's `image` says; `Model.prepareImage` calls it.
 *
 * As edgec_runtime.image: crop, antialiased resize, normalisation, layout. The resize is Pillow's
 * `Image.resize` with a box, since that is what most models were trained on.
 *
 * Left out on purpose: decoding of files, rotation by EXIF (createImageBitmap does both), padding.
 */

/**
 * The tensor for one photograph: [1, 3, h, w] or [1, h, w, 3] of the spec's dtype.
 *
 * pixels: {data, width, height} with RGBA bytes; alpha is ignored. spec: the manifest's `image`.
 * As edgec_runtime.image, from which it differs by one level of 255 in less than one value of a
 * thousand: sums are made in another order there, and a half is rounded the other way.
 */
export function prepareImage(pixels, spec) {
  const resized = resizeImage(pixels, spec.size, cropBox(pixels, spec), spec.resize);
  const [rows, columns] = spec.size;
  const values = new Float32Array(3 * rows * columns);
  for (let pixel = 0; pixel < rows * columns; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      const value = resized[3 * pixel + (spec.channels === "BGR" ? 2 - channel : channel)];
      const at = spec.layout === "NCHW" ? channel * rows * columns + pixel : 3 * pixel + channel;
      const centred = Math.fround(value - Math.fround(spec.mean[channel]));
      values[at] = centred / Math.fround(spec.std[channel]);
    }
  }
  const dims = spec.layout === "NCHW" ? [1, 3, rows, columns] : [1, rows, columns, 3];
  return { type: spec.dtype, data: cast(values, spec.dtype), dims };
}

/** The centred {left, top, right, bottom} of the target's aspect ratio that is resized. */
function cropBox({ width, height }, { size, crop }) {
  const ratio = size[1] / size[0];
  const boxWidth = Math.min(width, height * ratio) * crop;
  const boxHeight = boxWidth / ratio;
  const [left, top] = [(width - boxWidth) / 2, (height - boxHeight) / 2];
  return { left, top, right: left + boxWidth, bottom: top + boxHeight };
}

/**
 * The box resized to [rows, columns]: bytes RGB, row by row.
 *
 * Separable, the filter widened by the reduction so that every source pixel counts, and bytes
 * after each of the two passes, as in Pillow.
 */
function resizeImage({ data, width, height }, [rows, columns], box, filter) {
  const across = taps(box.left, box.right, width, columns, filter);
  const down = taps(box.top, box.bottom, height, rows, filter);
  const firstRow = down[0].first;
  const rowsSeen = down.at(-1).first + down.at(-1).weights.length - firstRow;
  const narrow = new Uint8Array(rowsSeen * columns * 3);
  for (let row = 0; row < rowsSeen; row++) {
    const start = (row + firstRow) * width;
    across.forEach(({ first, weights }, column) => {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        for (let i = 0; i < weights.length; i++) {
          sum += weights[i] * data[4 * (start + first + i) + channel];
        }
        narrow[3 * (row * columns + column) + channel] = toByte(sum);
      }
    });
  }
  const result = new Uint8Array(rows * columns * 3);
  const line = 3 * columns;
  down.forEach(({ first, weights }, row) => {
    for (let at = 0; at < line; at++) {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) {
        sum += weights[i] * narrow[(first - firstRow + i) * line + at];
      }
      result[row * line + at] = toByte(sum);
    }
  });
  return result;
}

function toByte(value) {
  return Math.max(0, Math.min(255, Math.floor(value + 0.5)));
}

/** For each of `size` outputs: the weights of the source positions from `first` on. */
function taps(start, end, length, size, filter) {
  const scale = (end - start) / size;
  const widening = Math.max(scale, 1);
  const support = (filter === "bilinear" ? 1 : 2) * widening;
  const shape = filter === "bilinear" ? (x) => Math.max(1 - x, 0) : bicubic;
  return Array.from({ length: size }, (_, i) => {
    const centre = start + (i + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - support + 0.5), 0);
    const last = Math.min(Math.trunc(centre + support + 0.5), length);
    const raw = Array.from({ length: last - first }, (_, j) =>
      shape(Math.abs(first + j + 0.5 - centre) / widening),
    );
    const total = raw.reduce((sum, weight) => sum + weight, 0);
    return { first, weights: Float32Array.from(raw, (weight) => weight / total) };
  });
}

/** Keys 1981, IEEE TASSP 29(6), equation 15, for x >= 0; his parameter is -1/2, as in Pillow. */
function bicubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

function cast(values, dtype) {
  if (dtype === "uint8") return new Uint8Array(Uint8ClampedArray.from(values).buffer); // rounds
  return dtype === "float16" ? Uint16Array.from(values, float16Bits) : values;
}

/** The bits of the nearest float16, ties to even. */
function float16Bits(value) {
  const sign = value < 0 || Object.is(value, -0) ? 0x8000 : 0;
  const size = Math.abs(value);
  if (Number.isNaN(size)) return 0x7e00;
  if (size >= 65520) return sign | 0x7c00;
  const exponent = Math.max(Math.floor(Math.log2(size || 1e-9)), -14);
  const steps = size / 2 ** (exponent - 10); // of the last bit; exact, a power of two
  const floor = Math.floor(steps);
  const odd = floor % 2;
  const rounded = floor + (steps - floor > 0.5 || (steps - floor === 0.5 && odd) ? 1 : 0);
  // a carry out of the fraction raises the exponent, as the sum does
  return sign | ((exponent + 14) * 1024 + rounded);
}
