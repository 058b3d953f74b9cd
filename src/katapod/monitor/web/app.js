"use strict";
/* The page of kata-monitor. What comes from sandboxes is hostile: it becomes text nodes, never markup. */

const PERIOD_MS = 5000;
const KEPT = 720; // points of each sandbox: an hour
const GONE_S = 60; // how long one that has ended stays in the table
const $ = (id) => document.getElementById(id);

const known = new Map(); // id -> {row, points, gone}
const events = { list: [] };
let sortKey = "state", sortDown = false, timer = 0, detailPlots = null, pictureOf = "";

/* What is for root alone takes the token that stands behind the address which `kata-monitor --link` prints. It is kept
   for this tab, and taken out of the address: that may be shown, or sent on. */
function takeToken() {
  const found = /^#token=([\w-]+)$/.exec(location.hash);
  if (!found) return;
  sessionStorage.setItem("token", found[1]);
  history.replaceState(null, "", location.pathname + location.search);
}
const hasToken = () => sessionStorage.getItem("token") !== null;
function ask(path) {
  const token = sessionStorage.getItem("token");
  return fetch(path, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
}

/* ---- text */

const bytes = (value) => {
  if (value === null || value === undefined) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < 4) { value /= 1024; at += 1; }
  return `${at === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[at]}`;
};
const rate = (value) => (value === null || value === undefined ? "–" : value < 1 ? "0" : `${bytes(value)}/s`);
const percent = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(value < 10 ? 1 : 0)} %`);
const number = (value) => value.toFixed(2);
function age(seconds) {
  if (!(seconds >= 0)) return "–";
  if (seconds < 100) return `${Math.floor(seconds)} s`;
  if (seconds < 6000) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}
const clock = (at) => new Date(at * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "medium" });
const pair = (one, other) => (one === "–" && other === "–" ? "–" : `${one} / ${other}`);
const iso = (at) => new Date(at * 1000).toISOString();
const sum = (values) => Object.values(values).reduce((a, b) => a + b, 0);

/* ---- data */

function inside(use) {
  return use.guest ? { guest_used: use.guest.memory_total - use.guest.memory_available, load: use.guest.load1 } : {};
}

function note(row, now) {
  const one = known.get(row.sandbox_id) ?? { points: [], now };
  if (one.row && one.row.created_at !== row.created_at) one.points = []; // the name is in use again
  one.row = row;
  one.now = now;
  one.gone = 0;
  const use = row.use, last = one.points[one.points.length - 1];
  if (use && last && use.at - last.at < 1) {
    Object.assign(last, inside(use)); // too soon for a rate
  } else if (use) {
    const point = { at: use.at, raw: use, ...use.memory };
    const took = last?.raw ? use.at - last.at : 0;
    const per = (now, before) => (took > 0 && now !== null && before !== null ? Math.max(0, (now - before) / took) : null);
    point.read = per(use.disk_read, last?.raw?.disk_read);
    point.written = per(use.disk_written, last?.raw?.disk_written);
    point.received = per(use.net_received, last?.raw?.net_received);
    point.sent = per(use.net_sent, last?.raw?.net_sent);
    for (const part of Object.keys(use.cpu)) {
      const share = per(use.cpu[part], last?.raw?.cpu[part] ?? null);
      point[`cpu_${part}`] = share === null ? null : share * 100;
    }
    point.cpu = took > 0 ? ["vmm", "virtiofsd", "supervisor"].reduce((all, part) => all + (point[`cpu_${part}`] ?? 0), 0) : null;
    Object.assign(point, inside(use));
    if (last) delete last.raw;
    one.points.push(point);
    if (one.points.length > KEPT) one.points.shift();
  }
  known.set(row.sandbox_id, one);
}

async function refresh() {
  clearTimeout(timer);
  try {
    const answer = await ask("/api/sandboxes");
    if (!answer.ok) throw new Error(await answer.text());
    const found = await answer.json();
    const there = new Set();
    for (const row of found.sandboxes) {
      there.add(row.sandbox_id);
      // the one that is shown is asked by itself, for its guest's part too
      if (row.sandbox_id !== shownId() || !row.use) note(row, found.now);
    }
    for (const [id, one] of known) {
      if (there.has(id)) continue;
      one.gone = one.gone || found.now;
      if (found.now - one.gone > GONE_S && id !== shownId()) known.delete(id);
    }
    events.list = found.events;
    $("locked").hidden = found.whole;
    $("live").textContent = "live";
    $("live").className = "ok";
  } catch {
    $("live").textContent = "no answer from kata-monitor";
    $("live").className = "bad";
  }
  await show();
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, PERIOD_MS);
}

/* ---- the table */

const last = (one) => one.points[one.points.length - 1];
const alive = (one) => !one.gone && one.row.use;
const PARTS = { guest: "guest", vmm: "VMM", virtiofsd: "virtiofsd", supervisor: "supervisor" };
const ORDER = { hangs: 0, lost: 1, creating: 2, running: 3, paused: 4, pool: 5, stopped: 6, ended: 7 };
const stateOf = (one) => (one.gone ? "ended" : one.row.state);
const COLUMNS = [
  { key: "name", title: "Sandbox", value: (one) => one.row.name || one.row.sandbox_id },
  { key: "state", title: "State", value: (one) => ORDER[stateOf(one)] ?? 3 },
  { key: "where", title: "Address", value: (one) => one.row.addresses[0] ?? "" },
  { key: "age", title: "Age", right: true, value: (one) => -one.row.created_at, text: (one) => (one.row.created_at ? age(one.now - one.row.created_at) : "–") },
  { key: "size", title: "VM", right: true, value: (one) => one.row.mem_mib, text: (one) => (one.row.mem_mib ? `${one.row.vcpus} × ${bytes(one.row.mem_mib * 1048576)}` : "–") },
  { key: "memory", title: "Memory on host", value: (one) => (alive(one) ? sum(one.row.use.memory) : -1) },
  { key: "cpu", title: "CPU", right: true, value: (one) => (alive(one) && last(one)?.cpu) || 0, text: (one) => (alive(one) ? percent(last(one)?.cpu) : "–") },
  { key: "net", title: "Network in / out", right: true, value: (one) => (alive(one) ? (last(one)?.received ?? 0) + (last(one)?.sent ?? 0) : 0), text: (one) => (alive(one) && one.row.use.net_received !== null ? pair(rate(last(one).received), rate(last(one).sent)) : "–") },
  { key: "disk", title: "Disk read / written", right: true, value: (one) => (alive(one) ? (last(one)?.read ?? 0) + (last(one)?.written ?? 0) : 0), text: (one) => (alive(one) ? pair(rate(last(one)?.read), rate(last(one)?.written)) : "–") },
];

function badge(node, state, problem) {
  node.className = `badge ${Object.hasOwn(ORDER, state) ? state : "other"}`;
  node.textContent = state;
  node.title = problem;
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", problem ? `${state}: ${problem}` : state);
}

const cellOf = (key) => COLUMNS.findIndex((column) => column.key === key);

function newRow(id) {
  const row = document.createElement("tr");
  row.dataset.id = id;
  row.cells_ = COLUMNS.map((column) => {
    const cell = document.createElement("td");
    cell.dataset.title = column.title;
    if (column.right) cell.className = "right";
    row.append(cell);
    return cell;
  });
  const link = document.createElement("a");
  link.href = `#${encodeURIComponent(id)}`;
  const second = document.createElement("small");
  row.cells_[0].append(link, second);
  row.cells_[1].append(document.createElement("span"));
  const bar = document.createElement("span");
  bar.className = "parts";
  bar.setAttribute("role", "img");
  for (const part of Object.keys(PARTS)) {
    const piece = document.createElement("i");
    piece.className = part;
    bar.append(piece);
  }
  row.cells_[cellOf("where")].className = "where";
  row.cells_[cellOf("where")].append(document.createElement("span"), document.createElement("small"));
  row.cells_[cellOf("memory")].append(document.createElement("span"), bar);
  return row;
}

