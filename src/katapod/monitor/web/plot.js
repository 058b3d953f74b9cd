"use strict";
/* Small plots as SVG: lines over time, one colour each, and the values under the pointer. Text by textContent alone. */

const SVG = "http://www.w3.org/2000/svg";

function svgNode(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

/* A round number at or above `value`, in the steps 1, 2, 5 of base 10, or in powers of two for bytes. */
function niceTop(value, binary) {
  if (!(value > 0)) return 1;
  if (binary) {
    const unit = 1024 ** Math.floor(Math.log(value) / Math.log(1024));
    return niceTop(value / unit, false) * unit;
  }
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value * 0.999) * power;
}

class Plot {
  /* series: [{name, key}], format: number to text; stacked: areas upon each other */
  constructor(title, series, format, options = {}) {
    Object.assign(this, { title, series, format, options });
    this.node = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const name = document.createElement("span");
    name.textContent = title;
    this.legend = document.createElement("span");
    this.legend.className = "legend";
    caption.append(name, this.legend);
    this.svg = svgNode("svg", { viewBox: "0 0 400 130", role: "img", "aria-label": title });
    this.node.append(caption, this.svg);
    this.values = series.map((one, index) => {
      const label = document.createElement("span");
      label.className = `c${index}`;
      label.textContent = one.name;
      const value = document.createElement("b");
      const item = document.createElement("span");
      item.className = "item";
      item.append(label, value);
      this.legend.append(item, " ");
      return value;
    });
    this.points = [];
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => { this.hover = undefined; this.draw(this.points, this.span); });
  }

  point(event) {
    const box = this.svg.getBoundingClientRect();
    this.hover = this.end - this.span + ((event.clientX - box.left) / box.width) * this.span;
    this.draw(this.points, this.span);
  }

  /* points: [{at, ...values}], at in seconds; a value that is null is not known */
  draw(points, span) {
    this.points = points;
    this.span = span;
    this.end = points.length ? points[points.length - 1].at : 0;
    const from = this.end - span;
    const shown = points.filter((point) => point.at >= from - span / 50);
    const total = (point) => this.series.reduce((sum, one) => sum + (point[one.key] ?? 0), 0);
    const most = (point) => Math.max(...this.series.map((one) => point[one.key] ?? 0));
    let top = Math.max(this.options.least ?? 0, ...shown.map(this.options.stacked ? total : most));
    top = niceTop(top, this.options.binary);
    const x = (at) => ((at - from) / span) * 400;
    const y = (value) => 124 - (value / top) * 108;
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      parts.push(svgNode("line", { x1: 0, x2: 400, y1: y(top * share), y2: y(top * share), class: "grid" }));
    }
    parts.push(svgNode("text", { x: 2, y: 12, class: "axis" }, this.format(top)));
    parts.push(svgNode("text", { x: 398, y: 12, class: "axis", "text-anchor": "end" }, `${Math.round(span / 60)} min`));
    const below = shown.map(() => 0);
    this.series.forEach((one, index) => {
      const runs = [[]];
      shown.forEach((point, at) => {
        const value = point[one.key];
        if (value === null || value === undefined) { if (runs[runs.length - 1].length) runs.push([]); return; }
        const base = this.options.stacked ? below[at] : 0;
        below[at] = base + value;
        runs[runs.length - 1].push([x(point.at), y(base + value), y(base)]);
      });
      for (const run of runs.filter((each) => each.length)) {
        const line = run.map(([px, py]) => `${px.toFixed(1)},${py.toFixed(1)}`).join(" ");
        if (this.options.stacked) {
          const back = [...run].reverse().map(([px, , pb]) => `${px.toFixed(1)},${pb.toFixed(1)}`).join(" ");
          parts.push(svgNode("polygon", { points: `${line} ${back}`, class: `a${index}` }));
        }
        parts.push(svgNode("polyline", { points: line, class: `l${index}` }));
      }
    });
    let chosen = points[points.length - 1];
    if (this.hover !== undefined && shown.length) {
      chosen = shown.reduce((a, b) => (Math.abs(b.at - this.hover) < Math.abs(a.at - this.hover) ? b : a));
      parts.push(svgNode("line", { x1: x(chosen.at), x2: x(chosen.at), y1: 16, y2: 124, class: "cursor" }));
    }
    this.series.forEach((one, index) => {
      const value = chosen?.[one.key];
      this.values[index].textContent = value === null || value === undefined ? "–" : this.format(value);
    });
    const now = this.series.map((one, index) => `${one.name} ${this.values[index].textContent}`).join(", ");
    this.svg.setAttribute("aria-label", `${this.title}: ${now}`);
    this.svg.replaceChildren(...parts);
  }
}
