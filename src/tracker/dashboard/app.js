// The page: follows the tracker's events and shows them. It asks and never changes anything.

import { bar, clock, count, date, drawn, element, name, plain, put, quoted, rate, size, span, the, whole } from './words.js';
import { chart, copies, left, swarm } from './draw.js';
import { Table, say } from './table.js';

const DAY = 86400;
// Silence after which the connection counts as lost, milliseconds.
const SILENCE = 6000;
const RETRY = 3000;

// ---- files ----

// A dot for each peer that has the whole, and a ring for each that has a part; at most eight.
function dots(complete, partial) {
  const shown = Math.min(8, complete);
  const parts = Math.min(8 - shown, partial);
  const all = [...Array(shown).fill(complete === 1 ? 'lone' : 'whole'), ...Array(parts).fill('part')];
  return drawn('svg', { class: 'dots', width: Math.max(1, all.length) * 11, height: 9, 'aria-hidden': true },
    ...all.map((kind, i) => drawn('circle', { class: kind, cx: i * 11 + 4.5, cy: 4.5, r: kind === 'part' ? 3.4 : 4 })));
}

function held(row) {
  const parts = row.partial > 0 ? `, ${count(row.partial, 'part')}` : '';
  if (row.complete === 0) return [element('span', { class: 'tag bad' }, 'no whole copy'), parts.replace(',', '')];
  if (row.complete === 1) return [dots(row.complete, row.partial), element('span', { class: 'tag warn' }, 'last copy'), parts.replace(',', '')];
  return [dots(row.complete, row.partial), `${whole(row.complete)}${parts}`];
}

const files = new Table('files', 'file', {
  key: (row) => `${row.content_id}/${row.name}`,
  make(row) {
    const open = element('button', { class: 'open', 'aria-expanded': false, title: plain(row.name) }, name(row.name, { class: 'cut' }));
    const tr = element('tr', {}, element('th', { scope: 'row' }, open), element('td', { class: 'num' }), element('td'),
      element('td', { class: 'mono' }, element('span', { title: row.content_id }, `${row.content_id.slice(0, 12)}…`)));
    open.addEventListener('click', () => unfold(tr, open, row));
    return tr;
  },
  update(tr, row) {
    const said = `${row.size} ${row.complete} ${row.partial}`;
    if (tr.dataset.said === said) return;
    tr.dataset.said = said;
    put(tr.cells[1], size(row.size));
    tr.cells[2].replaceChildren(...held(row));
  },
});

async function unfold(tr, open, row) {
  if (tr.detail) {
    tr.detail.remove();
    tr.detail = null;
    open.setAttribute('aria-expanded', 'false');
    return;
  }
  const list = element('dl', {}, element('dt', {}, 'Name'), element('dd', { class: 'whole' }, name(row.name)),
    element('dt', {}, 'Content id'), element('dd', { class: 'mono' }, row.content_id),
    element('dt', {}, 'To fetch it'), element('dd', {}, element('code', {}, `sprat get ${plain(quoted(row.name))}`)));
  tr.detail = element('tr', { class: 'opened' }, element('td', { colspan: 4 }, list));
  tr.after(tr.detail);
  open.setAttribute('aria-expanded', 'true');
  const answer = await fetch(`/api/file?content_id=${row.content_id}`).catch(() => null);
  if (!answer?.ok) {
    list.append(element('dt', {}, 'Held by'), element('dd', {}, 'nobody any more'));
    return;
  }
  const { sources, n_sources: n, names } = await answer.json();
  for (const also of names.filter((other) => other !== row.name).slice(0, 8)) {
    list.append(element('dt', {}, 'Also called'), element('dd', { class: 'whole' }, name(also)));
  }
  sources.forEach((source, i) => list.append(element('dt', {}, i === 0 ? `Held by ${whole(n)}` : ''),
    element('dd', {}, element('span', { class: 'mono' }, source.peer_id), source.partial ? ' has a part, ' : ' ', plain(source.addresses.join(', ')))));
}

// ---- members ----

const STATES = { online: 'online', away: 'away', unseen: 'not seen', expired: 'expired', revoked: 'revoked' };
const SAYS = {
  away: 'was here since the tracker started',
  unseen: 'has not come since the tracker started',
  expired: 'its certificate has ended; it renews it when it comes back within 30 days, and joins again after that',
  revoked: 'thrown out; sprat tracker approve lets it in again',
};
let current = null;