function fill(row, one, most) {
  const [link, second] = row.cells_[0].children;
  link.textContent = one.row.name || one.row.sandbox_id;
  second.textContent = one.row.name ? one.row.sandbox_id.slice(0, 12) : one.row.image;
  row.cells_[0].title = one.row.sandbox_id;
  badge(row.cells_[1].firstChild, stateOf(one), one.row.problem);
  const [address, ports] = row.cells_[cellOf("where")].children;
  address.textContent = one.row.addresses[0] ?? "–";
  ports.textContent = one.row.ports.join(" ") || one.row.addresses.slice(1).join(" ");
  row.cells_[cellOf("where")].title = [...one.row.addresses, ...one.row.ports].join("\n");
  const [text, bar] = row.cells_[cellOf("memory")].children;
  text.textContent = alive(one) ? bytes(sum(one.row.use.memory)) : "–";
  bar.hidden = !alive(one);
  if (alive(one)) {
    for (const piece of bar.children) {
      const size = one.row.use.memory[piece.className] ?? 0;
      piece.style.width = `${(100 * size) / most}%`;
      piece.title = `${PARTS[piece.className]}: ${bytes(size)}`;
    }
    bar.setAttribute("aria-label", [...bar.children].map((piece) => piece.title).join(", "));
  }
  COLUMNS.forEach((column, index) => { if (column.text) row.cells_[index].textContent = column.text(one); });
  row.classList.toggle("faded", Boolean(one.gone) || one.row.state === "stopped");
}

