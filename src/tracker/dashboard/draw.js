// The picture of the swarm and the curve of the last hour. Both say in words what they show.

import { clock, count, drawn, element, put, rate, size, span, the, whole } from './words.js';

const WIDTH = 680;
const HEIGHT = 600;
const CENTRE = [WIDTH / 2, HEIGHT / 2];
const RING = 182;
// Where the quiet ones are: around the others, or close together when there are no others.
const DIAL = 282;
const ALONE = 150;
// Lines that are seen to move; more would only cost.
const RUNNING = 48;

// Who sits where on the ring: a peer keeps its seat while it is there, and the ring is not much larger than it must be.
let seats = [];
function seated(ids) {
  const here = new Set(ids);
  seats = seats.map((id) => (here.has(id) ? id : null));
  for (const id of ids) {
    if (seats.includes(id)) continue;
    const free = seats.indexOf(null);
    if (free < 0) seats.push(id);
    else seats[free] = id;
  }
  if (seats.length > Math.max(6, ids.length * 1.5)) seats = seats.filter((id) => id !== null);
  return new Map(seats.map((id, at) => [id, (at / seats.length) * 2 * Math.PI - Math.PI / 2]));
}

const at = (angle, radius) => [CENTRE[0] + Math.cos(angle) * radius, CENTRE[1] + Math.sin(angle) * radius];
const round = (n) => Math.round(n * 100) / 100;
const points = (...xy) => xy.map(round).join(' ');

// The seats' directions, and the picture's own ids.
export function swarm(now) {
  const { nodes, lines, n_others: nOthers, others, n_moving: nMoving, rate: total, transfers, n_transfers: nTransfers } = now.swarm;
  const quiet = Math.max(0, now.members.online - nMoving);
  const picture = the('picture');
  picture.replaceChildren();
  const margin = nodes.length === 0 ? DIAL - ALONE - 20 : 0;
  picture.setAttribute('viewBox', `0 ${margin} ${WIDTH} ${HEIGHT - 2 * margin}`);
  dial(picture, quiet, nodes.length === 0 ? ALONE : DIAL);
  if (nodes.length === 0) centre(picture, count(quiet, 'peer'), 'online, nothing moves');
  const angles = seated(nodes.map((node) => node.peer_id));
  const places = nodes.map((node) => at(angles.get(node.peer_id), RING));
  const most = Math.max(1, ...lines.map((line) => line.rate));
  const defs = drawn('defs');
  picture.append(defs);
  // The weakest first, so that the strongest are on top.
  [...lines].reverse().forEach((line, i) => {
    const from = line.from === null ? CENTRE : places[line.from];
    const to = line.to === null ? CENTRE : places[line.to];
    flow(picture, defs, `f${i}`, from, to, line.rate / most, lines.length - i <= RUNNING);
  });
  const heaviest = Math.max(1, ...nodes.map((node) => node.send_rate + node.receive_rate));
  nodes.forEach((node, i) => peer(picture, node, places[i], angles.get(node.peer_id), heaviest, seats.length));
  if (nOthers > 0) rest(picture, nOthers, others);
  const senders = nodes.filter((node) => node.send_rate > 0).length;
  const words = nMoving === 0
    ? `${count(now.members.online, 'peer')} online, nothing moves.`
    : `${count(nTransfers, 'transfer')} at ${rate(total)} between ${count(nMoving, 'peer')}; of the ${nodes.length} drawn, ${senders} send. ${count(quiet, 'other peer')} online and quiet. The table of transfers has the details.`;
  if (picture.getAttribute('aria-label') !== words) picture.setAttribute('aria-label', words);
  put(the('swarm-note'), nMoving === 0 ? `${whole(now.members.online)} online` : `${whole(nMoving)} moving, ${whole(quiet)} quiet`);
  return { transfers, nTransfers };
}

// A dot for each quiet peer, or a tick if there are many.
function dial(picture, quiet, radius) {
  const circle = (attributes) => drawn('circle', { cx: CENTRE[0], cy: CENTRE[1], r: radius, ...attributes });
  picture.append(circle({ class: 'orbit' }));
  if (quiet === 0) return;
  const pitch = (2 * Math.PI * radius) / quiet;
  const dots = pitch > 14;
  const tick = dots ? 0.01 : pitch * 0.5;
  picture.append(circle({
    class: dots ? 'idle dotted' : 'idle', 'stroke-width': dots ? 8 : 7,
    'stroke-dasharray': `${tick} ${pitch - tick}`, transform: `rotate(-90 ${points(...CENTRE)})`,
  }));
}

function centre(picture, large, small) {
  picture.append(
    drawn('text', { x: CENTRE[0], y: CENTRE[1] - 2, 'text-anchor': 'middle', 'font-size': 20 }, large),
    drawn('text', { x: CENTRE[0], y: CENTRE[1] + 18, 'text-anchor': 'middle', class: 'soft' }, small));
}

