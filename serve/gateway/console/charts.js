// Pictures of results, as SVG. Each function takes values and gives an element; nothing here asks the service.

const WIDTH = 560;

function element(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function picture(height, label) {
  return element("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label });
}

// Round steps that cut [low, high] into about `count` pieces.
export function ticks(low, high, count = 5) {
  const span = high - low || 1;
  const raw = span / count;
  const magnitude = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * magnitude).find((n) => n >= raw);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9; i += 1) found.push(i * step);
  return found;
}

export function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return `${(value / 1e6).toPrecision(3)}M`;
  return size >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

// How each arm's effect and its interval came over time. `series`: [{arm, colour, points: [{at, low, effect, high}]}].
export function effectOverTime(series, { label, format }) {
  const height = 260, left = 56, right = WIDTH - 12, top = 14, bottom = height - 30;
  const svg = picture(height, label);
  const points = series.flatMap((one) => one.points);
  if (!points.length) {
    svg.append(element("text", { x: WIDTH / 2, y: height / 2, "text-anchor": "middle" }, "No interval yet"));
    return svg;
  }
  // Early intervals are as wide as the sky; the picture is of the later half.
  const recent = series.flatMap((one) => one.points.slice(Math.floor(one.points.length / 2)));
  const margin = 0.08 * (Math.max(...recent.map((p) => p.high)) - Math.min(...recent.map((p) => p.low)) || 1);
  const low = Math.min(0, ...recent.map((p) => p.low)) - margin;
  const high = Math.max(0, ...recent.map((p) => p.high)) + margin;
  const first = Math.min(...points.map((p) => p.at)), last = Math.max(...points.map((p) => p.at));
  const x = (at) => (last === first ? (left + right) / 2 : left + ((at - first) / (last - first)) * (right - left));
  const y = (value) => bottom - ((Math.min(high, Math.max(low, value)) - low) / (high - low)) * (bottom - top);
  for (const tick of ticks(low, high)) {
    svg.append(element("line", { class: "axis", x1: left, x2: right, y1: y(tick), y2: y(tick) }));
    svg.append(element("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, format(tick)));
  }
  svg.append(element("line", { class: "zero", x1: left, x2: right, y1: y(0), y2: y(0) }));
  for (const { arm, colour, points: mine } of series) {
    if (!mine.length) continue;
    const group = element("g", { class: `arm-${colour}`, "data-arm": arm });
    const upper = mine.map((p) => `${x(p.at)},${y(p.high)}`);
    const lower = mine.map((p) => `${x(p.at)},${y(p.low)}`).reverse();
    group.append(element("polygon", { class: "band", points: [...upper, ...lower].join(" ") }));
    group.append(element("polyline", { class: "line", points: mine.map((p) => `${x(p.at)},${y(p.effect)}`).join(" ") }));
    const end = mine[mine.length - 1];
    group.append(element("line", { class: "whisker", x1: x(end.at), x2: x(end.at), y1: y(end.low), y2: y(end.high) }));
    group.append(element("circle", { class: "fill", cx: x(end.at), cy: y(end.effect), r: 4 }));
    svg.append(group);
  }
  const clock = (at) => new Date(at).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  svg.append(element("text", { x: left, y: height - 8 }, clock(first)));
  if (last > first) svg.append(element("text", { x: right, y: height - 8, "text-anchor": "end" }, clock(last)));
  return svg;
}

// Units of each arm beside the share that was planned. `arms`: [{arm, colour, units, planned}].
export function exposure(arms, { label }) {
  const row = 34, height = arms.length * row + 8, left = 130, right = WIDTH - 110;
  const svg = picture(height, label);
  const total = arms.reduce((sum, one) => sum + one.units, 0);
  const widest = Math.max(0.01, ...arms.map((one) => Math.max(one.planned, total ? one.units / total : 0)));
  const x = (share) => left + (share / widest) * (right - left);
  arms.forEach(({ arm, colour, units, planned }, i) => {
    const y = i * row + 8, share = total ? units / total : 0;
    const group = element("g", { class: `arm-${colour}`, "data-arm": arm });
    group.append(element("text", { class: "strong", x: left - 8, y: y + 15, "text-anchor": "end" }, clipped(arm, 18)));
    group.append(element("rect", { class: "fill", x: left, y, width: Math.max(1, x(share) - left), height: 20, rx: 3 }));
    group.append(element("line", { class: "planned", x1: x(planned), x2: x(planned), y1: y - 4, y2: y + 24 }));
    const said = `${units.toLocaleString("en")} · ${(100 * share).toFixed(1)} %`;
    group.append(element("text", { x: right + 8, y: y + 15 }, said));
    svg.append(group);
  });
  return svg;
}

// How much worse than control each guarded arm is, from at least to at most, and what is borne.
export function guardrails(rows, { label, format }) {
  const row = 40, height = rows.length * row + 8, left = 210, right = WIDTH - 16;
  const svg = picture(height, label);
  rows.forEach(({ metric, arm, colour, harm, at_least: least, at_most: most, tolerance, is_breached: breached }, i) => {
    const y = i * row + 22;
    const reach = 2 * Math.max(Math.abs(harm ?? 0), tolerance) + 1e-9;
    const known = [tolerance, 0, harm ?? 0, Math.max(least ?? 0, -reach), Math.min(most ?? 0, reach)];
    const low = Math.min(...known), high = Math.max(...known), span = high - low || 1;
    const x = (value) => left + ((Math.min(Math.max(value, low), high) - low) / span) * (right - left);
    const group = element("g", { class: breached ? "breach" : `arm-${colour}`, "data-guardrail": metric, "data-arm": arm });
    group.append(element("text", { class: "strong", x: left - 10, y: y + 4, "text-anchor": "end" }, clipped(`${metric} · ${arm}`, 30)));
    group.append(element("line", { class: "axis", x1: left, x2: right, y1: y, y2: y }));
    group.append(element("line", { class: "zero", x1: x(0), x2: x(0), y1: y - 8, y2: y + 8 }));
    group.append(element("line", { class: "limit", x1: x(tolerance), x2: x(tolerance), y1: y - 10, y2: y + 10 }));
    const anchor = x(tolerance) > right - 30 ? "end" : "middle";
    group.append(element("text", { x: x(tolerance), y: y - 12, "text-anchor": anchor }, format(metric, tolerance)));
    if (harm !== null) {
      group.append(element("line", { class: "whisker", x1: x(least), x2: x(most ?? harm), y1: y, y2: y }));
      group.append(element("circle", { class: "fill", cx: x(harm), cy: y, r: 5 }));
    }
    svg.append(group);
  });
  return svg;
}

function clipped(text, length) {
  return text.length > length ? `${text.slice(0, length - 1)}…` : text;
}