function showTable() {
  const wanted = $("filter").value.trim().toLowerCase();
  const words = (one) => [one.row.sandbox_id, one.row.name, one.row.image, stateOf(one), ...one.row.addresses, ...one.row.ports];
  const matches = (one) => words(one).some((text) => text.toLowerCase().includes(wanted));
  const shown = [...known.values()].filter(matches);
  const column = COLUMNS.find((each) => each.key === sortKey);
  const compare = (a, b) => { const x = column.value(a), y = column.value(b); return x < y ? -1 : x > y ? 1 : 0; };
  shown.sort((a, b) => (compare(a, b) * (sortDown ? -1 : 1)) || (a.row.sandbox_id < b.row.sandbox_id ? -1 : 1));
  const most = Math.max(1, ...shown.filter(alive).map((one) => sum(one.row.use.memory)));
  const body = $("fleet").tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  const wantedRows = shown.map((one) => {
    const row = rows.get(one.row.sandbox_id) ?? newRow(one.row.sandbox_id);
    fill(row, one, most);
    return row;
  });
  if (wantedRows.length !== body.rows.length || wantedRows.some((row, at) => row !== body.rows[at])) body.replaceChildren(...wantedRows);
  $("empty").hidden = known.size > 0;
  $("fleet").hidden = $("memory-legend").hidden = known.size === 0;
  const said = wanted ? `${shown.length} of ${known.size} sandboxes match the filter.` : "";
  if ($("shown").textContent !== said) $("shown").textContent = said;
  $("shown").hidden = !wanted;
  for (const head of $("fleet").tHead.rows[0].cells) {
    head.setAttribute("aria-sort", head.dataset.key !== sortKey ? "none" : sortDown ? "descending" : "ascending");
  }
  showEvents($("events"), events.list, true);
}

/* In the reader's zone; as ISO 8601, in UTC, under the pointer. */
function timeOf(at) {
  const node = document.createElement("time");
  node.textContent = clock(at);
  node.dateTime = node.title = iso(at);
  return node;
}

function showEvents(list, found, withNames) {
  const items = found.slice(-100).reverse().map((event) => {
    const item = document.createElement("li");
    item.append(timeOf(event.at));
    if (withNames) {
      const who = document.createElement("b");
      who.textContent = event.name || event.sandbox_id;
      who.title = event.sandbox_id;
      item.append(who, " ");
    }
    item.append(event.text + (event.why ? `: ${event.why}` : ""));
    return item;
  });
  if (!items.length) {
    const item = document.createElement("li");
    item.textContent = "Nothing yet.";
    items.push(item);
  }
  list.replaceChildren(...items);
}

/* ---- one sandbox */

function shownId() {
  try { return decodeURIComponent(location.hash.slice(1)); } catch { return ""; }
}