function flow(picture, defs, id, from, to, strength, runs) {
  const width = round(0.8 + 6.7 * Math.sqrt(strength));
  // Bent towards the centre, and to one side, so that two ways between two peers are two lines.
  const bend = [(from[0] + to[0]) / 2, (from[1] + to[1]) / 2];
  const side = [(to[1] - from[1]) * 0.1, (from[0] - to[0]) * 0.1];
  const by = [bend[0] * 0.45 + CENTRE[0] * 0.55 + side[0], bend[1] * 0.45 + CENTRE[1] * 0.55 + side[1]];
  const d = `M${points(...from)}Q${points(...by, ...to)}`;
  defs.append(drawn('linearGradient', { id, gradientUnits: 'userSpaceOnUse', x1: round(from[0]), y1: round(from[1]), x2: round(to[0]), y2: round(to[1]) },
    drawn('stop', { offset: 0, 'stop-opacity': round(0.1 + 0.15 * strength) }),
    drawn('stop', { offset: 1, 'stop-opacity': round(0.2 + 0.7 * Math.sqrt(strength)) })));
  picture.append(drawn('path', { class: 'flow', d, 'stroke-width': width, stroke: `url(#${id})` }));
  if (runs && width > 2) picture.append(drawn('path', { class: 'run', d }));
}

function peer(picture, node, [x, y], angle, heaviest, n) {
  const radius = 7 + 9 * Math.sqrt((node.send_rate + node.receive_rate) / heaviest);
  const receives = node.bytes_total > 0;
  const group = drawn('g', {}, drawn('title', {}, about(node)));
  group.append(drawn('circle', { class: 'node', cx: round(x), cy: round(y), r: round(radius) }));
  if (receives) {
    const ring = 2 * Math.PI * radius;
    const have = (node.bytes_done / node.bytes_total) * ring;
    group.append(
      drawn('circle', { class: 'groove', cx: round(x), cy: round(y), r: round(radius), 'stroke-width': 3.5 }),
      drawn('circle', {
        class: 'hold', cx: round(x), cy: round(y), r: round(radius), 'stroke-width': 3.5,
        'stroke-dasharray': points(have, ring), transform: `rotate(-90 ${points(x, y)})`,
      }));
  }
  if (node.send_rate > 0) {
    const share = receives ? node.send_rate / (node.send_rate + node.receive_rate) : 1;
    group.append(drawn('circle', { class: 'sends', cx: round(x), cy: round(y), r: round(Math.max(2.5, (radius - (receives ? 3.5 : 0)) * Math.sqrt(share))) }));
  }
  group.append(label(node, angle, radius, n));
  picture.append(group);
}

function label(node, angle, radius, n) {
  const short = node.peer_id.slice(0, 8);
  const amount = node.receive_rate >= node.send_rate ? node.receive_rate : node.send_rate;
  const left = Math.cos(angle) < -0.01;
  const [x, y] = at(angle, RING + radius + 8);
  if (n > 16) {
    // Like the spokes of a wheel.
    const turn = (angle * 180) / Math.PI + (left ? 180 : 0);
    return drawn('text', { class: 'id', x: round(x), y: round(y), 'text-anchor': left ? 'end' : 'start', 'dominant-baseline': 'central', transform: `rotate(${round(turn)} ${points(x, y)})` }, short);
  }
  const upright = Math.abs(Math.cos(angle)) < 0.25;
  const anchor = upright ? 'middle' : left ? 'end' : 'start';
  const down = upright ? (Math.sin(angle) < 0 ? -14 : 10) : 0;
  return drawn('g', {},
    drawn('text', { class: 'id', x: round(x), y: round(y + down), 'text-anchor': anchor }, short),
    drawn('text', { class: 'soft', x: round(x), y: round(y + down + 13), 'text-anchor': anchor }, rate(amount)));
}

function rest(picture, n, node) {
  picture.append(drawn('g', {},
    drawn('title', {}, `${count(n, 'more peer')}: ${about(node)}`),
    drawn('circle', { class: 'others', cx: CENTRE[0], cy: CENTRE[1], r: 38 })));
  centre(picture, `+${whole(n)}`, 'more');
}

function about(node) {
  const words = [];
  if (node.peer_id) words.push(node.peer_id);
  if (node.send_rate > 0) words.push(`sends ${rate(node.send_rate)}`);
  if (node.bytes_total > 0) words.push(`receives ${rate(node.receive_rate)}, has ${size(node.bytes_done)} of ${size(node.bytes_total)}`);
  return words.join('; ');
}

const CHART = { left: 74, right: 552, top: 12, bottom: 160 };