function moved(now, total) {
  if (now > 0) return rate(now);
  return total > 0 ? element('span', { class: 'quiet', title: 'since it started' }, size(total)) : element('span', { class: 'quiet' }, '–');
}

function until(seconds, now) {
  if (seconds === null) return '–';
  const rest = seconds - now;
  const kind = rest <= 0 ? 'over' : rest < DAY ? 'late' : '';
  return element('span', { class: kind, title: date(seconds) }, rest <= 0 ? `ended ${span(-rest)} ago` : span(rest));
}

const members = new Table('members', 'member', {
  key: (row) => row.peer_id,
  make: (row) => element('tr', {}, element('td'),
    element('th', { scope: 'row', class: 'mono' }, element('span', { class: 'cut', title: row.peer_id }, row.peer_id)),
    ...['', 'num', 'num', 'num', '', 'num', 'num'].map((kind) => element('td', { class: kind || null }))),
  update(tr, row) {
    const now = current?.time ?? Date.now() / 1000;
    const lease = current?.health.lease_seconds ?? 30;
    const [more, some] = [row.addresses.length - 1, row.lease_seconds_left];
    const cells = [
      element('span', { class: `state ${row.state}`, title: SAYS[row.state] }, STATES[row.state]),
      null,
      element('span', { class: 'cut', title: plain(row.addresses.join('\n')) }, plain(row.addresses[0] ?? '–'), more > 0 ? ` +${more}` : ''),
      row.state === 'online' ? whole(row.files) : '–',
      moved(row.send_rate, row.bytes_sent),
      moved(row.receive_rate, row.bytes_received),
      some === null ? element('span', { class: 'quiet' }, '–') : element('span', {}, bar(some / lease, some < lease / 3 ? 'low' : 'full', 34), `${some} s`),
      until(row.certified_until, now),
      row.state === 'online' ? 'now' : row.seen_at === null ? element('span', { class: 'quiet' }, 'not yet') : element('span', { title: date(row.seen_at) }, `${span(now - row.seen_at)} ago`),
    ];
    cells.forEach((cell, i) => cell !== null && tr.cells[i].replaceChildren(cell));
  },
});

// ---- the rest ----

function glance(now) {
  const { members: m, files: f, swarm: s } = now;
  const all = m.online + m.away + m.unseen + m.expired + m.revoked;
  put(the('g-online'), whole(m.online));
  put(the('g-online-more'), `of ${count(all - m.revoked, 'member')}${m.revoked > 0 ? `, ${whole(m.revoked)} revoked` : ''}`);
  put(the('g-bytes'), size(f.bytes));
  put(the('g-bytes-more'), `${count(f.files, 'file')}, ${count(f.contents, 'content')}`);
  put(the('g-last'), whole(f.copies[1]));
  put(the('g-last-more'), f.copies[0] > 0 ? `and ${whole(f.copies[0])} that nobody has whole` : f.copies[1] > 0 ? 'gone if one peer goes' : f.contents > 0 ? 'everything is there twice' : 'nothing is shared');
  the('g-last-box').className = f.copies[0] > 0 ? 'bad' : f.copies[1] > 0 ? 'warn' : '';
  put(the('g-rate'), rate(s.rate));
  put(the('g-rate-more'), s.n_transfers === 0 ? 'no transfers' : `${count(s.n_transfers, 'transfer')}, ${count(s.n_moving, 'peer')}`);
  const found = troubles(now);
  put(the('g-health'), found.length === 0 ? 'Good' : count(found.length, 'warning'));
  put(the('g-health-more'), found[0]?.[1] ?? 'certificates and leases');
  the('g-health-box').className = found.length === 0 ? 'ok' : found.some(([kind]) => kind === 'bad') ? 'bad' : 'warn';
  document.title = `${s.rate > 0 ? `${rate(s.rate)} · ` : ''}${whole(m.online)} online · sprat tracker`;
}