function makePlots() {
  detailPlots = {
    cpu: new Plot("CPU", [{ name: "VMM", key: "cpu_vmm" }, { name: "virtiofsd", key: "cpu_virtiofsd" }, { name: "supervisor", key: "cpu_supervisor" }], percent, { stacked: true, least: 10 }),
    memory: new Plot("Memory on the host", [{ name: "guest", key: "guest" }, { name: "VMM", key: "vmm" }, { name: "virtiofsd", key: "virtiofsd" }, { name: "supervisor", key: "supervisor" }], bytes, { stacked: true, binary: true }),
    net: new Plot("Network", [{ name: "received", key: "received" }, { name: "sent", key: "sent" }], rate, { binary: true, least: 1024 }),
    disk: new Plot("Disk", [{ name: "read", key: "read" }, { name: "written", key: "written" }], rate, { binary: true, least: 1024 }),
    inside: new Plot("Memory used in the guest", [{ name: "used", key: "guest_used" }], bytes, { stacked: true, binary: true }),
    load: new Plot("Load of the guest", [{ name: "1 min", key: "load" }], number, { least: 1 }),
  };
  $("d-plots").replaceChildren(...Object.values(detailPlots).map((plot) => plot.node));
}

function facts(pairs) {
  $("d-facts").replaceChildren(...pairs.filter(([, value]) => value).flatMap(([name, value]) => {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.append(...[value].flat());
    return [term, text];
  }));
}

async function showDetail(id) {
  let found = null;
  const query = `sandbox=${encodeURIComponent(id)}`;
  const [answer, consoleAnswer] = await Promise.all([ask(`/api/sandbox?${query}`), hasToken() && ask(`/api/console?${query}`)]).catch(() => []);
  if (shownId() !== id) return;
  if (answer?.ok) {
    found = await answer.json();
    note(found.sandbox, found.now);
  } else if (answer && known.get(id)) {
    known.get(id).gone ||= Date.now() / 1000;
  }
  const one = known.get(id);
  $("d-id").textContent = id;
  document.title = `${id} – Katapod monitor`;
  if (!one) {
    badge($("d-state"), "ended", "");
    $("d-problem").hidden = false;
    $("d-problem").textContent = "There is no such sandbox on this host: it may have ended.";
    return;
  }
  const row = one.row;
  badge($("d-state"), stateOf(one), row.problem);
  const problem = one.gone ? "This sandbox has ended and was removed. What is below is the last that was seen of it." : row.problem;
  $("d-problem").hidden = !problem;
  $("d-problem").textContent = problem;
  facts([
    ["Pod", row.name], ["Image", row.image], ["Created", row.created_at && [timeOf(row.created_at), ` (${age(one.now - row.created_at)} ago)`]],
    ["Addresses", row.addresses.join(", ")], ["Ports", row.ports.join(", ")],
    ["VM", row.mem_mib && `${row.vcpus} vCPU, ${bytes(row.mem_mib * 1048576)}`], ["Accelerator", row.accelerator],
    ["Kernel", found?.record?.kernel], ["Template", found?.record && (found.record.template || "none: it booted")],
    ["VMM's pid", found?.record?.vmm_pid && String(found.record.vmm_pid)], ["Supervisor's pid", found?.record && String(found.record.supervisor_pid)],
    ["Labels", found?.record?.labels && Object.entries(found.record.labels).map(([key, value]) => `${key}=${value}`).join(", ")],
  ]);
  const points = one.points, took = points.length ? points[points.length - 1].at - points[0].at : 0;
  const span = took > 900 ? 3600 : took > 280 ? 900 : 300;
  for (const plot of Object.values(detailPlots)) plot.draw(points, span);
  detailPlots.net.node.hidden = Boolean(row.use) && row.use.net_received === null;
  if (found) {
    showEvents($("d-events"), found.events, false);
    const rows = (found.record?.containers ?? []).map((container) => {
      const line = document.createElement("tr");
      for (const text of [container.container_id, container.state, container.image, container.command.join(" ")]) {
        line.insertCell().textContent = text;
      }
      return line;
    });
    $("d-containers").tBodies[0].replaceChildren(...rows);
  }
  if (consoleAnswer?.ok) {
    const pane = $("d-console"), atEnd = pane.scrollTop + pane.clientHeight >= pane.scrollHeight - 8;
    const text = await consoleAnswer.text();
    if (pane.textContent !== (text || "Nothing yet.")) {
      pane.textContent = text || "Nothing yet.";
      if (atEnd) pane.scrollTop = pane.scrollHeight;
    }
  }
  $("d-root").hidden = found !== null && !found.whole;
  if (pictureOf !== id && !one.gone && row.use && found?.whole) {
    pictureOf = id;
    showPicture(id, query);
  }
}