// `past` has the bytes of each bucket since `first`; the last one is still filling and is not drawn.
export function chart(past, now) {
  const seconds = past.bucketSeconds;
  const rates = past.bytes.slice(0, -1).map((bytes) => bytes / seconds);
  const minutes = [10, 20, 30, 60].find((m) => rates.length * seconds <= m * 60) ?? 60;
  const shown = rates.slice(-(minutes * 60) / seconds);
  const top = ceiling(Math.max(...shown, 0));
  const { left, right, top: upper, bottom } = CHART;
  const across = (right - left) / (minutes * 60);
  const x = (i) => right - (shown.length - 1 - i) * seconds * across;
  const y = (value) => bottom - (value / top) * (bottom - upper);
  const picture = the('chart');
  const parts = [];
  for (const part of [0, 0.5, 1]) {
    parts.push(drawn('line', { class: part === 0 ? 'base' : 'grid', x1: left, x2: right, y1: y(top * part), y2: y(top * part) }),
      drawn('text', { x: left - 8, y: y(top * part) + 4, 'text-anchor': 'end' }, part === 0 ? '0' : rate(top * part)));
  }
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const text = part === 1 ? 'now' : `${round(minutes * (1 - part))} min ago`;
    parts.push(drawn('text', { x: left + (right - left) * part, y: bottom + 18, 'text-anchor': part === 1 ? 'end' : part === 0 ? 'start' : 'middle' }, text));
  }
  if (shown.length > 1) {
    const line = shown.map((value, i) => points(x(i), y(value))).join('L');
    parts.push(drawn('path', { class: 'area', d: `M${points(x(0), bottom)}L${line}L${points(right, bottom)}Z` }),
      drawn('path', { class: 'curve', d: `M${line}` }));
  }
  picture.replaceChildren(...parts);
  const peak = Math.max(...shown, 0);
  const delivered = past.bytes.reduce((sum, bytes) => sum + bytes, 0);
  const words = `Bytes delivered a second in the last ${minutes} minutes: now ${rate(shown.at(-1) ?? 0)}, at most ${rate(peak)}.`;
  if (picture.getAttribute('aria-label') !== words) picture.setAttribute('aria-label', words);
  put(the('rate-note'), delivered > 0 ? `${size(delivered)} within the hour, peak ${rate(peak)}` : 'nothing yet');
  rows(shown, seconds, minutes, now);
}

// The next power of two in its unit, so that the labels are short.
function ceiling(value) {
  let top = 1024;
  while (top < value) top *= 2;
  return top;
}

function rows(shown, seconds, minutes, now) {
  const step = (minutes / 10) * 60;
  const per = step / seconds;
  const lines = [];
  for (let end = shown.length; end > 0; end -= per) {
    const part = shown.slice(Math.max(0, end - per), end);
    const sum = part.reduce((a, b) => a + b, 0);
    const until = now.time - (shown.length - end) * seconds;
    lines.push([clock(until), rate(sum / part.length), rate(Math.max(...part)), size(sum * seconds)]);
  }
  the('chart-rows').replaceChildren(...lines.map(([until, ...cells]) =>
    element('tr', {}, element('th', { scope: 'row' }, until), ...cells.map((cell) => element('td', { class: 'num' }, cell)))));
}

// How often contents are there, as one bar with its key.
export function copies(files, choose) {
  const words = [['no whole copy', 'incomplete'], ['one copy', 'last'], ['two'], ['three or four'], ['five and more']];
  const total = Math.max(1, files.copies.reduce((a, b) => a + b, 0));
  let from = 0;
  const parts = files.copies.map((n, i) => {
    const width = (n / total) * 1000;
    const part = drawn('rect', { class: `c${i}`, x: round(from), width: round(Math.max(n > 0 ? 3 : 0, width - 1.5)), height: 12 });
    from += width;
    return part;
  });
  the('copies').replaceChildren(drawn('svg', { viewBox: '0 0 1000 12', preserveAspectRatio: 'none', 'aria-hidden': true },
    drawn('rect', { class: 'none', width: 1000, height: 12 }), ...parts));
  const text = files.copies.map((n, i) => `${words[i][0]}: ${whole(n)}`).join(', ');
  the('copies').setAttribute('aria-label', `Contents by the number of peers that hold the whole: ${text}`);
  const key = the('copies-key');
  if (key.dataset.said === text) return;
  key.dataset.said = text;
  key.replaceChildren(...files.copies.map((n, i) => element('li', {},
    drawn('svg', { class: `sw c${i}`, viewBox: '0 0 10 10', 'aria-hidden': true }, drawn('rect', { width: 10, height: 10, rx: 2 })),
    `${words[i][0]} `, element('b', {}, whole(n)))));
}

export const left = (transfer) =>
  transfer.rate > 0 ? span((transfer.bytes_total - transfer.bytes_done) / transfer.rate) : '–';
