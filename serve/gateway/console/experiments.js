// The experiments' page: asks the API, and shows it. Text from the service only ever becomes text nodes.

import { effectOverTime, exposure, guardrails, short } from "./charts.js";

const REFRESH_MS = 5000;
const TIMES = new Set(["ttft", "time_per_token"]);
const content = document.getElementById("content");
const keyForm = document.getElementById("key");
const name = decodeURIComponent(location.pathname.split("/")[2] ?? "");
let metric = null;
let shown = "";

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
}

async function ask(path) {
  const key = sessionStorage.getItem("loom-key");
  const response = await fetch(path, { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  const body = await response.json();
  if (response.ok) return body;
  if (response.status === 401 || response.status === 403) keyForm.hidden = false;
  throw new Error(body.error?.message ?? `The service answered ${response.status}.`);
}

keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("loom-key", keyForm.querySelector("input").value.trim());
  keyForm.hidden = true;
  refresh();
});

function table(head, rows) {
  const cell = (tag, value) => {
    const isNumber = typeof value === "object" && value !== null && "number" in value;
    return make(tag, isNumber ? { class: "number" } : {}, isNumber ? String(value.number) : value);
  };
  return make("div", { class: "scroll" }, make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((text) => cell("th", text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((value) => cell("td", value))))),
  ));
}

function percent(value, digits = 1) {
  return value === null ? "–" : `${(100 * value).toFixed(digits)} %`;
}

function effectText(of, value) {
  if (value === null) return "–";
  const sign = value > 0 ? "+" : "";
  return TIMES.has(of) ? `${sign}${(100 * value).toFixed(1)} %` : `${sign}${short(value)}`;
}

function badge(text, kind = "") {
  return make("span", { class: `badge ${kind}` }, text);
}

function card(title, id, ...children) {
  return make("section", { class: "card", id }, make("h2", {}, title), ...children);
}

async function list() {
  const { data } = await ask("/v1/experiments");
  if (!data.length) return [make("h1", {}, "Experiments"), make("p", { class: "quiet" }, "There are none yet.")];
  const rows = data.map((one) => [
    make("a", { href: `/experiments/${encodeURIComponent(one.name)}` }, one.name),
    one.alias, badge(one.state), { number: one.phase.number }, percent(one.phase.coverage, 0), one.winner ?? "–",
  ]);
  return [
    make("h1", {}, "Experiments"),
    table(["name", "model name", "state", { number: "phase" }, "coverage", "decided on"], rows),
  ];
}

function verdict({ results }) {
  const kind = results.shares.is_mismatch ? "bad" : results.winner ? "good" : "";
  return make("section", { class: `card verdict ${kind}`, id: "verdict" },
    make("strong", {}, results.winner ? `Winner: ${results.winner}` : "No winner"), make("div", {}, results.note),
    results.later ? make("div", { class: "quiet" }, `Settled (${results.settled}). Since then: ${results.later.units} units in all.`) : null);
}

function effects({ results, looks }, colours) {
  const names = [...new Set(results.comparisons.map((one) => one.metric))];
  metric = names.includes(metric) ? metric : results.decision_metric;
  const choice = make("select", { "aria-label": "Metric" }, ...names.map((one) => {
    const option = make("option", { value: one }, one === results.decision_metric ? `${one} (decides)` : one);
    option.selected = one === metric;
    return option;
  }));
  choice.addEventListener("change", () => { metric = choice.value; shown = ""; refresh(); });
  const now = results.comparisons.filter((one) => one.metric === metric);
  const series = now.map((one) => {
    const points = looks
      .filter((look) => look.effects[metric]?.[one.arm])
      .map((look) => {
        const [low, effect, high] = look.effects[metric][one.arm];
        return { at: Date.parse(look.as_of), low, effect, high };
      });
    if (one.effect !== null) {
      points.push({ at: Date.parse(results.as_of), low: one.low, effect: one.effect, high: one.high });
    }
    return { arm: one.arm, colour: colours[one.arm], points };
  });
  const rows = now.map((one) => [
    one.arm, effectText(metric, one.effect), one.measure === "relative" || one.relative === null ? "–" : percent(one.relative), one.low === null ? "–" : `${effectText(metric, one.low)} … ${effectText(metric, one.high)}`,
    { number: one.adjusted_p === null ? "–" : one.adjusted_p < 0.001 ? "< 0.001" : one.adjusted_p.toFixed(3) },
    badge(one.verdict.replace("_", " "), { better: "good", not_worse: "good", equivalent: "good", worse: "bad", withheld: "bad" }[one.verdict] ?? ""),
  ]);
  const kind = results.analysis === "sequential" ? "valid at any time" : "fixed number of units";
  const together = metric === results.decision_metric ? `${percent(1 - results.alpha, 0)} for all arms together` : `${percent(1 - results.alpha, 0)} for all arms and all metrics that do not decide`;
  return card(`Effect against ${results.control}`, "effects", choice,
    make("span", { class: "quiet" }, ` intervals of ${together}, ${kind}`),
    effectOverTime(series, { label: `Effect on ${metric} over time`, format: (value) => effectText(metric, value) }),
    table(["arm", now[0]?.measure === "relative" ? "relative change" : "difference", "relative", "interval", { number: "p" }, ""], rows));
}

