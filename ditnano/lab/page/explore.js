'use strict';
// The table holds every answer; here the last one whose budget is not above the chosen one is looked up and shown.
const find = id => document.getElementById(id);
const table = JSON.parse(find('table').textContent);
const slider = find('slider'), number = find('number'), POSITIONS = Number(slider.max);
const count = n => n.toLocaleString('en-US');
const name = d => `(${d.depth}, ${d.width}, ${d.heads})`;
const key = d => `${d.depth},${d.width},${d.heads}`;
const option = () => document.querySelector('input[name=option]:checked').value;
const budgets = { ...table.budgets };
const chosen = Object.fromEntries(Object.entries(budgets).map(([k, b]) => [k, b.start]));
const shown = (value, b) => `${count(value)} ${b.unit}`;

function stepAt(b, value) {
  const units = Math.round(value * b.per_unit);   // `value` is a multiple of 1/per_unit
  let k = 0;
  while (k + 1 < b.steps.length && b.steps[k + 1].at <= units) k++;
  return k;
}

function lowest(b) { return b.steps[0].at / b.per_unit; }

// The slider is logarithmic; what it gives has three digits, and is never below the smallest budget.
function fromSlider(b) {
  const low = lowest(b), raw = low * (b.largest / low) ** (slider.value / POSITIONS);
  const rounded = Math.floor(Number(raw.toPrecision(3)) * b.per_unit) / b.per_unit;
  return Math.min(Math.max(rounded, low), b.largest);
}

function toSlider(b, value) {
  const low = lowest(b);
  return Math.round(POSITIONS * Math.log(value / low) / Math.log(b.largest / low));
}

function cells(row, values) {
  for (const [tag, text, kind] of values) {
    const cell = document.createElement(tag);
    cell.textContent = text;
    if (kind) cell.className = kind;
    if (tag === 'th') cell.scope = 'row';
    row.append(cell);
  }
  return row;
}

function list(designs) {
  return designs.map(([d, r]) => ({ ...table.designs[d], why: table.reasons[r] }));
}

function around(b, k) {
  const first = i => b.steps[i].designs[0][0];
  let from = k, next = k;
  while (from > 0 && first(from - 1) === first(k)) from--;
  while (next < b.steps.length && first(next) === first(k)) next++;
  const text = `It stays down to ${shown(b.steps[from].at / b.per_unit, b)}`;
  if (next === b.steps.length) return `${text}.`;
  const better = table.designs[first(next)];
  return `${text}; with ${shown(b.steps[next].at / b.per_unit, b)} it becomes ${name(better)}.`;
}

function facts(d) {
  const rows = [['depth, width, heads', `${d.depth} layers, ${d.width} wide, ${d.heads} heads`],
    ['parameters', `${count(d.params)}; ${count(d.deployed)} as deployed, time and labels folded into tables`],
    ['file', `${count(d.fp16_kb)} kB as deployed in fp16`],
    ['latency', `${count(d.latency)} s for 50,000 images on the paper's Jetson, by the law` +
      (d.timed ? '' : '; outside the sizes that were timed')]];
  find('facts').replaceChildren(...rows.flatMap(([k, v]) => {
    const [dt, dd] = [document.createElement('dt'), document.createElement('dd')];
    dt.textContent = k;
    dd.textContent = v;
    return [dt, dd];
  }));
}

function mark(designs) {
  const place = new Map(designs.map((d, k) => [key(d), k]));
  for (const e of document.querySelectorAll('[data-design]')) {
    const k = place.get(e.dataset.design);
    e.classList.toggle('first', k === 0);
    e.classList.toggle('other', k > 0);
    if (k === 0 && e.closest('svg')) e.parentNode.append(e);   // in front of the others
  }
  for (const svg of document.querySelectorAll('svg[id]')) {
    const here = svg.querySelector(`[data-design="${key(designs[0])}"] title`);
    find(`${svg.id}-now`).textContent = here ? here.textContent : `${name(designs[0])} was not measured.`;
  }
}

function line(value) {
  for (const e of document.querySelectorAll('[data-budget]')) {
    const svg = e.closest('svg'), along = e.dataset.budget;
    const axis = table.axes[svg.id][along];
    const at = axis.start + (Math.log10(value) - axis.low) / (axis.high - axis.low) * (axis.end - axis.start);
    const inside = (at - axis.start) * (at - axis.end) <= 0;
    e.style.display = axis.option === option() && inside ? '' : 'none';
    e.setAttribute('transform', along === 'x' ? `translate(${at.toFixed(1)} 0)` : `translate(0 ${at.toFixed(1)})`);
  }
}

function show() {
  const b = budgets[option()], value = chosen[option()], k = stepAt(b, value);
  const designs = list(b.steps[k].designs), [first, ...others] = designs;
  slider.setAttribute('aria-valuetext', shown(value, b));
  find('proposed').textContent = `For ${shown(value, b)}: ${name(first)}`;
  facts(first);
  find('reason').textContent = `${first.why}.`;
  find('around').textContent = around(b, k);
  find('others').replaceChildren(...others.map(d => cells(document.createElement('tr'), [['th', name(d)],
    ['td', count(d.params), 'number'], ['td', count(d.latency), 'number'], ['td', d.why]])));
  find('commands').textContent = `ditnano design --${option().replace('_', '-')} ${value}\n` +
    `ditnano train --student ${key(first)} --out student/`;
  mark(designs);
  line(value);
}

function choose(value, from) {
  const b = budgets[option()];
  const fits = value >= lowest(b) && value <= b.largest;
  number.setAttribute('aria-invalid', String(!fits));
  if (!fits) return;
  chosen[option()] = Math.floor(value * b.per_unit + 1e-6) / b.per_unit;
  if (from !== slider) slider.value = toSlider(b, value);
  if (from !== number) number.value = value;
  show();
}

function changeOption() {
  const b = budgets[option()];
  find('unit').textContent = `Exactly, in ${b.unit}`;
  find('range').textContent = `From ${shown(lowest(b), b)} to ${shown(b.largest, b)}.`;
  Object.assign(number, { min: lowest(b), max: b.largest, step: 1 / b.per_unit });
  choose(chosen[option()]);
}

slider.addEventListener('input', () => choose(fromSlider(budgets[option()]), slider));
number.addEventListener('input', () => choose(number.valueAsNumber, number));
for (const e of document.querySelectorAll('input[name=option]')) e.addEventListener('change', changeOption);
find('controls').addEventListener('submit', event => event.preventDefault());
changeOption();
