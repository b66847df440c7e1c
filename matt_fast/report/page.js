'use strict';
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const dataOf = place => JSON.parse(place.querySelector('script[type="application/json"]').textContent);
const made = (name, text) => Object.assign(document.createElement(name), {textContent: text});

// Colours: as the system, light, dark. What was chosen is kept where the browser lets a file do so.
const theme = document.querySelector('#theme'), THEMES = {'': 'as the system', light: 'light', dark: 'dark'};
function show(name) {
  if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme;
  theme.textContent = `Colours: ${THEMES[name]}`;
}
let chosen = '';
try { chosen = localStorage.getItem('matt-fast-theme') ?? ''; } catch { /* no storage */ }
if (!(chosen in THEMES)) chosen = '';
theme.hidden = false;
theme.addEventListener('click', () => {
  const names = Object.keys(THEMES);
  show(chosen = names[(names.indexOf(chosen) + 1) % names.length]);
  try { localStorage.setItem('matt-fast-theme', chosen); } catch { /* no storage */ }
});
show(chosen);

// A pointer's place in the units of an SVG's viewBox.
function placeIn(svg, event) {
  const box = svg.getBoundingClientRect(), [, , width, height] = svg.getAttribute('viewBox').split(' ').map(Number);
  const scale = Math.min(box.width / width, box.height / height);
  return [(event.clientX - box.left - (box.width - width * scale) / 2) / scale,
          (event.clientY - box.top - (box.height - height * scale) / 2) / scale];
}
function short(number) {
  return Math.abs(number) >= 1e5 || (number && Math.abs(number) < 1e-3) ? number.toExponential(2) : String(number);
}

// Curves: the values at the step that is nearest.
for (const figure of all('figure.chart')) {
  const data = dataOf(figure), svg = figure.querySelector('svg'), cursor = figure.querySelector('.cursor');
  const readout = figure.querySelector('.readout'), still = readout.textContent;
  const [low, high, start, end] = data.x;
  const steps = [...new Set(data.series.flatMap(one => one.x))].sort((a, b) => a - b);
  let at = -1;
  function point(index) {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], x = start + (step - low) / (high - low) * (end - start);
    const values = data.series.map(one => {
      let best = 0;
      one.x.forEach((value, i) => { if (Math.abs(value - step) < Math.abs(one.x[best] - step)) best = i; });
      return `${one.name} ${short(one.y[best])}`.trim();
    });
    cursor.setAttribute('x1', x); cursor.setAttribute('x2', x); cursor.setAttribute('visibility', 'visible');
    readout.textContent = `step ${Math.round(step).toLocaleString('en')}: ${values.join(' · ')}`;
  }
  function leave() { at = -1; cursor.setAttribute('visibility', 'hidden'); readout.textContent = still; }
  svg.addEventListener('pointermove', event => {
    const step = low + (placeIn(svg, event)[0] - start) / (end - start) * (high - low);
    let best = 0;
    steps.forEach((value, i) => { if (Math.abs(value - step) < Math.abs(steps[best] - step)) best = i; });
    point(best);
  });
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('blur', leave);
  svg.addEventListener('keydown', event => {
    const to = {ArrowLeft: at < 0 ? steps.length - 1 : at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1}[event.key];
    if (to !== undefined) { event.preventDefault(); point(to); }
  });
}

// Maps of attention influence: the value of the cell.
for (const figure of all('figure.map')) {
  const data = dataOf(figure), svg = figure.querySelector('svg'), cursor = figure.querySelector('.cursor');
  const readout = figure.querySelector('.readout'), still = readout.textContent, {margin, cell} = data;
  let place = [0, 0];
  function point(i, j) {
    if (data.values[i]?.[j] === undefined) return;
    place = [i, j];
    cursor.setAttribute('x', j); cursor.setAttribute('y', i);
    cursor.setAttribute('visibility', 'visible');
    readout.textContent = `${data.labels[i]} draws on ${data.labels[j]}: ${short(data.values[i][j])}`;
  }
  function leave() { cursor.setAttribute('visibility', 'hidden'); readout.textContent = still; }
  svg.addEventListener('pointermove', event => {
    const [x, y] = placeIn(svg, event);
    point(Math.floor(y / cell), Math.floor((x - margin) / cell));
  });
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('blur', leave);
  svg.addEventListener('keydown', event => {
    const by = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]}[event.key];
    if (by) { event.preventDefault(); point(place[0] + by[0], place[1] + by[1]); }
  });
}