function shares({ results }, colours) {
  const arms = results.arms.map((one) => ({
    arm: one.arm, colour: colours[one.arm], units: one.units, planned: one.planned_share,
  }));
  const said = results.shares.is_mismatch
    ? badge("shares are not what was planned", "bad") : badge("shares are as planned", "good");
  const p = results.shares.p_value < 0.001 ? "< 0.001" : results.shares.p_value.toFixed(3);
  const excluded = Object.entries(results.excluded).map(([kind, count]) => `${count} ${kind.replace("_", " ")}`);
  return card("Exposed units", "exposure", said, make("span", { class: "quiet" }, ` p ${p}; the mark is the plan`),
    exposure(arms, { label: "Units of each arm, and the planned share" }),
    make("p", { class: "quiet" }, excluded.length ? `Not counted: ${excluded.join(", ")} requests.` : "Every request counts."));
}

function guarded({ results }, colours) {
  if (!results.guardrails.length) return null;
  const rows = results.guardrails.map((one) => ({ ...one, colour: colours[one.arm] }));
  const breached = rows.filter((one) => one.is_breached);
  const kept = rows.filter((one) => one.state === "kept");
  const said = breached.length
    ? badge(`breached: ${[...new Set(breached.map((one) => one.metric))].join(", ")}`, "bad")
    : badge(`no guardrail is breached; ${kept.length} of ${rows.length} kept with confidence`, kept.length === rows.length ? "good" : "");
  return card("Guardrails", "guardrails", said,
    make("span", { class: "quiet" }, " how much worse than control: the dot is the estimate, its line from at least to at most so much"),
    guardrails(rows, { label: "Harm of each arm against what is borne", format: effectText }));
}

function means({ results }) {
  const names = Object.keys(results.arms[0]?.means ?? {});
  const rows = results.arms.map((one) => [
    one.arm, make("span", { title: one.target }, one.target.replaceAll(/(@[0-9a-f]{12})[0-9a-f]+/g, "$1")), { number: one.requests }, { number: one.fallbacks }, { number: one.cold_requests },
    ...names.map((of) => ({ number: one.means[of] === null ? "–" : short(one.means[of]) })),
  ]);
  const head = ["arm", "target", ...["requests", "fallbacks", "cold", ...names].map((text) => ({ number: text }))];
  const made = card("Arms", "arms", table(head, rows));
  made.classList.add("wide");
  return made;
}

function pairs({ data }) {
  if (!data.length) return null;
  const rows = data.map((one) => make("tr", {},
    make("td", { class: "text" }, one.prompt ?? "(not kept)"),
    make("td", { class: "text" }, make("span", { class: "quiet" }, `${one.served}\n`), one.answer),
    make("td", { class: "text" }, make("span", { class: "quiet" }, `${one.shadow}\n`), one.shadow_answer)));
  const heads = ["question", "what the user got", "what the shadow arm said"].map((text) => make("th", {}, text));
  const made = card("Side by side", "pairs", make("div", { class: "scroll" },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...rows))));
  made.classList.add("wide");
  return made;
}

function past({ data }) {
  const rows = data.map((one) => [
    new Date(one.at).toLocaleString(), one.actor, one.action.replace("experiment.", "").replace("_", " "),
    one.details.reason ?? "",
  ]);
  const made = card("History", "history", table(["when", "who", "what", "why"], rows));
  made.classList.add("wide");
  return made;
}

async function one() {
  const path = `/v1/experiments/${encodeURIComponent(name)}`;
  const [experiment, answer, compared, history] = await Promise.all(
    [path, `${path}/results`, `${path}/pairs?limit=20`, `${path}/history?limit=20`].map(ask));
  document.title = `${experiment.name} · Loom`;
  const colours = Object.fromEntries(
    answer.results.arms.map((arm, i) => [arm.arm, arm.arm === answer.results.control ? 0 : 1 + ((i + 4) % 5)]));
  const { phase } = experiment;
  return [
    make("h1", {}, experiment.name),
    make("p", {}, badge(experiment.state), ` model name `, make("code", {}, experiment.alias),
      make("span", { class: "quiet" }, ` · phase ${phase.number} · ${percent(phase.coverage, 0)} of units`)),
    experiment.description ? make("p", { class: "quiet" }, experiment.description) : null,
    verdict(answer),
    make("div", { class: "grid" }, effects(answer, colours), shares(answer, colours), guarded(answer, colours),
      means(answer), pairs(compared), past(history)),
  ].filter((child) => child !== null);
}

async function refresh() {
  try {
    const made = await (name ? one() : list());
    const now = made.map((child) => child.outerHTML).join("");
    if (now !== shown && !(document.activeElement instanceof HTMLSelectElement && shown)) {
      content.replaceChildren(...made);
      shown = now;
    }
  } catch (error) {
    shown = "";
    content.replaceChildren(make("p", { class: "bad", role: "alert" }, error.message));
  }
}

refresh();
setInterval(() => { if (!document.hidden) refresh(); }, REFRESH_MS);
