'use strict';
// Engines of one student, in turns: each has a worker of its own, and one works at a time.
const PAUSE_MS = 30;

const ask = (worker, message) => new Promise((resolve, reject) => {
  worker.onmessage = ({ data }) => (data.error ? reject(new Error(data.error)) : resolve(data));
  worker.onerror = event => reject(new Error(event.message || 'a worker did not start'));
  worker.postMessage(message);
});

const load = async file => new Uint8Array(await (await fetch(file)).arrayBuffer());

async function opened({ script, type, files, values }) {
  const worker = new Worker(script, { type });
  const data = { ...values };
  for (const [key, file] of Object.entries(files)) data[key] = await load(file);
  const { fused } = await ask(worker, { task: 'open', ...data });
  return { worker, fused };
}

// Times of some images, after a pause in which threads of the engine before come to rest.
async function timesOf(worker, job, noise, guidance, frames) {
  const times = [];
  await new Promise(resolve => setTimeout(resolve, PAUSE_MS));
  for (let i = 0; i < frames; i++) {
    const k = i % noise.length;
    times.push((await ask(worker, { task: 'noise', noise: noise[k], label: job.labels[k], guidance })).ms);
  }
  return times;
}

async function warmUp(worker, job, noise) {
  const began = performance.now();
  for (let i = 0; i < job.warmup || performance.now() - began < job.warmup_ms; i++)
    await ask(worker, { task: 'noise', noise: noise[0], label: job.labels[0], guidance: job.guidances[0] });
}

// {engine: {guidance: {rounds: ms of each image of each round, images: bytes of each noise}}}
async function bench(job) {
  const all = new Float32Array((await load('noise.bin')).buffer), size = all.length / job.labels.length;
  const noise = job.labels.map((_, i) => all.slice(i * size, (i + 1) * size));
  const names = Object.keys(job.engines), engines = {}, found = {};
  for (const name of names) {
    const { worker, fused } = engines[name] = await opened(job.engines[name]);
    await warmUp(worker, job, noise);
    found[name] = { fused };
    for (const guidance of job.guidances) {
      const images = [];
      for (const [i, label] of job.labels.entries())
        images.push([...(await ask(worker, { task: 'noise', noise: noise[i], label, guidance })).pixels]);
      found[name][guidance] = { rounds: [], images };
    }
  }
  for (let round = 0; round < job.rounds; round++)
    for (let i = 0; i < names.length; i++) {
      const name = names[(round + i) % names.length];
      for (const guidance of job.guidances)
        found[name][guidance].rounds.push(await timesOf(engines[name].worker, job, noise, guidance, job.frames));
    }
  for (const { worker } of Object.values(engines)) worker.terminate();
  return { engines: found, isolated: crossOriginIsolated, cores: navigator.hardwareConcurrency };
}