async function showPicture(id, query) {
  const picture = $("d-picture");
  const none = () => {
    $("d-nopicture").hidden = false;
    $("d-nopicture").textContent = "No picture: the sandbox did not tell what it would show.";
  };
  picture.onload = () => { $("d-frame").hidden = picture.hidden = false; $("d-nopicture").hidden = true; };
  picture.onerror = none;
  const answer = await ask(`/api/picture?${query}`).catch(() => null);
  const drawing = answer?.ok ? await answer.text() : "";
  if (shownId() !== id) return;
  if (drawing) picture.src = `data:image/svg+xml,${encodeURIComponent(drawing)}`; else none();
}

/* ---- all */

async function show() {
  const id = shownId();
  const counted = {};
  for (const one of known.values()) counted[stateOf(one)] = (counted[stateOf(one)] ?? 0) + 1;
  const order = Object.entries(counted).sort(([a], [b]) => (ORDER[a] ?? 3) - (ORDER[b] ?? 3) || (a < b ? -1 : 1));
  $("counts").textContent = order.map(([state, count]) => `${count} ${state}`).join(", ");
  $("overview").hidden = id !== "";
  $("detail").hidden = id === "";
  if (id) {
    await showDetail(id);
  } else {
    document.title = "Katapod monitor";
    showTable();
  }
}

function moved() {
  takeToken();
  pictureOf = "";
  $("d-frame").hidden = $("d-picture").hidden = true;
  $("d-picture").removeAttribute("src");
  $("d-nopicture").hidden = true;
  for (const id of ["d-facts", "d-events", "d-console"]) $(id).replaceChildren();
  $("d-containers").tBodies[0].replaceChildren();
  makePlots();
  scrollTo(0, 0);
  show();
  $(shownId() ? "d-id" : "o-title").focus({ preventScroll: true }); // so that a screen reader begins there
}

/* The filter and the order are in the address, so that it can be kept or sent on. */
function readAddress() {
  const given = new URLSearchParams(location.search);
  $("filter").value = given.get("filter") ?? "";
  const key = given.get("sort") ?? "";
  if (COLUMNS.some((column) => column.key === key)) sortKey = key;
  sortDown = given.has("down");
}

function writeAddress() {
  const kept = new URLSearchParams();
  if ($("filter").value.trim()) kept.set("filter", $("filter").value.trim());
  if (sortKey !== "state") kept.set("sort", sortKey);
  if (sortDown) kept.set("down", "");
  const text = kept.toString().replace("down=", "down");
  history.replaceState(null, "", location.pathname + (text && `?${text}`) + location.hash);
}

for (const column of COLUMNS) {
  const head = document.createElement("th");
  head.dataset.key = column.key;
  head.scope = "col";
  if (column.right) head.className = "right";
  const button = document.createElement("button");
  button.textContent = column.title;
  button.addEventListener("click", () => {
    sortDown = sortKey === column.key ? !sortDown : ["memory", "cpu", "net", "disk", "size"].includes(column.key);
    sortKey = column.key;
    writeAddress();
    showTable();
  });
  head.append(button);
  $("fleet").tHead.rows[0].append(head);
}
$("filter").addEventListener("input", () => { writeAddress(); showTable(); });
$("filter").addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  $("filter").value = "";
  writeAddress();
  showTable();
});
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target === $("filter") || shownId()) return;
  event.preventDefault();
  $("filter").focus();
});
document.querySelector("[data-skip]").addEventListener("click", (event) => {
  event.preventDefault();
  $(shownId() ? "d-id" : "o-title").focus();
});
addEventListener("hashchange", moved);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
takeToken();
readAddress();
makePlots();
refresh();