// Tables of tokens: the data is all there, a page of rows is drawn. Texts are only ever set as texts.
const ROWS = 50, TEXTS = new Set(['token', 'start', 'pieces']), NEAR = new Set(['before', 'after']);
for (const part of all('.tokens')) {
  const data = dataOf(part), body = part.querySelector('tbody'), search = part.querySelector('input');
  const count = part.querySelector('output'), pages = part.querySelector('.pager span');
  const heads = all('th', part), total = data.id.length, lower = data.token.map(token => token.toLowerCase());
  const first = heads.find(head => head.hasAttribute('aria-sort')), marked = new Set(data.marked);
  let key = first.dataset.key, sign = first.getAttribute('aria-sort') === 'ascending' ? 1 : -1, page = 0, found = [];
  const pieces = i => data.pieces[i].map(place => data.old[place]);
  const value = {start: i => data.starts[data.start[i]], pieces: i => pieces(i).join('')};
  const keyOf = i => key in value ? value[key](i) : data[key][i];
  function cellOf(name, i) {
    const cell = document.createElement('td');
    if (name === 'token') cell.append(made('bdi', data.token[i]));
    else if (name === 'pieces') pieces(i).forEach(text => cell.append(made('bdi', text)));
    else if (NEAR.has(name)) data[name][i].forEach(([place, cosine]) =>
      cell.append(made('bdi', data.old[place]), made('small', cosine.toFixed(2)), ' '));
    else {
      cell.textContent = name === 'start' ? value.start(i) : name === 'id' ? data.id[i] : data[name][i]?.toLocaleString('en') ?? '';
      if (name !== 'start') cell.className = 'number';
    }
    return cell;
  }
  function draw() {
    const last = Math.max(0, Math.ceil(found.length / ROWS) - 1);
    page = Math.max(0, Math.min(page, last));
    body.replaceChildren(...found.slice(page * ROWS, (page + 1) * ROWS).map(i => {
      const row = document.createElement('tr');
      row.classList.toggle('marked', marked.has(i));
      row.append(...heads.map(head => cellOf(head.dataset.key, i)));
      return row;
    }));
    count.textContent = `${found.length.toLocaleString('en')} of ${total.toLocaleString('en')} tokens`;
    pages.textContent = `page ${page + 1} of ${last + 1}`;
    for (const button of all('.pager button', part))
      button.disabled = page === (button.dataset.step < 0 ? 0 : last);
  }
  function order() {
    const keys = new Map(found.map(i => [i, keyOf(i)]));
    found.sort((a, b) => {
      const x = keys.get(a), y = keys.get(b);
      return (x < y ? -sign : x > y ? sign : 0) || data.id[a] - data.id[b];
    });
    page = 0;
    draw();
  }
  function filter() {
    const wanted = search.value.toLowerCase().replaceAll(' ', '\u2423');
    found = [...data.id.keys()].filter(i => lower[i].includes(wanted) || String(data.id[i]) === wanted);
    order();
  }
  for (const head of heads) {
    head.querySelector('button')?.addEventListener('click', () => {
      sign = head.dataset.key === key ? -sign : TEXTS.has(head.dataset.key) || head.dataset.key === 'id' ? 1 : -1;
      key = head.dataset.key;
      heads.forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
      order();
    });
  }
  for (const button of all('.pager button', part))
    button.addEventListener('click', () => { page += Number(button.dataset.step); draw(); });
  search.addEventListener('input', filter);
  filter();
}

// The configuration: copied, or selected where the browser does not let a page copy.
for (const button of all('button.copy')) {
  const text = button.parentElement.querySelector('code');
  button.addEventListener('click', async () => {
    let done = true;
    try { await navigator.clipboard.writeText(text.textContent); } catch {
      getSelection().selectAllChildren(text);
      done = document.execCommand('copy');
    }
    button.textContent = done ? 'Copied' : 'Press Ctrl+C';
    setTimeout(() => { button.textContent = 'Copy'; }, 2000);
  });
}
