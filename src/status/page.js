'use strict';
(() => {
  const EVERY = 2000, EVERY_WHILE_RUNNING = 500, PATIENCE = 10000;
  const $ = id => document.getElementById(id);
  // Texts are only ever set as text.
  const make = (space, tag, attributes, children) => {
    const element = space ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) element.setAttribute(name, value);
    element.append(...children.filter(child => child !== ''));
    return element;
  };
  const h = (tag, attributes, ...children) => make(false, tag, attributes, children);
  const svg = (tag, attributes, ...children) => make(true, tag, attributes, children);
  const say = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
  const put = (id, ...children) => $(id).replaceChildren(...children);

  const fixed = (number, digits) => (Math.round(number * 10 ** digits) / 10 ** digits).toFixed(digits);
  const bytes = count => {
    if (count < 1024) return count + ' B';
    let number = count / 1024, unit = 0;
    while (number >= 999.5 && unit < 4) { number /= 1024; unit++; }
    return fixed(number, number < 99.95 ? 1 : 0) + ' ' + ['KiB', 'MiB', 'GiB', 'TiB', 'PiB'][unit];
  };
  const short = seconds => {
    const millis = seconds * 1e3;
    return millis < 9.995 ? fixed(millis, 2) + ' ms' : millis < 999.5 ? fixed(millis, 0) + ' ms' : fixed(seconds, 1) + ' s';
  };
  const long = seconds => {
    seconds = Math.floor(Math.max(0, seconds));
    const minutes = Math.floor(seconds / 60), hours = Math.floor(seconds / 3600), days = Math.floor(seconds / 86400);
    if (!minutes) return seconds + ' s';
    if (!hours) return minutes + ' min';
    return days ? `${days} d ${hours % 24} h` : `${hours} h ${minutes % 60} min`;
  };
  const percent = (part, whole) => whole ? fixed(part * 100 / whole, 0) + ' %' : '–';
  const plural = (count, one) => `${count} ${one}${count === 1 ? '' : 's'}`;
  // The reader's own clock, where the page without a script has UTC.
  const moment = (unix, now) => {
    const date = new Date(unix * 1e3), two = number => String(number).padStart(2, '0');
    const clock = `${two(date.getHours())}:${two(date.getMinutes())}`;
    const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
    const near = Math.abs(now - unix) < 86400;
    return h('time', { datetime: date.toISOString() }, near ? `${clock}:${two(date.getSeconds())}` : `${day} ${clock}`);
  };

  const asked = t => t.hits + t.misses;
  const received = t => t.received_lan_bytes + t.received_wan_bytes;
  const sent = t => t.sent_lan_bytes + t.sent_wan_bytes;
  const tag = network => h('span', { class: 'tag ' + network }, network.toUpperCase());
  const cell = (name, type, ...children) => {
    const empty = !children.some(child => child !== '');
    return h('td', { role: 'cell', 'data-is': name, class: type + (empty ? ' none' : '') }, ...(empty ? ['–'] : children));
  };
  const lines = all => all.length ? all.flatMap((line, at) => at ? [h('br'), line] : [line]) : ['none'];

  const transfer = t => {
    const way = t.direction === 'in' ? 'from' : 'to', peer = t.peer || 'a peer';
    return h('div', { class: 'run' },
      h('p', {}, h('span', {}, t.name), h('span', { class: 'soft', title: t.reason || '' }, `${way} ${peer}`)),
      h('progress', { class: t.direction, max: Math.max(1, t.size), value: t.bytes, 'aria-label': `${t.name}, ${way} ${peer}` }),
      h('p', { class: 'soft' }, h('span', {}, `${bytes(t.bytes)} of ${bytes(t.size)}`), h('span', {}, bytes(t.bytes_per_second) + '/s')));
  };
  const FOUND = {
    broadcast: 'hello', 'neighbour-table': 'neighbour table', query: 'its query',
    answer: 'answer to a broadcast', flag: '--peer', tracker: 'tracker',
  };
  const state = (p, now) => {
    const since = p.silent_since === null ? '' : moment(p.silent_since, now);
    const silent = since ? ['silent since ', since] : ['silent'];
    const words = { live: ['live'], silent, unheard: ['never heard'] }[p.state] || [];
    const isMissed = p.found_by === 'flag' && words.length && p.state !== 'live';
    const heard = p.last_heard === null ? '' : `heard ${long(now - p.last_heard)} ago`;
    return [
      ...(isMissed ? [h('span', { class: 'bad' }, ...words)] : words),
      words.length && heard ? ', ' : '',
      heard && h('span', { class: 'soft' }, heard),
    ];
  };
  const peer = (p, now) => {
    const a = p.avoided, trip = p.round_trip_seconds ?? p.narinfo_seconds;
    return h('tr', { role: 'row' },
      cell('Peer', '', p.address, ' ', tag(p.network), p.id === null ? '' : h('code', {}, p.id)),
      cell('Found by', '', FOUND[p.found_by] || 'its request'),
      cell('State', '', ...state(p, now)),
      cell('Round trip', '', trip === null ? '' : short(trip)),
      cell('Gave', '', `${plural(p.hits, 'hit')}, ${plural(p.nars, 'NAR')}${p.failures ? ', ' + plural(p.failures, 'failure') : ''}`),
      cell('From it', 'n', bytes(p.received_bytes)),
      cell('To it', 'n', bytes(p.sent_bytes)),
      a ? cell('Avoided', '', h('span', { class: 'bad' }, 'until ', moment(a.until, now), `${a.wholly ? '' : ', unless nobody else has a path'}:`), ' ' + a.reason)
        : cell('Avoided', '', ''));
  };
  const lookup = (l, now) => h('tr', { role: 'row' },
    cell('Path', '', l.name || '', h('code', {}, l.hash_part)),
    cell('At', '', moment(l.time, now)),
    l.hit ? cell('Result', '', h('span', { class: 'good' }, 'found'), ` at ${l.peer} `, tag(l.network))
      : cell('Result', '', h('span', { class: 'bad' }, 'not found'), ': ' + l.miss.text),
    cell('Took', 'n', short(l.seconds)));

  const totals = all => {
    const columns = [all.start, all.installation];
    const row = (what, value) => h('tr', {}, h('th', { scope: 'row' }, what),
      ...columns.map(since => h('td', { class: 'n' }, since ? String(value(since)) : '–')));
    return [
      row('Received from LAN', t => bytes(t.received_lan_bytes)),
      row('Received from WAN', t => bytes(t.received_wan_bytes)),
      row('Whole NARs received', t => t.received_nars),
      row('NARs that no peer could deliver', t => t.failed_nars),
      row('The same from upstream would have taken about', t => long(t.upstream_seconds)),
      row('Sent to LAN', t => bytes(t.sent_lan_bytes)),
      row('Sent to WAN', t => bytes(t.sent_wan_bytes)),
      row('NARs sent', t => t.sent_nars),
      row('Paths found', t => t.hits),
      row('Paths not found', t => t.misses)];
  };

  const UP = 84, DOWN = 36, HOURS = 48;
  const hours = (all, now) => {
    const first = Math.floor(now / 3600) - HOURS + 1;
    const shown = all.map(hour => [hour.start / 3600 - first, hour]).filter(([at]) => at >= 0 && at < HOURS);
    const most = of => Math.max(0, ...shown.map(([, hour]) => of(hour)));
    const up = most(received), down = most(sent);
    const scale = Math.min(UP / Math.max(1, up), DOWN / Math.max(1, down));
    const height = count => count ? Math.max(1, count * scale) : 0;
    const bar = (type, x, y, tall) => svg('rect', { class: type, x, y, width: 8, height: tall });
    const bars = shown.flatMap(([at, t]) => {
      const x = at * 10 + 1, lan = height(t.received_lan_bytes), wan = height(t.received_wan_bytes);
      return [bar('lan', x, UP - lan, lan), bar('wan', x, UP - lan - wan, wan), bar('sent', x, UP, height(sent(t)))];
    });
    const head = (name, type) => h('th', { scope: 'col', class: type }, name);
    const rows = shown.map(([, t]) => h('tr', {}, h('th', { scope: 'row' }, moment(t.start, now)),
      ...[bytes(t.received_lan_bytes), bytes(t.received_wan_bytes), bytes(sent(t)), `${t.hits} of ${asked(t)}`]
        .map(text => h('td', { class: 'n' }, text))));
    const label = `Most in an hour: ${bytes(up)} from peers, ${bytes(down)} to peers.`;
    const key = (type, text) => h('span', { class: type }, h('i'), text);
    const details = $('hours').querySelector('details');
    const table = rows.length
      ? h('details', details && details.open ? { open: '' } : {}, h('summary', {}, 'The same as a table'), h('table', {},
        h('thead', {}, h('tr', {}, head('From', ''), head('LAN', 'n'), head('WAN', 'n'), head('Sent', 'n'), head('Found', 'n'))),
        h('tbody', {}, ...rows)))
      : h('p', { class: 'none' }, 'Nothing happened in these hours.');
    const had = document.activeElement && document.activeElement.matches('#hours summary');
    put('hours', h('figcaption', {}, key('lan', 'from LAN'), key('wan', 'from WAN'), key('sent', 'to peers'), h('span', { class: 'soft' }, label)),
      svg('svg', { viewBox: `0 0 ${HOURS * 10} ${UP + DOWN}`, preserveAspectRatio: 'none', role: 'img', 'aria-label': label },
        ...bars, svg('line', { class: 'axis', x1: 0, x2: HOURS * 10, y1: UP, y2: UP })),
      h('div', { class: 'ends' }, h('span', {}, '48 h ago'), h('span', {}, '24 h ago'), h('span', {}, 'now')), table);
    if (had) $('hours').querySelector('summary')?.focus();
  };

  const health = (text, good) => {
    say('health', text);
    $('health').className = 'pill ' + good;
  };
  const render = r => {
    const now = r.time, ok = r.health.ok, since = r.totals.installation || r.totals.start;
    health(!ok ? 'not working' : r.health.problems.length ? 'working, but see below' : 'working', ok ? 'good' : 'bad');
    put('asof', moment(now, now));
    put('problems', ...r.health.problems.map(problem => h('li', { class: problem.serious ? 'bad' : '' }, problem.text)));
    put('since', moment(since.since, now));
    say('t-received', bytes(received(since)));
    say('t-received-of', `LAN ${bytes(since.received_lan_bytes)} · WAN ${bytes(since.received_wan_bytes)}`);
    say('t-found', percent(since.hits, asked(since)));
    say('t-found-of', `${since.hits} of ${plural(asked(since), 'lookup')}`);
    say('t-saved', long(since.upstream_seconds));
    say('t-sent', bytes(sent(since)));
    say('t-sent-of', plural(since.sent_nars, 'NAR'));
    say('uptime', long(r.node.uptime_seconds));
    say('last-asked', r.lookups.length ? `${long(r.time - r.lookups[0].time)} ago` : 'never');
    put('networks', ...lines(r.networks.map(network => `${network.interface ?? 'routed'} ${network.address}`)));
    put('trackers', ...lines(r.trackers.map(tracker =>
      `${tracker.url}, ${tracker.reached === null ? 'asked' : tracker.reached ? 'reached' : 'not reached'}`)));
    put('friends', ...lines(r.friends.map(friend =>
      `${friend.name}, ${friend.reached ? 'reached at ' + friend.address : 'not reached'}`)));
    put('transfers', ...(r.transfers.length ? r.transfers.map(transfer) : [h('p', { class: 'none' }, 'Nothing is being transferred.')]));
    $('no-peers').hidden = r.peers.length > 0;
    $('peers-table').hidden = !r.peers.length;
    put('peers', ...r.peers.map(one => peer(one, now)));
    say('omitted', r.peers_omitted ? `And ${r.peers_omitted} more.` : '');
    hours(r.history.hours, now);
    put('totals', ...totals(r.totals));
    $('no-lookups').hidden = r.lookups.length > 0;
    $('lookups-table').hidden = !r.lookups.length;
    put('lookups', ...r.lookups.map(one => lookup(one, now)));
  };

  let timer = 0, paused = false;
  const update = async () => {
    clearTimeout(timer);
    let pause = EVERY;
    try {
      const answer = await fetch('status.json', { cache: 'no-store', signal: AbortSignal.timeout(PATIENCE) });
      if (!answer.ok) throw new Error(String(answer.status));
      const report = await answer.json();
      if (report.version !== 1) return location.reload();
      if (paused) return;
      render(report);
      if (report.transfers.length) pause = EVERY_WHILE_RUNNING;
    } catch {
      health('peerix does not answer; what follows is old', 'bad');
    }
    clearTimeout(timer);
    if (!paused && !document.hidden) timer = setTimeout(update, pause);
  };
  const button = $('pause');
  button.hidden = false;
  button.addEventListener('click', () => {
    paused = !paused;
    button.setAttribute('aria-pressed', String(paused));
    if (paused) clearTimeout(timer);
    else update();
  });
  document.addEventListener('visibilitychange', () => { if (!document.hidden && !paused) update(); });
  update();
})();
