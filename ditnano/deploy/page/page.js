'use strict';
const find = id => document.getElementById(id);
const about = JSON.parse(find('about').textContent);
const IMAGES = 20, PERIOD_MS = 8000;

// Data arrive in parts, each in a script element of its own, so that the bar moves while the file loads.
const parts = { wasm: [], relaxed: [], weights: [] };
let arrived = 0;
function part(kind, text) {
  parts[kind].push(text);
  arrived += text.length;
  find('loading').value = arrived / about.characters;
}

function decoded(kind) {
  const arrays = parts[kind].map(text => Uint8Array.from(atob(text), c => c.charCodeAt(0)));
  const all = new Uint8Array(arrays.reduce((n, a) => n + a.length, 0));
  let at = 0;
  for (const a of arrays) {
    all.set(a, at);
    at += a.length;
  }
  parts[kind] = [];
  return all;
}

// One question to the worker at a time is answered in order.
const worker = new Worker(URL.createObjectURL(new Blob([find('worker').textContent], { type: 'text/javascript' })));
const waiting = new Map();
let asked = 0;
worker.onmessage = ({ data }) => {
  const { resolve, reject } = waiting.get(data.id);
  waiting.delete(data.id);
  if (data.error) reject(new Error(data.error));
  else resolve(data);
};
worker.onerror = event => fail(new Error(event.message || 'the worker did not start'));
function ask(task, values) {
  return new Promise((resolve, reject) => {
    const id = asked++;
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, task, ...values });
  });
}

function fail(error) {
  find('loading').hidden = true;
  find('status').textContent = `This does not work here: ${error.message}`;
}

const sorted = times => [...times].sort((a, b) => a - b);
const percentile = (times, p) => sorted(times)[Math.min(times.length - 1, Math.floor(times.length * p))];
const guidance = () => Number(find('guidance').value);
const label = () => find('label').value;
const className = n => about.labels[n];

function show(canvas, pixels, text) {
  const { size, channels } = about;
  canvas.width = canvas.height = size;
  const image = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[i * channels + Math.min(c, channels - 1)];
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d', { willReadFrequently: true }).putImageData(image, 0, 0);
  canvas.setAttribute('aria-label', text);
}

// ---- The grid

const cells = Array.from({ length: IMAGES }, () => {
  const item = document.createElement('li');
  item.innerHTML = '<figure><canvas role="img" aria-label="Not drawn yet"></canvas><figcaption></figcaption></figure>';
  find('grid').append(item);
  return item;
});

let newest = 0, fused = false;
async function drawGrid() {
  const mine = ++newest, first = Number(find('seed').value), times = [];
  find('guidance-value').value = guidance().toFixed(1);
  find('seed-value').value = first;
  for (let i = 0; i < IMAGES; i++) {
    const seed = first + i, chosen = label() === 'each' ? i % about.labels.length : Number(label());
    const { pixels, ms } = await ask('draw', { seed, label: chosen, guidance: guidance() });
    if (mine !== newest) return; // a control moved: a newer grid is being drawn
    const text = chosen < 0 ? `seed ${seed}` : `${className(chosen)}, seed ${seed}`;
    show(cells[i].querySelector('canvas'), pixels, text);
    cells[i].querySelector('figcaption').textContent = chosen < 0 ? seed : className(chosen);
    times.push(ms);
  }
  find('status').textContent = `${IMAGES} images drawn; median ${percentile(times, .5).toFixed(1)} ms each`;
}

// ---- The walk

let playing = false, stepping = false, again = false;
function seedIn(id) {
  const value = Math.floor(Number(find(id).value));
  return Math.min(Math.max(value || 0, 0), 4294967295);
}

async function step() {
  if (stepping) {
    again = true;
    return;
  }
  stepping = true;
  do {
    again = false;
    const place = Number(find('place').value) / 100, from = seedIn('from'), to = seedIn('to');
    find('place-value').value = `${Math.round(100 * place)} %`;
    const one = label() === 'each' ? -1 : Number(label());
    const { pixels } = await ask('walk', { from, to, place, label: one, guidance: guidance() });
    show(find('walk-image'), pixels, `Between seed ${from} and seed ${to}, at ${Math.round(100 * place)} percent`);
  } while (again);
  stepping = false;
}

async function play() {
  playing = !playing;
  find('play').textContent = playing ? 'Pause' : 'Play';
  if (!playing) return;
  const offset = Math.acos(1 - Number(find('place').value) / 50) / (2 * Math.PI) * PERIOD_MS;
  const began = performance.now(), recent = [];
  find('place').step = 'any';
  while (playing) {
    const now = await new Promise(requestAnimationFrame);
    find('place').value = 50 - 50 * Math.cos((now - began + offset) / PERIOD_MS * 2 * Math.PI);
    await step();
    recent.push(performance.now());
    if (recent.length > 30) recent.shift();
    const rate = 1000 * (recent.length - 1) / (recent.at(-1) - recent[0]);
    if (recent.length > 5) find('rate').textContent = `${rate.toFixed(0)} images/s, shown`;
  }
  find('place').step = 1;
}

// ---- Times

async function timesOf(strength, from) {
  const times = [], began = performance.now();
  for (let i = -about.warmup; i < about.timed; i++) {
    const { ms } = await ask('draw', { seed: i + about.warmup, label: 0, guidance: strength });
    if (i >= 0) times.push(ms);
    if (i % 10 === 0) find('measured').textContent = `Measuring: ${from + Math.max(i, 0)} images`;
    if (i >= 20 && performance.now() - began > 10000) break; // a slow device: fewer images
  }
  return times;
}

function timesRow(strength, times) {
  const mean = times.reduce((a, b) => a + b) / times.length;
  const ms = p => percentile(times, p).toFixed(1);
  const values = [strength.toFixed(1), strength === 1 ? 1 : 2, ms(.5), ms(.9), ms(.99), (1000 / mean).toFixed(1),
                  times.length];
  const row = find('times').tBodies[0].insertRow();
  for (const value of values) row.insertCell().textContent = value;
}

async function measure() {
  playing = false;
  find('play').textContent = 'Play';
  find('measure').disabled = true;
  find('times').tBodies[0].replaceChildren();
  const how = fused ? 'with' : 'without';
  let images = 0;
  for (const strength of new Set([1, guidance()])) {
    const times = await timesOf(strength, images);
    images += times.length;
    timesRow(strength, times);
    find('times').hidden = false;
  }
  find('measured').textContent = `${images} images after warm-up, on one core, ${how} fused multiply-add.`;
  find('measure').disabled = false;
}

// ---- Start

async function start() {
  try {
    find('status').textContent = 'Opening the model';
    const data = { wasm: decoded('wasm'), relaxed: decoded('relaxed'), weights: decoded('weights') };
    fused = (await ask('open', data)).fused;
    find('loading').hidden = true;
    find('label').value = 'each';
    for (const id of ['label', 'guidance', 'seed']) find(id).addEventListener('input', () => drawGrid().catch(fail));
    for (const id of ['label', 'guidance', 'from', 'to', 'place'])
      find(id).addEventListener('input', () => step().catch(fail));
    for (const id of ['controls', 'walk-controls']) find(id).addEventListener('submit', e => e.preventDefault());
    find('play').addEventListener('click', () => play().catch(fail));
    find('measure').addEventListener('click', () => measure().catch(fail));
    find('play').disabled = find('measure').disabled = false;
    await drawGrid();
    await step();
  } catch (error) {
    fail(error);
  }
}
