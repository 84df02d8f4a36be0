// The same messages as those of worker.js, for onnxruntime-web: an ONNX file for each guidance.
import * as ort from './ort.wasm.min.mjs';

const sessions = {};
let shape;

const tasks = {
  async open({ task, id, threads, shape: shapeOfNoise, ...files }) {
    ort.env.wasm.numThreads = threads;
    shape = [1, ...shapeOfNoise];
    for (const [guidance, file] of Object.entries(files))
      sessions[guidance] = await ort.InferenceSession.create(file, { executionProviders: ['wasm'] });
    return {};
  },
  async noise({ noise, label, guidance }) {
    const [, channels, size] = shape, area = size * size, pixels = new Uint8ClampedArray(channels * area);
    const began = performance.now();
    const { images } = await sessions[guidance].run({
      noise: new ort.Tensor('float32', noise, shape),
      labels: new ort.Tensor('int64', BigInt64Array.of(BigInt(label)), [1]),
    });
    for (let c = 0; c < channels; c++)
      for (let i = 0; i < area; i++) pixels[i * channels + c] = Math.floor(images.data[c * area + i] * 127.5 + 128);
    return { ms: performance.now() - began, pixels };
  },
};

onmessage = async ({ data }) => {
  try {
    postMessage({ id: data.id, ...(await tasks[data.task](data)) });
  } catch (error) {
    postMessage({ id: data.id, error: error.message });
  }
};