function troubles(now) {
  const { health: h, members: m, time } = now;
  const found = [];
  const check = (what, end, warn) => {
    if (end === null) return;
    if (end <= time) found.push(['bad', `${what} has ended`]);
    else if (end - time < warn) found.push(['warn', `${what} ends in ${span(end - time)}`]);
  };
  check('the authority', h.authority_until, 90 * DAY);
  // The tracker renews the one at two thirds of its life; the other one is the operator's to renew.
  for (const { what, until: end } of h.certificates) check(what === 'own' ? 'your own certificate' : "the tracker's certificate", end, what === 'own' ? 21 * DAY : DAY / 2);
  if (m.ending > 0) found.push(['warn', `${count(m.ending, 'certificate')} end${m.ending === 1 ? 's' : ''} within a day`]);
  if (m.late > 0) found.push(['warn', `${count(m.late, 'peer')} late with ${m.late === 1 ? 'its' : 'their'} heartbeat`]);
  if (h.memory_used > h.memory_budget * 0.9) found.push(['warn', 'the memory budget is nearly used up']);
  return found;
}

// Empty states say what to do next.
function empty(id, isEmpty, title, text, ...commands) {
  const box = the(id);
  box.hidden = !isEmpty;
  if (!isEmpty || box.dataset.said === title) return;
  box.dataset.said = title;
  box.replaceChildren(element('b', {}, title), text, ...commands.map((command) => element('code', {}, command)));
}

function guide(now) {
  const { members: m, files: f, swarm: s } = now;
  const nobody = m.online + m.away + m.unseen + m.expired === 0;
  const link = 'sprat join LINK';
  if (nobody) {
    empty('swarm-empty', true, 'Nobody has joined yet', 'Make a link on this machine, and use it on each of the others:', 'sprat tracker token create', link, 'sprat peer --share FOLDER');
  } else {
    empty('swarm-empty', m.online === 0, 'Nobody is online', 'On a machine that has joined:', 'sprat peer --share FOLDER');
  }
  the('picture').toggleAttribute('hidden', m.online === 0);
  document.querySelector('#swarm .legend').hidden = m.online === 0;
  empty('transfers-empty', s.n_transfers === 0, 'Nothing moves now', 'On any member:', 'sprat get NAME');
  the('transfers-scroll').hidden = s.n_transfers === 0;
  empty('files-empty', f.files === 0, 'Nothing is shared yet', 'On a member whose peer runs:', 'sprat share FOLDER');
  for (const id of ['files-body', 'copies', 'copies-key']) the(id).hidden = f.files === 0;
  empty('members-empty', nobody && m.revoked === 0, 'No members', 'Whoever joins is listed here, online or not:', link);
  the('members-body').hidden = nobody && m.revoked === 0;
  put(the('files-note'), f.files === 0 ? '' : `${count(f.contents, 'content')}, each counted once: ${size(f.bytes)}`);
  const states = [[m.away, 'away'], [m.unseen, 'not seen since the start'], [m.expired, 'expired'], [m.revoked, 'revoked']];
  put(the('members-note'), [`${whole(m.online)} online`, ...states.filter(([n]) => n > 0).map(([n, what]) => `${whole(n)} ${what}`)].join(', '));
}

function transfers(list, total) {
  const body = the('transfers');
  const make = (t) => {
    const what = t.name !== null ? name(t.name.split('/').at(-1), { class: 'cut', title: plain(t.name) }) : element('span', { class: 'quiet' }, t.content_id ? `${t.content_id.slice(0, 12)}…` : count(t.files_total, 'file'));
    const part = t.bytes_total > 0 ? t.bytes_done / t.bytes_total : 0;
    const from = t.sources.map((source) => `${source.peer_id.slice(0, 8)} ${rate(source.rate)}`).join('\n');
    return element('tr', {}, element('th', { scope: 'row' }, what, t.files_total > 1 && t.name !== null ? element('small', { class: 'quiet' }, `${whole(t.files_done)} of ${count(t.files_total, 'file')}`) : ''),
      element('td', { class: 'mono', title: t.peer_id }, t.peer_id.slice(0, 8)),
      element('td', { title: `${size(t.bytes_done)} of ${size(t.bytes_total)}` }, bar(part, 'have'), `${Math.floor(part * 100)} %`),
      element('td', { class: 'num' }, rate(t.rate)), element('td', { class: 'num', title: from }, whole(t.n_sources)), element('td', { class: 'num' }, left(t)));
  };
  body.replaceChildren(...list.map(make));
  put(the('transfers-note'), total > list.length ? `the ${list.length} fastest of ${whole(total)}` : '');
}

function facts(id, pairs) {
  the(id).replaceChildren(...pairs.flatMap(([what, value, long]) =>
    [element('dt', {}, what), element('dd', { class: long ? 'long mono' : null }, value)]));
}

