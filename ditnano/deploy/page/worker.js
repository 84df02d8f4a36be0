// Owns the WebAssembly module. A message {id, task, ...} is answered by {id, ...} or {id, error}.
'use strict';
let student;

const bytes = (at, n) => new Uint8Array(student.memory.buffer, at, n);

function check(code) {
  if (!code) return;
  const at = student.message(code);
  const all = new Uint8Array(student.memory.buffer);
  throw new Error(new TextDecoder().decode(all.subarray(at, all.indexOf(0, at))));
}

function timed(draw) {
  const began = performance.now();
  check(draw());
  const ms = performance.now() - began;
  return { ms, pixels: bytes(student.pixels(), student.pixels_bytes()).slice() };
}

const tasks = {
  async open({ wasm, relaxed, weights }) {
    const fused = WebAssembly.validate(relaxed); // the browser has fused multiply-add
    student = (await WebAssembly.instantiate(fused ? relaxed : wasm, {})).instance.exports;
    bytes(student.weights(), student.weights_bytes()).set(weights);
    check(student.open());
    return { fused };
  },
  draw: ({ seed, label, guidance }) => timed(() => student.draw(seed, label, guidance)),
  noise: ({ noise, label, guidance }) => timed(() => {
    new Float32Array(student.memory.buffer, student.noise(), noise.length).set(noise);
    return student.draw_noise(label, guidance);
  }),
  walk: ({ from, to, place, label, guidance }) => timed(() => student.walk(from, to, place, label, guidance)),
};

onmessage = async ({ data }) => {
  try {
    postMessage({ id: data.id, ...(await tasks[data.task](data)) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};
