// The cluster in short, and the figures of the coordinator's machine.

import { h, keyed, panel, panelNote, setAttr, setText } from './dom.js';
import { bytes, duration, fixed, human, int, percent } from './format.js';

/** Rows of the coordinator's machine: name, words, and how full it is if that can be said. */
function rows(cluster, now) {
  const { system } = cluster;
  const list = [];
  const meter = (name, used, whole, text) => {
    if (Number.isFinite(used)) list.push({ name, text, share: whole > 0 ? used / whole : null });
  };
  meter('Load', system.load, system.cpus, `${fixed(system.load, 2)} of ${int(system.cpus)} cores`);
  const inUse = system.memory_bytes - system.memory_available_bytes;
  meter('Memory', system.memory_available_bytes === null ? NaN : inUse, system.memory_bytes, `${bytes(inUse)} of ${bytes(system.memory_bytes)}`);
  const stored = system.disk_bytes - system.disk_free_bytes;
  meter('Disk', system.disk_free_bytes === null ? NaN : stored, system.disk_bytes, `${bytes(system.disk_free_bytes)} of ${bytes(system.disk_bytes)} free`);
  meter('Coordinator', system.cores, system.cpus, `${fixed(system.cores, 2)} cores, ${bytes(system.rss_bytes)} of memory`);
  list.push({ name: 'Up', text: `for ${duration((now - cluster.started_ms) / 1000)}`, share: null });
  list.push({ name: 'Version', text: cluster.version, share: null });
  list.push({ name: 'Home', text: cluster.home, share: null });
  return list;
}

/** The panel of the coordinator's machine. */
export class System {
  #list = h('dl', { class: 'system' });

  constructor() {
    this.element = panel('Coordinator', { id: 'system', open: true }, this.#list);
  }

  /** @param {Object|null} cluster @param {number} now */
  update(cluster, now) {
    if (!cluster) return;
    keyed(this.#list, rows(cluster, now), (row) => row.name, (row) => {
      const meter = h('span', { class: 'meter', 'aria-hidden': 'true' }, h('span'));
      return h('div', {}, h('dt', {}, row.name), h('dd', {}, h('span'), meter));
    }, (element, row) => {
      const [text, meter] = element.lastElementChild.children;
      setText(text, row.text);
      meter.hidden = row.share === null;
      meter.firstElementChild.style.setProperty('--share', `${Math.min(100, 100 * (row.share ?? 0))}%`);
      setAttr(meter, 'data-full', row.share > 0.9 ? 'yes' : null);
    });
    const { cpus, load } = cluster.system;
    panelNote(this.element, cpus && load !== null ? `load ${percent(load / cpus)}` : '');
  }
}

/** The cluster in a row of figures, for the page of runs. */
export class ClusterTiles {
  #tiles = [];

  constructor() {
    const tile = (name) => {
      const [value, note] = [h('dd', { class: name === 'Active run' ? 'words' : null }), h('small')];
      this.#tiles.push([value, note]);
      return h('div', { class: 'tile' }, h('dt', {}, name), value, note);
    };
    this.element = h('dl', { class: 'tiles' }, ['Workers', 'Active run', 'Queue', 'Tokens per second', 'Load', 'Memory', 'Disk free'].map(tile));
  }

  /** @param {Object} cluster */
  update(cluster) {
    const { workers, active, queued, system } = cluster;
    const speed = workers.reduce((sum, worker) => sum + (worker.tokens_per_second ?? 0), 0);
    const late = workers.filter((worker) => worker.straggler).length;
    const hosts = new Set(workers.map((worker) => worker.host)).size;
    const used = system.memory_bytes - system.memory_available_bytes;
    const values = [
      [int(workers.length), late > 0 ? `${int(late)} straggling` : workers.length > 0 ? `on ${int(hosts)} ${hosts === 1 ? 'host' : 'hosts'}` : ''],
      [active ?? 'none', ''],
      [int(queued.length), queued[0] ? `next: ${queued[0]}` : ''],
      [speed > 0 ? human(speed) : '–', ''],
      [fixed(system.load, 2), system.cpus ? `of ${int(system.cpus)} cores` : ''],
      [system.memory_available_bytes === null ? '–' : percent(used / system.memory_bytes), system.memory_bytes ? `of ${bytes(system.memory_bytes)}` : ''],
      [bytes(system.disk_free_bytes), system.disk_bytes ? `of ${bytes(system.disk_bytes)}` : ''],
    ];
    values.forEach(([value, note], i) => {
      setText(this.#tiles[i][0], value);
      setText(this.#tiles[i][1], note);
    });
  }
}
