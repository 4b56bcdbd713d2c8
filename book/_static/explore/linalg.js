// The linear algebra of the pictures that move, as in opdlab.geometry, with which the tests compare it.
// A matrix is a list of its columns, each a Float64Array; a basis is one, too. Nothing here touches the page.
globalThis.explorables ??= { data: {} };

explorables.linalg = (() => {
  "use strict";

  const dot = (a, b) => {
    let sum = 0;
    for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
    return sum;
  };
  const frobenius = (a) => Math.sqrt(a.reduce((sum, column) => sum + dot(column, column), 0));
  const identity = (n) => Array.from({ length: n }, (_, i) => Float64Array.from({ length: n }, (_, j) => +(i === j)));
  // a + scale b
  const add = (a, b, scale = 1) => a.map((column, j) => column.map((x, i) => x + scale * b[j][i]));
  const multiply = (a, b) =>
    b.map((weights) => {
      const sum = new Float64Array(a[0].length);
      for (let j = 0; j < a.length; j++) for (let i = 0; i < sum.length; i++) sum[i] += weights[j] * a[j][i];
      return sum;
    });
  const transpose = (a) => Array.from(a[0], (_, i) => Float64Array.from(a, (column) => column[i]));
  // a^T b
  const inner = (a, b) => b.map((column) => Float64Array.from(a, (other) => dot(other, column)));

  // --- numbers as they are stored ------------------------------------------------------------------------------------

  const word = new Float32Array(1);
  const bits = new Uint32Array(word.buffer);
  // The nearest bfloat16 number, ties to even, by way of float32.
  const bf16 = (x) => {
    word[0] = x;
    bits[0] = (bits[0] + 0x7fff + ((bits[0] >>> 16) & 1)) & 0xffff0000;
    return word[0];
  };
  const fromBf16 = (half) => {
    bits[0] = half << 16;
    return word[0];
  };
  const fromFloat16 = (half) => {
    const exponent = (half >>> 10) & 31;
    const size = exponent ? (1024 + (half & 1023)) * 2 ** (exponent - 25) : (half & 1023) * 2 ** -24;
    return half & 0x8000 ? -size : size;
  };
  // The columns of a matrix whose rows were written one after the other, 16 bits an entry, in base64.
  const decode = (text, number, rows, columns, unit = 1) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const entry = (k) => unit * number(bytes[2 * k] | (bytes[2 * k + 1] << 8));
    const column = (j) => Float64Array.from({ length: rows }, (_, i) => entry(i * columns + j));
    return Array.from({ length: columns }, (_, j) => column(j));
  };
  const rounded = (a) => a.map((column) => column.map(bf16));

  // --- spectra and subspaces -----------------------------------------------------------------------------------------

  const turn = (one, other, cosine, sine) => {
    for (let i = 0; i < one.length; i++) {
      const x = one[i], y = other[i];
      one[i] = cosine * x - sine * y;
      other[i] = sine * x + cosine * y;
    }
  };

  // Singular values, descending, and the right singular vectors, by Jacobi's one-sided rotations: columns are turned in
  // pairs until all are orthogonal. Begun from the vectors of a matrix that is near, it takes a third of the time.
  const svd = (a, near = null) => {
    const v = near ? near.map((column) => column.slice()) : identity(a.length);
    const b = near ? multiply(a, near) : a.map((column) => column.slice());
    const nothing = (2 ** -52 * frobenius(a)) ** 2;
    for (let turned = true, sweep = 0; turned && sweep < 60; sweep++) {
      turned = false;
      for (let p = 0; p < b.length - 1; p++) {
        for (let q = p + 1; q < b.length; q++) {
          const left = b[p], right = b[q];
          let alpha = 0, beta = 0, gamma = 0;
          for (let i = 0; i < left.length; i++) {
            alpha += left[i] * left[i];
            beta += right[i] * right[i];
            gamma += left[i] * right[i];
          }
          if (Math.abs(gamma) <= 1e-15 * Math.sqrt(alpha * beta) || Math.min(alpha, beta) <= nothing) continue;
          turned = true;
          const zeta = (beta - alpha) / (2 * gamma);
          const tangent = (zeta < 0 ? -1 : 1) / (Math.abs(zeta) + Math.hypot(1, zeta));
          const cosine = 1 / Math.hypot(1, tangent), sine = cosine * tangent;
          turn(left, right, cosine, sine);
          turn(v[p], v[q], cosine, sine);
        }
      }
    }
    const sizes = b.map((column) => Math.sqrt(dot(column, column)));
    const order = sizes.map((_, j) => j).sort((i, j) => sizes[j] - sizes[i]);
    return { s: order.map((j) => sizes[j]), v: order.map((j) => v[j]), rows: a[0].length };
  };

  const rank = ({ s, rows }) => s.filter((size) => size > Math.max(rows, s.length) * 2 ** -52 * s[0]).length;
  // The top k right singular vectors, or null if there are fewer.
  const topRight = (found, k) => (rank(found) < k ? null : found.v.slice(0, k));
  const stableRank = ({ s }) => (s[0] > 0 ? s.reduce((sum, size) => sum + (size / s[0]) ** 2, 0) : NaN);
  const simK = (a, b) => (a && b ? frobenius(inner(a, b)) ** 2 / a.length : NaN);

  // Principal angles in degrees, ascending: the small ones from their sines, the large ones from their cosines.
  const principalAngles = (a, b) => {
    if (!a || !b) return [NaN];
    const overlap = inner(a, b);
    const cosines = svd(overlap).s;
    const sines = svd(add(b, multiply(a, overlap), -1)).s.reverse();
    return cosines.map((cosine, i) => {
      const angle = cosine ** 2 >= 0.5 ? Math.asin(Math.min(1, sines[i])) : Math.acos(Math.min(1, cosine));
      return (angle * 180) / Math.PI;
    });
  };

  const mean = (numbers) => numbers.reduce((sum, x) => sum + x, 0) / numbers.length;

  // --- which weights -------------------------------------------------------------------------------------------------

  const shareUnchanged = (w0, w1) =>
    mean(w0.map((column, j) => column.reduce((n, x, i) => n + (bf16(x) === bf16(w1[j][i])), 0) / column.length));

  // The share alpha of the entries that are nearest to zero, as columns of booleans; ties go to the first, row by row.
  const lowMagnitude = (w0, alpha) => {
    const n = w0.length;
    const size = (k) => Math.abs(w0[k % n][Math.floor(k / n)]);
    const places = Array.from({ length: n * w0[0].length }, (_, k) => k).sort((k, l) => size(k) - size(l) || k - l);
    const mask = w0.map((column) => Array(column.length).fill(false));
    for (const k of places.slice(0, Math.round(alpha * places.length))) mask[k % n][Math.floor(k / n)] = true;
    return mask;
  };

  // The share of the weights that change in bfloat16 which lies in a mask.
  const overlap = (mask, w0, w1) => {
    let inside = 0, all = 0;
    w0.forEach((column, j) =>
      column.forEach((x, i) => {
        if (bf16(x) === bf16(w1[j][i])) return;
        all += 1;
        inside += mask[j][i];
      }),
    );
    return all ? inside / all : NaN;
  };

  return {
    add, bf16, decode, frobenius, fromBf16, fromFloat16, inner, lowMagnitude, mean, multiply, overlap, principalAngles,
    rounded, shareUnchanged, simK, stableRank, svd, topRight, transpose,
  };
})();