function health(now) {
  const { health: h, members: m, network: n, time } = now;
  const names = { issued: 'The tracker, renews itself', own: 'Your own for the tracker' };
  facts('h-certificates', [['Authority', until(h.authority_until, time)],
    ...h.certificates.map(({ what, until: end }) => [names[what], until(end, time)]),
    ['First of those online', until(m.first_end, time)], ['Online, ending within a day', whole(m.ending)], ['Ended, away', whole(m.expired)]]);
  facts('h-leases', [['Heartbeat every', `${h.heartbeat_seconds} s`], ['Forgotten after', `${h.lease_seconds} s`],
    ['Online', whole(m.online)], ['Late', whole(m.late)], ['Away since the start', whole(m.away)], ['Revoked', whole(m.revoked)]]);
  facts('h-invitations', h.invitations.slice(0, 6).map((token) => [`${token.token_id}, ${span(token.expires_at - time)} left`, count(token.uses_left, 'use')]));
  const more = h.n_invitations > 6 ? `and ${h.n_invitations - 6} more. ` : '';
  const invite = h.n_invitations === 0 ? 'Nobody can join now. For a link:' : `${more}For another link:`;
  if (the('h-invite').dataset.said !== invite) {
    the('h-invite').dataset.said = invite;
    the('h-invite').replaceChildren(invite, element('code', {}, 'sprat tracker token create --uses 1'));
  }
  facts('h-tracker', [['Version', n.version], ['Running for', span(time - n.started_at)], ['Memory for listings', `${size(h.memory_used)} of ${size(h.memory_budget)}`],
    ['Trust list', `epoch ${whole(h.trust_epoch)}`], ['Authority key', n.fingerprint, true]]);
  const found = troubles(now);
  put(the('health-note'), found.map(([, text]) => text).join('; ') || 'all well');
}

// ---- following ----

let past = null;

async function history() {
  const answer = await fetch('/api/history');
  const { first, bytes, bucket_seconds: bucketSeconds } = await answer.json();
  past = { first, bytes, bucketSeconds };
}

// Takes the newest buckets over; false if some between were missed.
function extend({ first, bytes }) {
  const from = first - past.first;
  if (from < 0 || from > past.bytes.length) return false;
  past.bytes.splice(from, past.bytes.length, ...bytes);
  const over = past.bytes.length - 720;
  if (over > 0) {
    past.bytes.splice(0, over);
    past.first += over;
  }
  return true;
}

async function show(now) {
  current = now;
  put(the('address'), now.network.advertised.join(', '));
  glance(now);
  guide(now);
  const { transfers: list, nTransfers } = swarm(now);
  transfers(list, nTransfers);
  copies(now.files);
  health(now);
  files.tick();
  members.tick();
  if (past === null || !extend(now.history)) await history();
  chart(past, now);
}

let events = null;
let heard = 0;

function state(kind, text) {
  const live = the('live');
  if (live.dataset.state !== kind && (kind === 'lost' || live.dataset.state === 'lost')) say(kind === 'lost' ? 'The tracker does not answer' : 'Following again');
  live.dataset.state = kind;
  put(the('live-text'), text);
  document.body.classList.toggle('stale', kind === 'lost');
}

function lost() {
  state('lost', current ? `No answer since ${clock(current.time)}` : 'No answer');
}

function follow() {
  events?.close();
  heard = performance.now();
  events = new EventSource('/api/events');
  events.onmessage = (event) => {
    heard = performance.now();
    const now = JSON.parse(event.data);
    state('live', `Live ${clock(now.time)}`);
    show(now).catch(() => {});
  };
  events.onerror = lost;
}

// A tab that nobody sees follows nothing.
document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    events?.close();
    events = null;
  } else {
    follow();
  }
});
setInterval(() => {
  if (!events || performance.now() - heard < SILENCE) return;
  lost();
  follow();
}, RETRY);

for (const choice of document.querySelectorAll('input[name="theme"]')) {
  choice.checked = choice.value === (document.documentElement.dataset.theme ?? 'system');
  choice.addEventListener('change', () => {
    if (choice.value === 'system') {
      localStorage.removeItem('theme');
      delete document.documentElement.dataset.theme;
    } else {
      localStorage.setItem('theme', choice.value);
      document.documentElement.dataset.theme = choice.value;
    }
  });
}

follow();
